"""Builds the VMs' disk images and keeps them in a cache folder.

An image is a folder `NAME-KEY` with `root.img`, `kernels.json` and a `vmlinuz` and `initrd` for each kernel. KEY is a
digest of everything the image is made of, so a change of the package list makes a new one. A folder appears under its
final name only when it is complete (rename), one builder works at a time (flock), and users hold a shared lock, so
that nobody removes an image under a running VM. Must not know anything about tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .machines import IMAGES, Image, Kernel

OVERLAY = Path(__file__).parent.parent / "overlay"
BUILD = Path(__file__).parent / "build-root.sh"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# What must be there on the host, and the Debian package that brings it.
TOOLS = {
    "debootstrap": "debootstrap",
    "qemu-system-x86_64": "qemu-system-x86",
    "mkfs.ext4": "e2fsprogs",
    "unshare": "util-linux",
    "git": "git",
    "tar": "tar",
    KEYRING: "debian-archive-keyring",
}


class ImageError(Exception):
    """The image cannot be built here; the text says what to do."""


@dataclass(frozen=True)
class Built:
    disk: Path
    vmlinuz: Path
    initrd: Path


def cache_folder() -> Path:
    return Path(os.environ.get("LOOPD_VM_CACHE") or Path.home() / ".cache/loopd-vm")


def digest(image: Image) -> str:
    """Changes with whatever the image is made of, and with nothing else."""
    text = hashlib.sha256(json.dumps(asdict(image), sort_keys=True).encode())
    for path in (BUILD, *sorted(p for p in OVERLAY.rglob("*") if p.is_file())):
        text.update(f"{path.name}\0{path.stat().st_mode:o}\0".encode() + path.read_bytes())
    return text.hexdigest()[:12]


def missing_packages() -> list[str]:
    def there(tool: str) -> bool:
        return Path(tool).exists() if tool.startswith("/") else shutil.which(tool, path=search) is not None

    # A user's PATH has no sbin on Debian.
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return sorted({package for tool, package in TOOLS.items() if not there(tool)})


def require_tools() -> None:
    """Install what is missing where that is possible without a question, else say what to install."""
    missing = missing_packages()
    if not missing:
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise ImageError(f"the VM tests need more packages; on Debian: {' '.join(command)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "--quiet", "update"], command):
        subprocess.run(step, check=True, env=environment, stdout=sys.stderr)
    if missing_packages():
        raise ImageError(f"installed, and still not found: {' '.join(missing_packages())}")


@contextlib.contextmanager
def locked(path: Path, operation: int) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, operation)
        yield


@contextlib.contextmanager
def image(name: str, kernel: str = "default") -> Iterator[Built]:
    """The image NAME with one of its kernels, built if need be, and kept from removal while it is used."""
    spec, cache = IMAGES[name], cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{name}-{digest(spec)}"
    require_tools()
    with locked(cache / f"{name}.lock", fcntl.LOCK_EX):
        if not folder.is_dir():
            build(spec, folder)
        remove_others(cache, name, keep=folder)
        in_use = open(use_lock(folder), "w")  # noqa: SIM115 - closed below, outlives this lock
        fcntl.flock(in_use, fcntl.LOCK_SH)
    with in_use:
        version = json.loads((folder / "kernels.json").read_text())[kernel]
        yield Built(folder / "root.img", folder / f"vmlinuz-{version}", folder / f"initrd.img-{version}")


def use_lock(folder: Path) -> Path:
    return folder.with_name(folder.name + ".use")


def remove_others(cache: Path, name: str, keep: Path) -> None:
    """Remove left-overs of ended builds and images with an older key, not those in use; the lock of NAME is held."""
    for folder in cache.glob(f"{name}-*"):
        if not folder.is_dir() or folder == keep:
            continue
        with open(use_lock(folder), "w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            subprocess.run(["rm", "-rf", "--one-file-system", folder], check=True)
            use_lock(folder).unlink()


def build(spec: Image, folder: Path) -> None:
    if os.geteuid() != 0:
        raise ImageError("the VM's image is built by debootstrap, which needs root; run this once as root")
    started, work = time.monotonic(), folder.with_name(folder.name + ".tmp")
    subprocess.run(["rm", "-rf", "--one-file-system", work], check=True)
    work.mkdir()
    print(f"building the VM image {folder} (the log is {work}/build.log) …", file=sys.stderr, flush=True)
    environment = {
        **os.environ,
        "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
        "SUITE": spec.suite,
        "MIRROR": os.environ.get("LOOPD_VM_MIRROR", ""),
        "KEYRING": KEYRING,
        "PACKAGES": " ".join(spec.packages),
        "CONTAINER": " ".join(spec.container),
        "KERNELS": "\n".join(kernel_line(kernel) for kernel in spec.kernels),
        "SIZE": spec.size,
        "OVERLAY": str(OVERLAY),
    }
    # Namespaces of its own: what debootstrap mounts and scripts start ends with the build, however that ends.
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", str(BUILD)]
    with open(work / "build.log", "wb") as log:
        done = subprocess.run(
            command, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        )
    if done.returncode != 0:
        tail = (work / "build.log").read_text(errors="replace").splitlines()[-40:]
        raise ImageError("\n".join([f"the image was not built; {work}/build.log ends with:", *tail]))
    work.rename(folder)
    print(f"built in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def kernel_line(kernel: Kernel) -> str:
    return f"{kernel.name} {kernel.version or '-'} {' '.join(kernel.suites)}"
