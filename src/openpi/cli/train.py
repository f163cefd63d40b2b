"""`openpi train NAME --exp-name=E ...`: trains a recipe.

Exit codes: 0 = done; 2 = bad command line; 1 = refused or failed; 130 or 143 = stopped by Ctrl-C or SIGTERM, with a
checkpoint of the last step: continue with `--resume`.
"""

from __future__ import annotations

import logging
import sys

from openpi.cli.console import configure_logging
from openpi.training.processor import split_processor

SUMMARY = "train a recipe"

_SIGNAL_EXIT = 128

logger = logging.getLogger("openpi")


def main(argv: list[str] | None = None) -> int:
    from openpi.training import config as _config

    config = _config.cli(argv, prog="openpi train")
    configure_logging()
    split_processor(config.cpu_devices)
    from openpi.training import loop

    loop.use_compilation_cache()
    try:
        result = loop.train(config)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        logger.debug("", exc_info=True)
        print(f"openpi train: {error}", file=sys.stderr)
        return 1
    if result.signum is not None:
        logger.warning("stopped after step %d; continue with --resume", result.step)
        return _SIGNAL_EXIT + result.signum
    logger.info("done; the checkpoint is in %s", result.checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
