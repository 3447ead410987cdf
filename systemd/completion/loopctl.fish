# Completion of loopctl(1) for fish; tests/cli/test_completion.py holds it against loopctl's options.

set -l verbs attach run detach list directory rescan resize doctor hello metrics
complete -c loopctl -f
complete -c loopctl -l socket -r -F -d 'where loopd listens'
complete -c loopctl -l admin -d 'ask as the administrator of the host'
complete -c loopctl -l timeout -x -d 'seconds for a request and its answer'
complete -c loopctl -s h -l help -d 'print a short help'

complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -l version -d 'print the version'
complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -a attach -d 'attach an image and print its path'
complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -a run -d 'attach an image for the length of a command'
complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -a detach -d 'detach devices and wait'
complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -a list -d 'show the devices that are held'
complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -a directory -d 'make a directory to be bound into a container'
complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -a rescan -d 'have the partitions read again'
complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -a resize -d 'take over the size of the image'
complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -a doctor -d 'look for what keeps devices from here'
complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -a hello -d 'show what the daemon is and offers'
complete -c loopctl -n "not __fish_seen_subcommand_from $verbs" -a metrics -d 'print what the daemon counts'
complete -c loopctl -n '__fish_seen_subcommand_from metrics' -l openmetrics -d 'in the format OpenMetrics 1.0'

for verb in attach run
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -F
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -s d -l directory -x -a '(__fish_complete_directories)' -d 'where the node is made'
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -l deliver -x -a 'node fd mount' -d 'insist on one way to hand it over'
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -s o -l offset -x -d 'start of the device in the image'
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -l sizelimit -x -d 'size of the device at most'
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -s b -l sector-size -x -a '512 1024 2048 4096' -d 'logical sector size'
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -s r -l read-only -d 'a device that cannot be written'
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -s P -l partscan -d 'find the partitions and make their nodes'
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -l direct-io -x -a 'auto on off' -d 'past the page cache'
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -l lock -d 'keep udev on the host off the device'
    complete -c loopctl -n "__fish_seen_subcommand_from $verb" -l ref -x -d 'text to keep with the device'
end
complete -c loopctl -n '__fish_seen_subcommand_from attach' -l lifetime -x -a 'container parent detach' -d 'what ends the device'
complete -c loopctl -n '__fish_seen_subcommand_from attach list directory doctor hello' -l json -d 'print JSON'
set -l columns all NAME SIZE RO DIO SECTOR OFFSET SIZELIMIT AGE STATE LEASE UID PID REF WINDOW UNIT OWNER OPEN-IN BACK-FILE
complete -c loopctl -n '__fish_seen_subcommand_from list' -s o -l output -x -a "(__fish_append , $columns)" -d 'the columns to print'
complete -c loopctl -n '__fish_seen_subcommand_from list' -s n -l noheadings -d 'leave out the names of the columns'

complete -c loopctl -n '__fish_seen_subcommand_from detach' -s a -l all -d 'all that list shows'
complete -c loopctl -n '__fish_seen_subcommand_from detach' -l wait -x -d 'seconds to wait until the image is free'
complete -c loopctl -n '__fish_seen_subcommand_from detach' -l force -d 'whoever owns it'
complete -c loopctl -n '__fish_seen_subcommand_from detach' -F
complete -c loopctl -n '__fish_seen_subcommand_from detach rescan resize' -a '(loopctl --timeout 2 list --noheadings -o NAME 2>/dev/null)'
complete -c loopctl -n '__fish_seen_subcommand_from directory' -l remove -d 'remove it'
complete -c loopctl -n '__fish_seen_subcommand_from directory' -l user -x -a '(__fish_complete_users)' -d 'the directory of another user'
complete -c loopctl -n '__fish_seen_subcommand_from directory' -l cdi -d 'write a specification for container runtimes'
complete -c loopctl -n '__fish_seen_subcommand_from directory' -l cdi-dir -x -a '(__fish_complete_directories)' -d 'where that is'
complete -c loopctl -n '__fish_seen_subcommand_from directory' -l losetup -d "with the stand-ins for losetup and mount"
complete -c loopctl -n '__fish_seen_subcommand_from directory' -l force -d 'also where max_loop is not in force'
complete -c loopctl -n '__fish_seen_subcommand_from directory' -l devices -x -d 'how many device numbers it owns'
