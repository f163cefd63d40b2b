"""Files from elsewhere, fetched once: `$OPENPI_DATA_HOME` or `~/.cache/openpi`, then bucket and path.

<cache>/<bucket or host>/<path>       a file or folder, there only when all of it is there; of a URL with a query in
                                      a folder of its own
<cache>/hf/<org>/<repository>/...     a link into the Hugging Face cache
.<name>.partial-<version>/            beside a target: what there is of it; the next call continues
.openpi-part                          in a folder that was made for something inside it, and is not whole
.locks/                               one file for each target that was ever fetched
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from openpi.shared import hub, moved_modules, transfer
from openpi.shared.errors import closest_name, shown_url
from openpi.shared.locks import FileLock, HeldElsewhereError
from openpi.shared.remote import RefusedError, RemoteFile, find_files
from openpi.shared.remote.files import PART

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_PACKAGE = "package:"
_WITH_CREDENTIALS = ("gs", "gcs", "s3")  # where what is refused to everybody may be open to us


@dataclasses.dataclass(frozen=True)
class Found:
    """What a URL stands for, without fetching it.

    Attributes:
        path: where it is, or will be.
        is_here: it is on this machine, all of it.
        num_files, num_bytes: of it; None if not known.
    """

    path: Path
    is_here: bool
    num_files: int | None = None
    num_bytes: int | None = None


def get_cache_dir() -> Path:
    """The cache's root, which need not exist yet."""
    return Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser().resolve()


def cache_path(url: str) -> Path:
    """Where the cache keeps a URL: `<cache>/<bucket>/<path>`, and what is of the Hugging Face hub below `hf`.

    A query names other content: `get?id=1` and `get?id=2` are `<digest>/get`, each of its own.

    Raises:
        ValueError: the path would leave the cache, or have a login in it.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc and parts.scheme in ("http", "https"):
        raise ValueError(
            f"{shown_url(url)} comes with a login, which is not used here; expected a link that anybody may read, or "
            "one that is signed. Or download it by other means, and name the folder"
        )
    if ".." in parts.path.split("/"):
        raise ValueError(f"{shown_url(url)} has '..' in its path; write the path out")
    root = get_cache_dir() / "hf" if url.startswith(hub.SCHEME) else get_cache_dir()
    path = root / parts.netloc / parts.path.strip("/")
    behind = (parts.query, parts.fragment)  # which in buckets are parts of a name
    return path.parent / _digest(*behind) / path.name if any(behind) else path


def is_address(place: str) -> bool:
    """Whether it is a URL or `package:...`, and no path."""
    return "://" in place or place.startswith(_PACKAGE)


def maybe_download(url: str | Path, *, force_download: bool = False, **kwargs: object) -> Path:
    """A local path of a file or folder, downloaded if it is remote and not cached.

    A download appears under its name only when it is complete; one that was cut, or killed, is continued by the next
    call; a second process that wants the same, or something inside it, waits. Buckets are read anonymously first, and
    what is refused then with the credentials of this machine.

    Args:
        url: local path, `file://`, `https://`, a bucket (`gs://`, `s3://`), `hf://<org>/<repository>[@<revision>]
            [/<path>]`, or `package:<package>[/<path>]` for what lies inside an installed Python package.
            `$OPENPI_MIRROR` may put other places in its stead, see `mirrored`.
        force_download: fetch again even if cached.
        kwargs: per scheme, options for the fsspec file system, as in `gs={"token": "anon"}`.
    Raises:
        FileNotFoundError: nothing there.
        ConnectionError: not cached and not reachable, or refused; the message says where to put it by hand.
        ImportError: the scheme needs an extra that is not installed; it is named.
        OSError: no room on the disk, or a cache that cannot be written to.
    """
    url = str(url)
    here = _here(url)
    if here is not None and (not force_download or _is_local(url)):
        return here
    source, target = mirrored(url), cache_path(url)
    if _is_local(source):
        return _local(source)
    _check_online(url, target)
    try:
        with _locked(target):
            if force_download or not _is_whole(target):
                _fetch_whole(source, target, kwargs, force_download)
    except ConnectionError as error:
        raise ConnectionError(
            f"cannot download {_named(url, source)}: {error}. {_kept(target)}Without a network, put it at {target} by "
            "hand"
        ) from error
    except OSError as error:
        if error.errno is None:  # not of the disk
            raise
        where = f"; the cache is {get_cache_dir()}, OPENPI_DATA_HOME moves it"
        raise OSError(
            error.errno, f"cannot keep {shown_url(url)} here: {error.strerror}{where}", error.filename
        ) from error
    return target


def look_up(url: str | Path) -> Found:
    """What is here of a URL, and how much there is to fetch; errors as of `maybe_download`."""
    url = str(url)
    here = _here(url)
    if here is not None:
        files = [path for path in ([here] if here.is_file() else here.rglob("*")) if path.is_file()]
        return Found(here, True, len(files), sum(path.stat().st_size for path in files))
    source, target = mirrored(url), cache_path(url)
    if _is_local(source):
        return look_up(_local(source))
    _check_online(url, target)
    if source.startswith(hub.SCHEME):
        sizes = hub.sizes(source)
        return Found(target, False, len(sizes), sum(sizes))
    files = _with_access(source, {}, lambda options: find_files(source, options))
    return Found(target, False, len(files), transfer.total_size(files))


def mirrored(url: str) -> str:
    """The place to fetch a URL from: `$OPENPI_MIRROR` holds `<prefix>=<replacement>` pairs separated by commas.

    A prefix is a URL, or its beginning up to a slash; a replacement is a URL or a local folder, which is then used as
    it is, not copied. The longest prefix that fits decides; where a file is cached does not change.

    Raises:
        ValueError: the variable is malformed.
    """
    best, source = "", url
    for pair in filter(None, os.environ.get("OPENPI_MIRROR", "").split(",")):
        prefix, equals, replacement = (part.strip() for part in pair.partition("="))
        if not equals or "://" not in prefix or not replacement:
            raise ValueError(
                f"OPENPI_MIRROR has '{pair}'; expected <prefix>=<replacement>[,...], as in "
                "gs://openpi-assets=https://mirror.example.org/openpi-assets"
            )
        rest = url.removeprefix(prefix)
        fits = url.startswith(prefix) and (prefix.endswith("/") or rest[:1] in ("", "/"))
        if fits and len(prefix) > len(best):
            best, source = prefix, f"{replacement.rstrip('/')}/{rest.strip('/')}".rstrip("/")
    return source


def local_mirrors() -> list[Path]:
    """The folders of this machine that `$OPENPI_MIRROR` puts in the stead of URLs."""
    pairs = [pair.partition("=")[2].strip() for pair in os.environ.get("OPENPI_MIRROR", "").split(",")]
    return [Path(place.removeprefix("file://")).expanduser() for place in pairs if place and _is_local(place)]


def _here(url: str) -> Path | None:
    """Where it is on this machine; None if it has to be fetched."""
    if url.startswith(_PACKAGE):
        return _packaged(url)
    if _is_local(url):
        return _local(url)
    target = cache_path(url)
    return target if _is_whole(target) else None


def _is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def _local(url: str) -> Path:
    path = Path(url.removeprefix("file://")).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist (absolute: {path.absolute()}){_instead(path)}")
    return path.resolve()


def _instead(path: Path) -> str:
    """What there is instead: a name that is alike, or the steps of a run."""
    if ".py:" in str(path):
        return ". It looks like a recipe; name a checkpoint, which `openpi train` writes (or serve --dummy RECIPE)"
    if not path.parent.is_dir():
        return ""
    names = [entry.name for entry in path.parent.iterdir()]
    if steps := sorted((name for name in names if name.isdigit()), key=int):
        return f". There are the steps {', '.join(steps)}"
    closest = closest_name(path.name, names)
    return f". Did you mean '{closest}'?" if closest else ""


def _packaged(url: str) -> Path:
    package, _, inside = url.removeprefix(_PACKAGE).partition("/")
    if not package:
        raise FileNotFoundError(f"'{url}' names no package; expected package:<package>[/<path>]")
    folders = _package_folders(package)
    if not folders:
        hint = moved_modules.hint(package)
        raise FileNotFoundError(f"'{url}' names the package '{package}', which is not installed{hint}")
    places = [Path(os.path.normpath(folder / inside)) for folder in folders]  # links may lead to an installer's cache
    if not all(place.is_relative_to(folder) for place, folder in zip(places, folders, strict=True)):
        raise FileNotFoundError(f"'{url}' leads out of the package '{package}'; name a file inside it")
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise FileNotFoundError(f"'{url}' is not there: {places[0]} does not exist in the installed package")
    return found


def _package_folders(package: str) -> list[Path]:
    """Where a package lies, without importing it: its name may come from a file."""
    if not all(part.isidentifier() for part in package.split(".")):
        return []
    top, *below = (moved_modules.new_name(package) or package).split(".")
    spec = importlib.util.find_spec(top)
    places = [] if spec is None else spec.submodule_search_locations or []
    folders = [Path(place, *below).absolute() for place in places]
    return [folder for folder in folders if folder.is_dir()]


def is_offline() -> bool:
    """Whether nobody may be asked: `$OPENPI_OFFLINE`."""
    return os.environ.get("OPENPI_OFFLINE", "0") not in ("", "0")


def _check_online(url: str, target: Path) -> None:
    if is_offline():
        raise ConnectionError(
            f"{shown_url(url)} is not cached, and OPENPI_OFFLINE is set. Unset it, or put it at {target} by hand, as "
            f"`openpi fetch {shown_url(url)}` does where there is a network"
        )


def _is_whole(target: Path) -> bool:
    """Whether a file or folder was fetched as such, or put there by hand, not only for something inside it."""
    return target.exists() and not (target / PART).exists()


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Only we write `target`; nobody replaces a folder above it meanwhile. Locks are taken from the root downwards."""
    folders = [folder for folder in target.parents if folder.is_relative_to(get_cache_dir())][:-1]
    with contextlib.ExitStack() as stack:
        for folder in reversed(folders):
            stack.enter_context(_lock(folder, is_shared=True))
        stack.enter_context(_lock(target, is_shared=False))
        yield


@contextlib.contextmanager
def _lock(path: Path, *, is_shared: bool) -> Iterator[None]:
    locks = get_cache_dir() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{_digest(path.relative_to(get_cache_dir()))}.lock", is_shared=is_shared)
    try:
        lock.acquire(wait=False)
    except HeldElsewhereError as error:
        logger.info("waiting for another process that downloads %s (%s)", path, error.strerror)
        lock.acquire(wait=True)
    with lock:
        yield


def _digest(*values: object) -> str:
    return hashlib.sha256(repr([str(value) for value in values]).encode()).hexdigest()[:16]


def _make_parents(target: Path) -> None:
    """Creates the folders above a target, each marked as holding only a part of what is there remotely."""
    missing = []
    folder = target.parent
    while not folder.exists() and folder != get_cache_dir():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PART).touch()


def _fetch_whole(source: str, target: Path, options: Mapping[str, object], force_download: bool) -> None:
    if source.startswith(hub.SCHEME):
        found = hub.fetch(source, force_download=force_download)
        _make_parents(target)
        _replace(target, lambda: target.symlink_to(found))
        return
    _with_access(source, options, lambda given: _fetch_files(source, target, given, force_download))


def _with_access(source: str, options: Mapping[str, Any], use: Callable[[Mapping[str, object] | None], _T]) -> _T:
    """`use` with the options given for the scheme; else anonymously, and where that is refused with credentials."""
    scheme = urlsplit(source).scheme
    given = options.get(scheme)
    if scheme in ("gs", "gcs") and given == {"token": "anon"}:
        given = None  # the default, without gcsfs
    try:
        return use(given)
    except RefusedError as refused:
        if given is not None or scheme not in _WITH_CREDENTIALS:
            raise
        logger.info("%s is not public (%s); trying the credentials of this machine", shown_url(source), refused)
        return use({})


def _fetch_files(source: str, target: Path, options: Mapping[str, object] | None, force_download: bool) -> None:
    """Downloads beside the target, then renames; what there is when it fails is continued by the next call."""
    files = find_files(source, options)
    _make_parents(target)
    partial = target.with_name(_partial_name(target, _digest(*((f.name, f.size, f.version) for f in files))))
    for other in _partials(target):
        if other != partial:
            _remove(other)  # of another version; the lock says that nobody writes it now
    partial.mkdir(exist_ok=True)
    if not force_download:
        _reuse(files, target, partial)
    logger.info("downloading %s to %s", shown_url(source), target)
    try:
        transfer.fetch_files(files, partial, label=target.name)
        is_file = files[0].name == ""
        complete = transfer.local_path(files[0], partial) if is_file else partial
        _replace(target, lambda: complete.rename(target))
    finally:
        if partial.exists() and _num_bytes(partial) == 0:
            _remove(partial)


def _partial_name(target: Path, version: str) -> str:
    return f".{target.name}.partial-{version}"


def _partials(target: Path) -> list[Path]:
    """What there is of a target, of any version."""
    start = f".{target.name}.partial"
    return [path for path in target.parent.glob(".*.partial*") if path.name.startswith(start)]


def _reuse(files: Sequence[RemoteFile], target: Path, partial: Path) -> None:
    """Takes the files of a folder that were fetched before, for something inside it, if they are surely the same."""
    for file in files:
        have, wanted = target / file.name, transfer.local_path(file, partial)
        if file.name and have.is_file() and not wanted.exists() and transfer.is_same(file, have):
            wanted.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # no hard links here: it is fetched again
                os.link(have, wanted)


def _replace(target: Path, put: Callable[[], object]) -> None:
    """Gives a place a new content; what was there is gone last."""
    before = target.with_name(f".{target.name}.replaced")
    _remove(before)
    if target.exists() or target.is_symlink():
        target.rename(before)
    put()
    _remove(before)


def _named(url: str, source: str) -> str:
    return shown_url(url) if source == url else f"{shown_url(url)} from {shown_url(source)} (OPENPI_MIRROR)"


def _kept(target: Path) -> str:
    num_bytes = sum(_num_bytes(path) for path in _partials(target))
    return f"{transfer.as_text(num_bytes)} are kept, the next call continues. " if num_bytes else ""


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
