"""`python -m adadiff` is the command `adadiff`."""

import sys

from adadiff_command import main

if __name__ == "__main__":
    sys.exit(main())
