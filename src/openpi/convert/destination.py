"""A dataset written to a URL: made on this machine, and sent when it is complete.

<cache>/outgoing/<digest>/<name>       being made
<cache>/outgoing/<digest>/complete     a link to it when it is made; an upload that failed is repeated from it
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from openpi.convert.engine import convert
from openpi.convert.episode_work import Options
from openpi.convert.source import Source
from openpi.shared.download import cache_path, get_cache_dir, maybe_download
from openpi.shared.pools import Pool
from openpi.shared.remote import find_files
from openpi.shared.strict_json import Json
from openpi.shared.upload import is_remote, upload_folder

logger = logging.getLogger(__name__)

_LAST = "meta/info.json"  # what a dataset is known by
_COMPLETE = "complete"


def convert_to(
    output: str,
    source: Source,
    options: Options,
    *,
    pool: Pool,
    overwrite: bool = False,
    append: bool = False,
    repeat: bool = False,
    skip_unusable: bool = False,
    filesystem: Mapping[str, object] | None = None,
) -> None:
    """Converts into a folder or to a URL; arguments and errors are those of `engine.convert` and `write_to`."""
    choices: Json = {"overwrite": overwrite, "append": append, "repeat": repeat, "skip_unusable": skip_unusable}
    names = [ref.name for ref in source.episodes()] if is_remote(output) else []
    write_to(
        output,
        lambda folder: convert(source, folder, options, pool=pool, **choices),
        key=repr((source, names, options, choices)),
        append=append,
        options=filesystem,
    )
    logger.info("written: %s", output)


def write_to(
    output: str,
    write: Callable[[Path], object],
    *,
    key: str,
    append: bool = False,
    options: Mapping[str, object] | None = None,
) -> None:
    """Calls `write` with a local folder, and sends that if `output` is a URL.

    Args:
        key: what the result depends on; an upload that failed is repeated for the same one only.
        append: fetch what is there first; only files that are new or changed are sent.
        options: of the file system of `output`.
    Raises:
        FileExistsError: there is something at the URL, and not `append`.
        ConnectionError: it cannot be sent; the dataset is kept, and the next call sends it.
    """
    if not is_remote(output):
        write(Path(output.removeprefix("file://")).expanduser())
        return
    outgoing = get_cache_dir() / "outgoing" / hashlib.sha256(repr((output, key, append)).encode()).hexdigest()[:20]
    made, complete = outgoing / Path(output).name, outgoing / _COMPLETE
    if not complete.exists():
        before = _fetched(output, options) if append else _nothing_at(output, options)
        outgoing.mkdir(parents=True, exist_ok=True)
        if before is not None:
            shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(before, made, copy_function=os.link)
        write(made)
        complete.symlink_to(made.name)
    else:
        logger.info("the dataset is complete since the last run, and was not sent: %s", made)
    fetched = cache_path(output)
    same = {path.relative_to(made) for path in made.rglob("*") if path.is_file() and _is_same(path, made, fetched)}
    upload_folder(made, output, skip=same, last=_LAST, options=options)
    shutil.rmtree(outgoing)
    shutil.rmtree(fetched, ignore_errors=True)  # no longer what is there


def _is_same(path: Path, made: Path, fetched: Path) -> bool:
    """Whether a file was fetched, and not written since: it is a link to it."""
    source = fetched / path.relative_to(made)
    return source.exists() and source.samefile(path)


def _fetched(url: str, options: Mapping[str, object] | None) -> Path:
    given = {} if options is None else {url.partition("://")[0]: options}
    return maybe_download(url, force_download=True, **given)


def _nothing_at(url: str, options: Mapping[str, object] | None) -> None:
    try:
        files = find_files(url, options or {})
    except FileNotFoundError:
        return
    raise FileExistsError(f"{url} holds {len(files)} files; choose another place, append, or remove them first")
