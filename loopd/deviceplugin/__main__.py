"""``python -m loopd.deviceplugin``."""

import sys

from loopd.deviceplugin import main

sys.exit(main())
