"""`scripts/train.py CONFIG --exp-name=NAME ...`: the documented entry point of `openpi train`.

Programs call `main(config)`, with a recipe that they have found by `openpi.training.config.get_config`, or made.
"""

import sys

from openpi.cli.training import train

main = train.run

if __name__ == "__main__":
    sys.exit(train.main())
