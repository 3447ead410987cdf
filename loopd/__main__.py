"""``python3 -m loopd`` is the daemon."""

import sys

from loopd.daemon import main

sys.exit(main())
