#compdef loopctl
# Completion of loopctl(1) for zsh; tests/cli/test_completion.py holds it against loopctl's options.

_loopctl_devices() {
    local -a devices
    devices=(${(f)"$(loopctl ${opt_args[--admin]+--admin} --timeout 2 list --noheadings -o NAME 2>/dev/null)"})
    compadd -a devices
}

_loopctl_detached() {
    _alternative 'devices:device:_loopctl_devices' 'images:image:_files'
}

_loopctl_columns() {
    _values -s , column \
        all NAME SIZE RO DIO SECTOR OFFSET SIZELIMIT AGE STATE LEASE UID PID REF WINDOW UNIT OWNER OPEN-IN BACK-FILE
}

_loopctl() {
    local curcontext=$curcontext state line
    typeset -A opt_args
    local -a common image verbs
    common=(
        '--socket[where loopd listens]:socket:_files'
        '--admin[ask as the administrator of the host]'
        '--timeout[for a request and its answer]:seconds:'
        '(-)'{-h,--help}'[print a short help]'
    )
    image=(
        '(-d --directory)'{-d,--directory}'[where the node is made]:directory:_directories'
        '--deliver[insist on one way to hand the device over]:delivery:(node fd mount)'
        '(-o --offset)'{-o,--offset}'[start of the device in the image]:bytes:'
        '--sizelimit[size of the device at most]:bytes:'
        '(-b --sector-size)'{-b,--sector-size}'[logical sector size]:bytes:(512 1024 2048 4096)'
        '(-r --read-only)'{-r,--read-only}'[a device that cannot be written]'
        '(-P --partscan)'{-P,--partscan}'[find the partitions and make their nodes]'
        '--direct-io[past the page cache]:when:(auto on off)'
        '--lock[keep udev on the host off the device]'
        '--ref[text to keep with the device]:text:'
    )
    verbs=(
        'attach:attach an image to a loop device and print its path'
        'run:attach an image for the length of a command'
        'detach:detach devices and wait until their images are free'
        'list:show the devices that are held'
        'directory:make a directory to be bound into a container'
        'rescan:have the partitions of a device read again'
        'resize:have a device take over the size of its image'
        'doctor:look for what keeps devices from here'
        'hello:show what the daemon is and offers'
        'metrics:print what the daemon counts, for Prometheus'
    )
    _arguments -C $common '(-)--version[print the version]' '1:verb:->verb' '*::argument:->argument' && return
    case $state in
        verb) _describe verb verbs ;;
        argument)
            case $words[1] in
                attach)
                    _arguments $common $image '--json[print all that is known of the device]' \
                        '--lifetime[what ends the device]:lifetime:(container parent detach)' '1:image:_files' ;;
                run) _arguments $common $image '1:image:_files' '*::command:_normal' ;;
                detach)
                    _arguments $common '(-a --all)'{-a,--all}'[all that list shows]' \
                        '--wait[how long to wait until the image is free]:seconds:' '--force[whoever owns it]' \
                        '*:device or image:_loopctl_detached' ;;
                list)
                    _arguments $common '(-o --output)'{-o,--output}'[the columns to print]:columns:_loopctl_columns' \
                        '(-n --noheadings)'{-n,--noheadings}'[leave out the names of the columns]' '--json[print JSON]' ;;
                doctor|hello) _arguments $common '--json[print JSON]' ;;
                directory)
                    _arguments $common '--remove[remove it]' '--devices[how many device numbers it owns]:number:' \
                        '--json[print JSON]' '--user[the directory of another user]:user:_users' \
                        '--cdi[write a specification for container runtimes]' '--cdi-dir[where that is]:directory:_directories' \
                        '--losetup[with the stand-ins for losetup and mount]' '--force[also where max_loop is not in force]' \
                        '1:name:' ;;
                rescan|resize) _arguments $common '1:device:_loopctl_devices' ;;
                metrics) _arguments $common '--openmetrics[in the format OpenMetrics 1.0]' ;;
            esac ;;
    esac
}

_loopctl "$@"
