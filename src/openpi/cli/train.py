"""`openpi train NAME --exp-name=E ...`: trains a recipe.

Exit codes: 0 = done; 2 = bad command line; 1 = refused or failed; 130 or 143 = stopped by Ctrl-C or SIGTERM, with a
checkpoint of the last step: continue with `--resume`.
"""

from __future__ import annotations

import logging
import os
import sys

from openpi.cli.console import configure_logging

SUMMARY = "train a recipe"

_SIGNAL_EXIT = 128

logger = logging.getLogger("openpi")


def main(argv: list[str] | None = None) -> int:
    from openpi.training import config as _config

    config = _config.cli(argv, prog="openpi train")
    configure_logging()
    _split_processor(config.cpu_devices)
    from openpi.training import loop

    loop.use_compilation_cache()
    try:
        result = loop.train(config)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        logger.debug("", exc_info=True)
        print(f"openpi train: {error}", file=sys.stderr)
        return 1
    if result.signum is not None:
        logger.warning("stopped after step %d; continue with --resume", result.step)
        return _SIGNAL_EXIT + result.signum
    logger.info("done; the checkpoint is in %s", result.checkpoint)
    return 0


def _split_processor(parts: int) -> None:
    """Has to come before JAX starts. Accelerators are not affected; flags that the user set win.

    XLA shares only matrix products between cores; whole steps on parts of the batch share everything. Measured on two
    cores with the 1.5 M parameter model: 0.62 s per step as one device, 0.34 s as two.
    """
    if parts > 1:
        flags = f"--xla_force_host_platform_device_count={parts} --xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}".strip()


if __name__ == "__main__":
    sys.exit(main())
