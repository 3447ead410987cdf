#!/usr/bin/python3 -IS
"""``mount`` for a container that has loopd's socket: a file that is to be mounted gets a device of loopd's first.

mount(8) sets its loop devices up by itself, through /dev/loop-control, and asks no losetup. So this stands before it
in PATH, as `mount`: it attaches the file, has mount(8) mount the device, and has the kernel unbind it at umount, as
mount(8) does. What needs no loop device goes to mount(8) as it is.

Owns the reading of mount's command line and of fstab. What it has in common with `losetup` is packed into it when it is
installed; a copy of this file alone takes it from the file `losetup` or losetup.py beside it. Standard library of
Python 3.8 and later.
"""

from __future__ import annotations

import posix
import sys
from _signal import (  # type: ignore[import-not-found]
    SIG_IGN,
    SIGHUP,
    SIGINT,
    SIGPIPE,
    SIGTERM,
    SIGXFSZ,
    getsignal,
    signal,
)

try:
    from loopd.losetup import (
        Failure,
        Options,
        attach,
        become,
        detached,
        environment,
        make_flat,
        node,
        open_image,
        overlapping,
        real,
        say,
        set_autoclear,
        size,
        tidy,
        variable,
    )
except ImportError:
    beside = [sys.argv[0].rpartition("/")[0] + name for name in ("/losetup", "/losetup.py")]
    with open(next(path for path in beside if posix.access(path, posix.R_OK)), encoding="utf-8") as file:
        shared: dict[str, object] = {"__name__": "shared"}
        exec(compile(file.read(), file.name, "exec"), shared)  # noqa: S102
    globals().update((name, value) for name, value in shared.items() if not name.startswith("__"))

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Iterator

LETTERS = "tToOLUN"
"""Letters of mount(8) with an argument."""
WORDS = ("types", "fstab", "options", "test-opts", "label", "uuid", "namespace", "source", "target", "target-prefix",
         "options-mode", "options-source", "map-groups", "map-users")  # fmt: skip
"""Long options of mount(8) that must have an argument."""
NO_DEVICE = {"bind", "rbind", "move", "remount", "shared", "slave", "private", "unbindable", "rshared", "rslave",
             "rprivate", "runbindable", "X-mount.noloop"}  # fmt: skip
"""Options with which a source is no file system."""
LOOP = ("loop", "offset", "sizelimit")
"""Options of mount(8)'s own loop devices."""
MOST_BYTES_IGNORED = 1024
"""A file that is no longer gets no device of mount(8)'s own accord."""
KNOWN = set(
    "linux_raid_member ddf_raid_member isw_raid_member lsi_mega_raid_member via_raid_member "
    "silicon_medley_raid_member nvidia_raid_member promise_fasttrack_raid_member hpt45x_raid_member "
    "hpt37x_raid_member adaptec_raid_member jmicron_raid_member bcache ceph_bluestore drbd "
    "drbdmanage_control_volume drbdproxy_datalog LVM2_member LVM1_member DM_snapshot_cow DM_verity_hash "
    "DM_integrity crypto_LUKS VMFS_volume_member ubi vdo stratis BitLocker cs_fvault2 vfat swsuspend swap xfs "
    "xfs_external_log exfs exfat ext4dev ext4 ext3 ext2 jbd reiserfs reiser4 jfs udf iso9660 zfs_member hfsplus hfs "
    "ufs hpfs sysv xenix ntfs ReFS cramfs romfs minix gfs gfs2 ocfs ocfs2 oracleasm vxfs squashfs squashfs3 nss "
    "btrfs bcachefs ubifs bfs VMFS befs nilfs2 f2fs mpool apfs zonefs erofs".split()
)
"""Types of file systems that libblkid knows: a file of another type goes to mount(2), or to mount.TYPE, as it is."""
FAILED = 32
"""mount(8)'s exit code for a mount that failed."""

ENDS = (SIGHUP, SIGINT, SIGTERM)
IGNORED = (SIGPIPE, SIGXFSZ)
"""By Python, and what it starts would inherit that."""
interrupts: list[int] = []
"""Signals that were to end this program while there was a device."""
running: list[int] = []
"""mount(8), which is told of them, and ends by itself."""


class Plan:
    """A command line of mount(8), taken apart: `kept` is what goes to mount(8) unchanged."""

    def __init__(self, arguments: list[str]) -> None:
        self.kept: list[str] = []
        self.options: list[str] = []
        self.operands: list[str] = []
        self.type = self.source = self.target = self.fstab = self.namespace = ""
        self.device_unlikely = self.never_read_only = False
        for key, value, words in words_of(arguments):
            self.take(key, value, words)
        if not self.source and len(self.operands) == (1 if self.target else 2):
            self.source = self.operands.pop(0)
        elif not self.source and len(self.operands) == 1:
            self.look_up(self.operands[0])
        self.target = self.target or (self.operands[0] if self.operands else "")

    def take(self, key: str, value: str, words: list[str]) -> None:
        """One option or operand."""
        if key in ("o", "options"):
            self.options += split(value)
        elif key == "source":
            self.source = value
        elif key == "target":
            self.target = value
        elif key == "":
            self.operands.append(value)
        elif key in ("r", "read-only"):  # the last of these and those in -o counts
            self.options.append("ro")
        else:
            self.kept += words
            if key in ("w", "rw", "read-write"):  # which besides forbids mount(8) to fall back to read-only
                self.options.append("rw")
                self.never_read_only = True
            self.type = value if key in ("t", "types") else self.type
            self.fstab = value if key in ("T", "fstab") else self.fstab
            self.namespace = value if key in ("N", "namespace") else self.namespace
            self.device_unlikely |= key in ("a", "all", "B", "R", "M") or key.startswith("make-") or key in NO_DEVICE

    def look_up(self, name: str) -> None:
        """What fstab has of a mount point, or of a file; what the command line says comes after that."""
        for source, target, kind, options in entries(self.fstab or variable("LIBMOUNT_FSTAB") or "/etc/fstab"):
            if name in (source, target) or resolved(name) in (resolved(source), resolved(target)):
                self.source, self.operands = source, [target]
                self.options = split(options) + self.options
                if not self.type:
                    self.type, self.kept = kind, [*self.kept, "-t", kind]
                return

    @property
    def read_only(self) -> bool:
        """Whether the last of ro and rw is ro."""
        names = [option.partition("=")[0] for option in self.options]
        return ([name for name in names if name in ("ro", "rw")] or ["rw"])[-1] == "ro"

    def needs_device(self) -> bool:
        """Whether mount(8) would set a loop device up."""
        if not self.source or self.device_unlikely or NO_DEVICE.intersection(self.options) or nodev(self.type):
            return False
        if any(option.partition("=")[0] in LOOP for option in self.options):
            return True
        # A list of types, or of those that it is not, says nothing of this file.
        known = self.type in ("", "auto") or self.type in KNOWN or "," in self.type or self.type.startswith("no")
        try:
            status = posix.stat(self.source)
        except OSError:
            return False
        return known and status.st_mode & 0o170000 == 0o100000 and status.st_size > MOST_BYTES_IGNORED

    def loop_options(self) -> Options:
        """What it asks of the device; Failure where mount(8) would not understand it either."""
        options = Options()
        options.file, options.read_only = self.source, self.read_only
        for option in self.options:
            name, _, value = option.partition("=")
            if name in ("offset", "sizelimit") and value:
                setattr(options, name, size(value, name))
            if name == "encryption":
                raise Failure(option)
        return options

    def arguments(self, device: str, read_only: bool) -> list[str]:
        """The command line with the device in the place of the file."""
        options = [option for option in self.options if option.partition("=")[0] not in LOOP]
        options += ["ro"] if read_only and not self.read_only else []
        return [*self.kept, *(["-o", ",".join(options)] if options else []), "--", device, self.target]


def words_of(arguments: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each option as letter or name, argument and words; an operand has an empty name."""
    words = iter(arguments)
    for word in words:
        if word == "--":
            yield from (("", operand, []) for operand in words)
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            # An abbreviation is taken for the first option of mount(8) that it can be.
            name = name if name in WORDS else next((long for long in WORDS if long.startswith(name)), name)
            if name in WORDS and not equals:
                value = next(words, "")
                yield name, value, [word, value]
            else:
                yield name, value, [word]
        elif word.startswith("-") and word != "-":
            letters = word[1:]
            while letters:
                key, letters = letters[0], letters[1:]
                if key == "m" and letters:
                    yield key, "", [f"-m{letters}"]  # an argument that may be missing
                    break
                if key in LETTERS:
                    value = letters or next(words, "")
                    yield key, value, [f"-{key}", value]
                    break
                yield key, "", [f"-{key}"]
        else:
            yield "", word, []


def split(options: str) -> list[str]:
    """The options of -o; a comma in quotes belongs to the value."""
    found, quoted = [""], False
    for character in options:
        quoted ^= character == '"'
        if character == "," and not quoted:
            found.append("")
        else:
            found[-1] += character
    return [option for option in found if option]


def lines(path: str) -> list[str]:
    """The lines of a file, none where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError:
        return []


def plain(field: str) -> str:
    """A field of fstab or mountinfo without its escapes."""
    for code in ("040", "011", "012", "134"):
        field = field.replace(f"\\{code}", chr(int(code, 8)))
    return field


def entries(fstab: str) -> Iterator[tuple[str, str, str, str]]:
    """Source, mount point, type and options of each line of an fstab."""
    for line in lines(fstab):
        fields = [plain(field) for field in line.split()]
        if len(fields) >= 3 and not fields[0].startswith("#"):
            yield fields[0], fields[1], fields[2], fields[3] if len(fields) > 3 else "defaults"


def nodev(file_system: str) -> bool:
    """Whether a type of file system is on no device."""
    if file_system == "fuse" or file_system.startswith("fuse."):
        return True
    return any(line.split() == ["nodev", file_system] for line in lines("/proc/filesystems"))


def resolved(path: str) -> str:
    """A path without symbolic links, as it is where there is none such."""
    try:
        fd = posix.open(path, posix.O_PATH | posix.O_CLOEXEC)
        try:
            return posix.readlink(f"/proc/self/fd/{fd}")
        finally:
            posix.close(fd)
    except OSError:
        return path


def is_mounted(device: str, target: str) -> bool:
    """Whether a device is what is mounted there already."""
    fields = [line.split(" ") for line in lines("/proc/self/mountinfo")]
    sources = [row[row.index("-") + 2] for row in fields if plain(row[4]) == resolved(target)]
    return any(source.rpartition("/")[2] == device for source in sources)


def attached(plan: Plan, options: Options) -> tuple[str, int, bool]:
    """The path of the device, an fd that keeps it until it is mounted, and whether mount(8) is to be told `ro`.

    A file that has a device already is mounted from that one: two devices of one file system would destroy it. A new
    one goes at its last close, which is the umount, or the end of this program.
    """
    lease = overlapping(options)
    if lease is not None:
        if is_mounted(lease["devname"], plan.target):
            raise Failure("", "mounted")
        if plan.never_read_only and lease["read_only"] and not options.read_only:
            raise Failure("", "read-only")
        path = node(lease["devname"])
        try:
            return path, posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC), False
        except OSError:
            pass  # ENXIO: it has just been unmounted
    reply = attach(open_image(plan.source, options.read_only), options)
    try:
        path = make_flat(reply["devname"])
        # A kernel may refuse to mount what somebody has open for writing.
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
        set_autoclear(fd, True)
    except OSError:
        detached(reply["devname"])
        raise
    return path, fd, bool(reply.get("read_only"))


def explained(error: Exception, plan: Plan) -> Failure:
    """A failure in mount(8)'s words, with its exit code."""
    file = resolved(plan.source)
    code = error.code if isinstance(error, Failure) else ""
    if code == "mounted":
        return Failure(f"{plan.target}: {file} is already mounted.", status=1)
    if code == "overlap":
        return Failure(f"{plan.target}: overlapping loop device exists for {file}.", status=FAILED)
    if code == "read-only":
        return Failure(f"{plan.target}: mount failed: Read-only file system.", status=FAILED)
    why = error.strerror if isinstance(error, OSError) else error
    return Failure(f"{plan.target}: failed to setup loop device for {file}: {why}", status=FAILED)


def pass_on(number: int, frame: FrameType | None) -> None:
    """Have mount(8) end, and this program after it."""
    interrupts.append(number)
    for pid in running:
        try:
            posix.kill(pid, number)
        except ProcessLookupError:
            return  # it has ended by itself


def run(mount: str, arguments: list[str]) -> int:
    """Run mount(8); its exit code."""
    if interrupts:
        return 128 + interrupts[0]
    running.append(posix.posix_spawn(mount, ["mount", *arguments], environment(), setsigdef=IGNORED))
    for number in interrupts:  # while it was made
        posix.kill(running[0], number)
    code = posix.waitpid(running[0], 0)[1]
    running.clear()
    return posix.WEXITSTATUS(code) if posix.WIFEXITED(code) else 128 + posix.WTERMSIG(code)


def mount_file(mount: str, plan: Plan, options: Options) -> int:
    """Attach, mount, let go of the device; the exit code of mount(8)."""
    for number in ENDS:
        if getsignal(number) != SIG_IGN:
            signal(number, pass_on)
    try:
        refuse(plan)
        path, fd, read_only = attached(plan, options)
    except (Failure, OSError) as error:
        raise explained(error, plan) from None
    code = run(mount, plan.arguments(path, read_only))
    if code:
        try:
            posix.fsync(fd)  # the journal of a file system that could not be mounted may have been replayed
        except OSError as error:
            say(f"{plan.source} lacks what was written: {error.strerror}")
    posix.close(fd)
    tidy()
    return code


def refuse(plan: Plan) -> None:
    """Failure for what mount(8) does and this does not."""
    for option in plan.options:
        if option.startswith("loop="):
            raise Failure(f"{option}: loopd chooses the device: -o loop")
    if plan.namespace:
        raise Failure("loopd attaches no file of another namespace")


def main() -> int:
    """Mount; the exit code: mount(8)'s, or its code for a mount that failed."""
    try:
        mount = real("mount")
        plan = Plan(sys.argv[1:])
        if not plan.needs_device():
            become(mount)
        try:
            options = plan.loop_options()
        except Failure:
            become(mount)  # which says what is wrong with them, before it looks for a device
        return mount_file(mount, plan, options)
    except Failure as failure:
        say(failure)
        return failure.status
    except OSError as error:
        say(error.strerror or error)
        return FAILED


if __name__ == "__main__":
    posix._exit(main())  # noqa: SLF001  # without the tidying up of the interpreter
