"""Log lines for people: coloured on a terminal, one plain line each in a file."""

import logging
import os


def configure_logging(level: int | None = None, *, process: int = 0) -> None:
    """Sets up the root logger; `OPENPI_LOG_LEVEL` overrides the level (default INFO).

    Args:
        process: of a run of several; all but the first log warnings and errors only, under their number.
    """
    import rich
    from rich.logging import RichHandler

    rich.reconfigure(stderr=True)
    default = "WARNING" if process else "INFO"
    level = level or logging.getLevelNamesMapping()[os.environ.get("OPENPI_LOG_LEVEL", default).upper()]
    number = f"[process {process}] " if process else ""
    if rich.get_console().is_terminal:
        handler: logging.Handler = RichHandler(show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter(f"{number}%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {number}%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for chatty in ("absl", "jax", "orbax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
