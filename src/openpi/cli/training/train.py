"""`openpi train NAME --exp-name=E ...`: trains a recipe, in one process or as one of several.

`openpi train NAME --plan ...` trains nothing: it says how much memory that would need.

Exit codes: 0 = done; 2 = bad command line; 1 = refused or failed; 130 or 143 = stopped by Ctrl-C or SIGTERM (or 128
and the number of another signal), with a checkpoint of the last step: continue with `--resume`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING

from openpi.cli.console import configure_logging, help_ends_with
from openpi.shared import frameworks
from openpi.shared.errors import with_notes
from openpi.training.distributed.launch import Launch, find_launch, flags_help, split_flags

if TYPE_CHECKING:
    from openpi.training.config import TrainConfig
    from openpi.training.loop import TrainResult

_SIGNAL_EXIT = 128

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    from openpi.training import config as _config

    argv = sys.argv[1:] if argv is None else list(argv)
    if "--plan" in argv:
        return _plan([arg for arg in argv if arg != "--plan"])
    flags, argv = split_flags(argv)
    several = f"A run of several processes is told so in each of them, by flags or variables:\n{flags_help()}"
    with help_ends_with(argv, several):
        config = _config.cli(argv, prog="openpi train")
    try:
        launch = find_launch(flags, os.environ)
    except ValueError as error:
        print(f"openpi train: {error}", file=sys.stderr)
        return 2
    configure_logging(process=launch.process_id if launch else 0)
    if config.resume:
        try:
            config = _as_started(config, argv)
        except ValueError as error:
            print(f"openpi train: {error}", file=sys.stderr)
            return 2
    frameworks.split_processor(config.cpu_devices)
    frameworks.wait_asleep()
    from openpi.training.distributed import processes

    exit_code = 1
    try:
        exit_code = _train(config, launch)
    except KeyboardInterrupt:  # the second: the first is waited for
        print(
            "openpi train: left at once; --resume continues from the last checkpoint, if there is one", file=sys.stderr
        )
        exit_code = _SIGNAL_EXIT + signal.SIGINT
    except Exception:
        traceback.print_exc()
    finally:
        processes.end(exit_code)
        _leave_threads_behind(exit_code)
    return exit_code


def _as_started(config: TrainConfig, argv: list[str]) -> TrainConfig:
    """The recipe of the run that is to be continued, with the flags of this command."""
    from openpi.training import config as _config
    from openpi.training.recipe import overrides
    from openpi.training.run import resume

    own = resume.with_own_values(_config.get_config(argv[0]), config)
    return overrides.parse(own, argv[1:], prog=f"openpi train {argv[0]}")


def _leave_threads_behind(exit_code: int) -> None:
    """A thread that is stuck in reading data cannot be ended, and Python would wait for it for ever."""
    from openpi.data.batch_loader import has_stuck_threads

    if has_stuck_threads():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def run(config: TrainConfig) -> TrainResult:
    """Trains a recipe in this process, for a program of one's own: `main(config)` of `scripts/train.py`.

    Args:
        config: a `TrainConfig`, or a program's own copy of the published one.
    Raises:
        ImportError, ValueError, FileNotFoundError, FileExistsError, OSError: see `openpi.training.loop.train`.
    """
    if not logging.getLogger().handlers:  # the program's own stay
        configure_logging()
    from openpi.training.recipe.adopted import as_recipe

    config = as_recipe(config)
    _prepare(config)
    from openpi.training import loop

    return loop.train(config)


def _prepare(config: TrainConfig) -> None:
    """Before the first use of JAX, as far as that is still to come."""
    if config.backend != "jax":  # should a recipe's own code import it: it would take most of a GPU's memory
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    frameworks.use_compilation_cache()


def _train(config: TrainConfig, launch: Launch | None) -> int:
    _prepare(config)
    from openpi.training import loop
    from openpi.training.distributed import processes

    try:
        processes.start(launch, config.backend)
        result = loop.train(config)
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        logger.debug("", exc_info=True)
        print(f"openpi train: {with_notes(error)}", file=sys.stderr)
        return 1
    if result.signum is not None:
        if result.checkpoint is None:
            logger.warning("stopped before the first step; there is nothing to continue")
        else:
            logger.warning("stopped after step %d; continue with --resume", result.step)
        return _SIGNAL_EXIT + result.signum
    logger.info("done; the checkpoint is in %s", result.checkpoint)
    return 0


def _plan(argv: list[str]) -> int:
    from openpi.training import config as _config

    config = _config.cli(argv, prog="openpi train")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves the memory to whoever is training
    try:
        frameworks.require("jax", "--plan")
        from openpi.training.backends.jax import plan

        for line in plan.report(config, config.fsdp_devices):
            print(line, flush=True)
    except (ValueError, ImportError, RuntimeError) as error:  # the last of JAX: the device is in use
        print(f"openpi train: {error}", file=sys.stderr)
        return 1
    return 0
