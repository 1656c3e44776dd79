"""`python -m prescope`: the same as the console script `prescope`."""

import sys

from prescope.cli import main

if __name__ == "__main__":  # the processes of a sweep import this file too
    sys.exit(main())
