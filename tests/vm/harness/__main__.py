"""`python3 -m harness build|shell MACHINE`: build an image ahead of a run, or log in to a VM."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from .image import ImageError, image
from .machines import MACHINES
from .qemu import shell


def main(arguments: list[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("build", "shell") or arguments[1] not in MACHINES:
        print(f"usage: python3 -m harness build|shell {'|'.join(MACHINES)}", file=sys.stderr)
        return 2
    verb, machine = arguments
    try:
        if verb == "build":
            with image(MACHINES[machine].image, MACHINES[machine].kernel) as built:
                print(built.disk)
            return 0
        with tempfile.TemporaryDirectory(prefix="loopd-vm-") as folder:
            return shell(machine, Path(folder))
    except ImageError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
