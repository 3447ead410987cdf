"""``python3 -m loopd`` is the daemon."""

import sys

from .daemon import main

sys.exit(main())
