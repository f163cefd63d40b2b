"""`scripts/serve_policy.py [--env ROBOT] [policy:checkpoint ...]`: the documented way to serve a policy."""

import sys

from openpi.cli.serving.serve_policy import main

if __name__ == "__main__":
    sys.exit(main())
