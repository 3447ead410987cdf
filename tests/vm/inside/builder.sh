#!/bin/sh
# Runs in a container, with nothing but loopd's socket: makes the disk image disk.img in the current folder, a partition table
# and two file systems with a file each. The device's directory is $1 (default: /dev).
set -eu
nodes=${1:-/dev}
rm -rf disk.img content
truncate -s 48M disk.img

device=$(loopctl attach --directory "$nodes" disk.img)
[ -b "$device" ]
printf 'label: gpt\nsize=16M, type=uefi, name=boot\ntype=linux, name=root\n' | sfdisk --quiet --no-reread --no-tell-kernel "$device"
loopctl detach "$device"

partition() { # NUMBER COMMAND…: run the command with {} for a device of that partition
    set -- "$(partx -g -n "$1" -o START disk.img)" "$(partx -g -n "$1" -o SECTORS disk.img)" "$@"
    start=$1 sectors=$2
    shift 3
    loopctl run --directory "$nodes" --offset $((start * 512)) --sizelimit $((sectors * 512)) disk.img -- "$@"
}
mkdir content
cp /etc/debian_version content/from-container
partition 1 mkfs.vfat -n BOOT {}
partition 1 mcopy -i {} content/from-container ::hello
partition 2 mkfs.ext4 -q -L root -d content {}
partition 2 e2fsck -fn {}
