"""`scripts/compute_norm_stats.py --config-name NAME [--max-frames N]`: the documented entry point of `openpi stats`."""

import sys

from openpi.cli.data.stats import main

if __name__ == "__main__":
    sys.exit(main())
