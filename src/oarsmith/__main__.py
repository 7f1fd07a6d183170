"""``python -m oarsmith`` is the command ``oarsmith``."""

import sys

from oarsmith.cli import main

sys.exit(main())
