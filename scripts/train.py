"""`scripts/train.py CONFIG --exp-name=NAME ...`: the documented entry point of `openpi train`."""

import sys

from openpi.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
