"""What the VMs are made of: images (a suite, packages, extra kernels) and machines (an image booted with one kernel).

Only values; `image` builds them and `qemu` boots them.
"""

from __future__ import annotations

from dataclasses import dataclass

SYSTEM = (
    "systemd systemd-sysv systemd-container udev dbus dbus-user-session libpam-systemd login passwd procps kmod "
    "util-linux mount linux-image-cloud-amd64 busybox-static cpio xz-utils zstd "
    "python3 python3-systemd python3-pytest python3-docutils make acl strace psmisc"
).split()
DISKS = (
    "fdisk gdisk parted e2fsprogs dosfstools mtools lvm2 mdadm btrfs-progs xfsprogs f2fs-tools udisks2 dmsetup fuse3 "
    "qemu-utils"
).split()
CONTAINERS = "podman crun uidmap passt slirp4netns fuse-overlayfs bubblewrap docker.io lxc".split()
# What the device plugin needs, and beside it the stand-in for a kubelet.
PLUGIN = ["python3-grpcio", "libre2-11"]  # debootstrap does not find the second, which the first needs by another name
KUBELET = [*PLUGIN, "python3-protobuf"]
BUILDERS = "fai-server fai-setup-storage debootstrap".split()

# What is in /srv/container, the small root directory (no systemd, no kernel) that the tests' containers start from.
# With a kernel it is /srv/base.tar.zst, what fai-diskimage fills an image with.
CONTAINER = "python3 util-linux mount fdisk gdisk parted e2fsprogs dosfstools mtools grub2-common grub-pc-bin".split()


@dataclass(frozen=True)
class Kernel:
    """A kernel besides the one of the image's own suite: the newest of `suites` that matches `version`, a prefix."""

    name: str
    suites: tuple[str, ...]
    version: str = ""


@dataclass(frozen=True)
class Image:
    name: str
    suite: str
    packages: tuple[str, ...]
    container: tuple[str, ...] = tuple(CONTAINER)
    kernels: tuple[Kernel, ...] = ()
    size: str = "5G"


@dataclass(frozen=True)
class Machine:
    """`kernel` is a name of the image's `kernels`, or "default" for the suite's own.

    `leave_out`: the test files that tell nothing of this machine that they do not tell of the newest stable.
    `aside`: those that a second VM of the kind runs at the same time, about half of the work: a VM keeps one core busy.
    """

    name: str
    image: str
    kernel: str = "default"
    leave_out: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()


ALL = (*SYSTEM, *DISKS, *CONTAINERS, *BUILDERS)

IMAGES = {
    image.name: image
    for image in (
        Image("stable", "trixie", (*ALL, *KUBELET, "docker-cli", "docker-compose", "rpm"), (*CONTAINER, *PLUGIN)),
        Image(
            "kernels",
            "trixie",
            (*ALL, "docker-cli"),
            kernels=(
                Kernel("5.10", ("bullseye",), "5.10."),
                Kernel("newest", ("trixie-backports", "sid")),
            ),
        ),
        Image("oldstable", "bookworm", ALL),
    )
}

# What packages, documents, builders and containers do is a matter of programs, which are the same on each of these
# machines; how sockets start services, of systemd.
PROGRAMS = (
    "builders", "cdi", "containers", "deviceplugin", "doctor", "documents", "metrics", "package", "rootless", "zipapp",
)  # fmt: skip

MACHINES = {
    machine.name: machine
    for machine in (
        Machine("stable", "stable", aside=("activation", "builders", "containers", "doctor", "leases", "package")),
        Machine("oldstable", "oldstable", leave_out=PROGRAMS),
        Machine("5.10", "kernels", "5.10", leave_out=(*PROGRAMS, "activation")),
        Machine("newest", "kernels", "newest", leave_out=(*PROGRAMS, "activation")),
    )
}
