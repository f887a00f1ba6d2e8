"""``python -m ltkernels``: the same as the command ``ltkernels``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
