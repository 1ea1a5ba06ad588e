"""``python -m faults``."""

import sys

from faults.table import main

sys.exit(main())
