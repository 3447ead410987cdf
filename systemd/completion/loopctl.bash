# Completion of loopctl(1) for bash. Needs nothing but bash; tests/cli/test_completion.py holds it against loopctl's options.

_loopctl() {
    local common='--socket --admin --timeout --help'
    local image='-d --directory --deliver -o --offset --sizelimit -b --sector-size -r --read-only -P --partscan
        --direct-io --lock --ref'
    local -A options=(
        [attach]="$image --lifetime --json"
        [run]="$image"
        [detach]='-a --all --wait --force'
        [list]='-o --output -n --noheadings --json'
        [directory]='--remove --devices --json --user --cdi --cdi-dir --losetup --force'
        [rescan]=''
        [resize]=''
        [doctor]='--json'
        [hello]='--json'
        [metrics]='--openmetrics'
    )
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
    # "=" is a word of its own to bash.
    if [[ $cur == = ]]; then
        cur=
    elif [[ $prev == = ]]; then
        prev=${COMP_WORDS[COMP_CWORD-2]}
    fi

    local word verb='' skip='' command='' admin='' index
    for ((index = 1; index < COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        if [[ $skip ]]; then
            [[ $word == = ]] || skip=
            continue
        fi
        case $word in
            --admin) admin=--admin ;;
            --socket|--timeout|-d|--directory|--deliver|-o|--offset|--output|--sizelimit|-b|--sector-size|--direct-io|\
            --ref|--lifetime|--wait|--devices|--user|--cdi-dir) skip=1 ;;
            --) command=$((index + 1)); break ;;
            -*|=) ;;
            *) verb=${verb:-$word} ;;
        esac
    done

    COMPREPLY=()
    if [[ $verb == run && $command ]]; then
        if ((COMP_CWORD == command)); then
            mapfile -t COMPREPLY < <(compgen -c -- "$cur")
        else
            compopt -o default
        fi
        return
    fi
    [[ $verb$prev == list-o ]] && prev=--output
    case $prev in
        -d|--directory|--cdi-dir) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
        --socket) compopt -o default; return ;;
        --deliver) word='node fd mount' ;;
        -b|--sector-size) word='512 1024 2048 4096' ;;
        --user) word=$(compgen -u) ;;
        --direct-io) word='auto on off' ;;
        --lifetime) word='container parent detach' ;;
        --output)
            # The columns behind a comma, too.
            for word in all NAME SIZE RO DIO SECTOR OFFSET SIZELIMIT AGE STATE LEASE UID PID REF WINDOW UNIT OWNER OPEN-IN BACK-FILE; do
                [[ $cur == *,* ]] && word=${cur%,*},$word
                [[ $word == "$cur"* ]] && COMPREPLY+=("$word")
            done
            compopt -o nospace
            return
            ;;
        -o|--offset|--sizelimit|--ref|--timeout|--wait|--devices) return ;;
        *)
            if [[ ! $verb ]]; then
                word="${!options[*]} $common --version"
            elif [[ $cur == -* ]]; then
                word="${options[$verb]-} $common"
            else
                case $verb in
                    attach|run) compopt -o default; return ;;
                    detach|rescan|resize)
                        word=$(loopctl $admin --timeout 2 list --noheadings -o NAME 2>/dev/null)
                        [[ $verb == detach ]] && compopt -o default # an image does, too
                        ;;
                    *) return ;;
                esac
            fi
            ;;
    esac
    mapfile -t COMPREPLY < <(compgen -W "$word" -- "$cur")
}
complete -F _loopctl loopctl
