"""``python3 -m loopd.cli`` is loopctl."""

import sys

from loopd.cli import main

sys.exit(main())
