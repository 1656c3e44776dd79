"""`python -m prescope`: the same as the console script `prescope`."""

import sys

from prescope.cli import main

sys.exit(main())
