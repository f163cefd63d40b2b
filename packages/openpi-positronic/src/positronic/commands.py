"""Running a command in configuronic's syntax: `--a.b=value`, values as Python literals, `@module.name`, `.name`."""

from __future__ import annotations

import contextlib
import importlib
import logging
import pkgutil
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import configuronic as cfn

if TYPE_CHECKING:
    from openpi_positronic.codecs.codec import Codec

logger = logging.getLogger(__name__)

_REFERENCE = re.compile(r"positronic(?:\.\w+)+")
# What Python says of a call, and what configuronic puts before it for a nested configuration.
_MISSING = re.compile(r"missing \d+ required \S+ arguments?: (.+)$")
_UNEXPECTED = re.compile(r"got an unexpected keyword argument")
_NESTED = re.compile(r'^Error instantiating "([\w.]+)"')

CommandTree = dict[str, "cfn.Config | CommandTree"]


def run(commands: cfn.Config | CommandTree) -> None:
    """Runs what the command line asks for, and exits: 0 = done, 1 = refused or failed, 130 = stopped by Ctrl-C."""
    from openpi.cli.console import configure_logging

    configure_logging()
    if (here := str(Path.cwd())) not in sys.path:  # where `@my_module.name` is looked for
        sys.path.append(here)
    try:
        cfn.cli(commands)
    except (
        ValueError,
        KeyError,
        OSError,
        ImportError,
        TypeError,
        AttributeError,
        RuntimeError,
        cfn.ConfigError,
    ) as error:
        logger.debug("", exc_info=True)
        explained = _explained(error)
        print(f"{_program()}: {explained}{_what_exists(explained)}{_flags(explained)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def finish(exit_code: int) -> None:
    """Ends a command that an openpi command did the work of."""
    if exit_code:
        raise SystemExit(exit_code)


def text(value: object) -> str:
    """What was typed: names of digits alone arrive as numbers."""
    return str(value)


def codec(value: Codec | str | None) -> Codec | None:
    """A configured codec, or one by openpi's names: `ee`, `my_codec.py:codec`, `package.module:codec`."""
    from openpi_positronic.codecs.catalog import get_codec

    return get_codec(value) if isinstance(value, str) else value


def refuse_text(**values: object) -> None:
    """Raises ValueError for a flag that was given a name, where only a configuration makes what is wanted."""
    for flag, value in values.items():
        if isinstance(value, str):
            dotted = f".{value}, with a dot," if value.isidentifier() else ".name"
            raise ValueError(
                f"{flag} is the text '{value}'; expected a configuration: {dotted} for one of Positronic's, "
                "@module.name for one of your own"
            )


def local_path(place: str) -> str:
    """A path of this machine: `~` expanded, and what is at a URL fetched."""
    from openpi.shared.download import maybe_download

    return str(maybe_download(text(place)))


@contextlib.contextmanager
def sent_output(place: str) -> Iterator[str]:
    """A folder to write small files to; those of a URL are sent there at the end, unless it fails."""
    from openpi.shared.upload import is_remote, upload_folder

    if not is_remote(text(place)):
        yield local_output(place)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder
        upload_folder(Path(folder), place)


@contextlib.contextmanager
def sent_recordings(place: str | None) -> Iterator[Path | None]:
    """A folder to record in. At the end, however it comes, what was recorded is sent to a URL, below a name of its own:
    recordings of several runs must not replace each other. They stay on this machine if that fails.
    """
    from openpi.shared.download import get_cache_dir
    from openpi.shared.upload import is_remote, upload_folder

    if place is None or not is_remote(text(place)):
        yield None if place is None else Path(text(place)).expanduser().absolute()
        return
    folder = get_cache_dir() / "recordings" / datetime.now(UTC).strftime("%Y%m%d_%H%M%S_%f")
    try:
        yield folder
    finally:
        if folder.exists():
            try:
                upload_folder(folder, f"{text(place).rstrip('/')}/{folder.name}")
            except (OSError, ImportError) as error:
                raise ConnectionError(f"{error}. The recordings are in {folder}") from error
            shutil.rmtree(folder)


def local_output(place: str) -> str:
    """A path of this machine to write to.

    Raises:
        ValueError: a URL.
    """
    from openpi.shared.upload import is_remote

    if is_remote(text(place)):
        raise ValueError(f"output_path is {place}; expected a folder of this machine. Copy what is in it afterwards")
    return str(Path(text(place)).expanduser().absolute())


def _explained(error: BaseException) -> str:
    """With what caused it, which configuronic leaves to the traceback."""
    caused_by = error.__cause__ if isinstance(error, cfn.ConfigError) else None
    if caused_by is None or str(caused_by) in str(error):
        return str(error)
    return f"{error}: {_explained(caused_by)}"


def _flags(message: str) -> str:
    """The flags that a call lacks, as they are typed."""
    if _UNEXPECTED.search(message):
        return "; --help lists the flags"
    missing = _MISSING.search(message)
    if missing is None:
        return ""
    nested = _NESTED.match(message)
    before = f"{nested[1]}." if nested else ""
    return "; give " + " ".join(f"--{before}{name}=..." for name in re.findall(r"'(\w+)'", missing[1]))


def _what_exists(message: str) -> str:
    """What there is in the module of Positronic's that a message says a name is missing from; else nothing."""
    if "no attribute" not in message and "Failed to resolve" not in message:
        return ""
    words = max(_REFERENCE.findall(message), key=len, default="").split(".")
    for count in range(len(words) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(words[:count]))
        except ImportError:
            continue
        names = [name for name, value in vars(module).items() if isinstance(value, cfn.Config)]
        names += [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", ()))]
        return f"; {module.__name__} has {', '.join(sorted(set(names)))}"
    return ""


def _program() -> str:
    return sys.argv[0].rpartition("/")[2]
