#!/bin/bash
# Builds root.img, kernels.json, vmlinuz-* and initrd.img-* in the current folder, from the variables that image.py sets.
# Runs as root in mount and pid namespaces of its own; nothing outside of the current folder is changed.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 HOME=/root TMPDIR=/tmp

step() { printf '== %(%T)T %s\n' -1 "$*"; }
bootstrap() { # FOLDER [INCLUDE]
    local log=$PWD/$1.log
    debootstrap --variant=minbase --keyring="$KEYRING" ${2:+--include="${2// /,}"} "$SUITE" "$1" $MIRROR >"$log" 2>&1 ||
        { cat "$log" "$1/debootstrap/debootstrap.log"; return 1; }
}

step "debootstrap $SUITE, twice"
bootstrap container "$CONTAINER" & container=$!
bootstrap root
inside() { chroot root "$@"; }

mount -t proc proc root/proc
mount --rbind /sys root/sys
mkdir -p root/dev/pts
mount -t devpts -o newinstance,ptmxmode=666 devpts root/dev/pts
cp --dereference /etc/resolv.conf root/etc/resolv.conf
# Nothing is started while the image is built, and nothing of it needs to survive a power cut.
printf '#!/bin/sh\nexit 101\n' >root/usr/sbin/policy-rc.d
chmod +x root/usr/sbin/policy-rc.d
printf 'force-unsafe-io\nforce-confold\npath-exclude=/usr/share/man/*\npath-exclude=/usr/share/doc/*\npath-exclude=/usr/share/locale/*\n' \
    >root/etc/dpkg/dpkg.cfg.d/loopd-vm
install() { inside apt-get --quiet=2 --yes --no-install-recommends -o APT::Sandbox::User=root "$@"; }

step "packages"
mkdir -p root/etc/initramfs-tools
printf 'update_initramfs=no\n' >root/etc/initramfs-tools/update-initramfs.conf
install install $PACKAGES
declare -A versions
versions[default]=$(ls root/lib/modules)

mirror=$(awk '$1 == "deb" { print $2; exit }' root/etc/apt/sources.list)
while read -r name prefix suites; do
    [ -n "$name" ] || continue
    step "kernel $name"
    for suite in $suites; do
        echo "deb $mirror $suite main" >"root/etc/apt/sources.list.d/$suite.list"
        printf 'Package: *\nPin: release n=%s\nPin-Priority: 50\n' "$suite" >"root/etc/apt/preferences.d/$suite"
    done
    install -o Acquire::Check-Valid-Until=false update
    # The package linux-image-cloud-amd64 of each suite names the real one.
    best=
    while read -r version; do
        [ "$prefix" = - ] || [[ $version == "$prefix"* ]] || continue
        [ -n "$best" ] && dpkg --compare-versions "$version" lt "$best" || best=$version
    done < <(inside apt-cache madison linux-image-cloud-amd64 | awk '{ print $3 }')
    package=$(inside apt-cache show "linux-image-cloud-amd64=$best" | sed -n 's/^Depends: .*\(linux-image-[0-9][^ ,]*\).*/\1/p')
    suite=$(inside apt-cache madison "$package" | awk 'NR == 1 { sub("/.*", "", $6); print $6 }')
    step "kernel $name is $package of $suite"
    [ -n "$package" ]
    before=$(ls root/lib/modules)
    install -t "$suite" install "$package"
    versions[$name]=$(comm -13 <(echo "$before") <(ls root/lib/modules))
    rm root/etc/apt/sources.list.d/*.list root/etc/apt/preferences.d/*
done <<<"$KERNELS"

step "settings"
wait "$container"
cp -a "$OVERLAY"/. root/
chown -R root:root root/etc root/usr/local
inside useradd --create-home --shell /bin/bash builder
grep -q ^builder root/etc/subuid || echo builder:100000:65536 | tee -a root/etc/subuid >>root/etc/subgid
inside passwd --delete root
: >root/etc/machine-id
echo loopd-vm >root/etc/hostname
echo '127.0.0.1 localhost loopd-vm' >root/etc/hosts
printf 'LABEL=vmroot / ext4 noatime 0 0\n' >root/etc/fstab
for unit in docker.service docker.socket containerd.service lxc.service lxc-net.service lxc-monitord.service podman.service \
    podman.socket podman-auto-update.timer podman-restart.service podman-clean-transient.service nfs-server.service \
    rpcbind.service rpcbind.socket netavark-dhcp-proxy.socket netavark-dhcp-proxy.service; do
    inside systemctl disable "$unit" 2>/dev/null || :
done
inside systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
    mdcheck_start.timer mdcheck_continue.timer mdmonitor-oneshot.timer \
    xfs_scrub_all.timer e2scrub_reap.service getty@tty1.service systemd-update-done.service ldconfig.service \
    systemd-journal-catalog-update.service systemd-hwdb-update.service modprobe@drm.service
inside journalctl --update-catalog
inside systemd-hwdb update
inside systemctl enable loopd-vm.service
rm -rf root/usr/sbin/policy-rc.d root/var/cache/apt/* root/var/lib/apt/lists/* container/var/cache/apt/* \
    container/var/lib/apt/lists/* container/usr/share/{doc,man,locale}/*
mkdir -p root/srv
mv container root/srv/container
# What fai-diskimage fills an image with: the same small system, and a kernel.
inside tar --zstd -cf /srv/base.tar.zst --exclude='./usr/lib/python3*' -C /srv/container . \
    -C / "boot/vmlinuz-${versions[default]}" "boot/initrd.img-${versions[default]}"

# An initrd that does nothing but mount the root disk: a distribution's own takes half of the boot under software emulation.
initrd() { # VERSION
    mkdir -p root/tmp/initrd/{bin,dev,proc,sys,root,modules}
    cp root/bin/busybox root/tmp/initrd/bin/
    local n=10 module
    { inside modprobe --set-version "$1" --show-depends virtio_pci
      inside modprobe --set-version "$1" --show-depends virtio_blk
      inside modprobe --set-version "$1" --show-depends ext4; } |
        awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r module; do
        case $module in
            *.xz) inside xz -dc "$module" ;;
            *.zst) inside zstd -qdc "$module" ;;
            *) cat "root/$module" ;;
        esac >root/tmp/initrd/modules/$((n++)).ko
    done
    cat >root/tmp/initrd/init <<'END'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in /modules/*.ko; do /bin/busybox insmod "$module"; done
tries=0
until /bin/busybox mount -o noatime -t ext4 /dev/vda /root; do
    tries=$((tries + 1)); [ $tries -lt 100 ] || exit 1
    /bin/busybox usleep 100000
done
/bin/busybox umount /proc
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
END
    chmod +x root/tmp/initrd/init
    inside sh -c 'cd /tmp/initrd && find . | cpio --quiet -o -H newc' >"initrd.img-$1"
    rm -rf root/tmp/initrd
}

step "initrds"
json=
for name in "${!versions[@]}"; do
    version=${versions[$name]}
    inside depmod "$version"
    initrd "$version"
    cp "root/boot/vmlinuz-$version" .
    json+="${json:+, }\"$name\": \"$version\""
done
umount -R root/proc root/sys root/dev/pts

step "root.img"
truncate -s "$SIZE" root.img
mkfs.ext4 -q -L vmroot -d root root.img
rm -rf --one-file-system root
echo "{$json}" >kernels.json
step "done: $(du -h root.img | cut -f1), kernels $json"
