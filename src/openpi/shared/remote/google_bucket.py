"""Public buckets of Google over their JSON API, without credentials and without Google's packages.

`STORAGE_EMULATOR_HOST` names another server of the same API, as for Google's own clients.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
from collections.abc import Iterator
from urllib.parse import quote, urlencode, urlsplit

from openpi.shared import strict_json
from openpi.shared.errors import first_line, shown_url
from openpi.shared.remote.files import RemoteFile
from openpi.shared.remote.http_files import open_at, request
from openpi.shared.remote.listings import check_count, read_page
from openpi.shared.strict_json import Json

_GOOGLE = "https://storage.googleapis.com"
_MISSING = (404, 410)
_MAX_EMPTY_PAGES = 100  # of a listing


def google_files(url: str) -> list[RemoteFile]:
    """The object at `gs://<bucket>/<path>`, or all below it; read anonymously."""
    bucket, path = urlsplit(url).netloc, urlsplit(url).path.strip("/")
    objects = f"{_endpoint()}/storage/v1/b/{bucket}/o"
    if path and not url.endswith("/"):
        with contextlib.suppress(FileNotFoundError):
            return [_file(objects, _json(f"{objects}/{quote(path, safe='')}"), name="")]
    prefix = f"{path}/" if path else ""
    items = [item for item in _listing(objects, prefix) if not item["name"].endswith("/")]
    if not items:
        raise FileNotFoundError(f"{shown_url(url)} does not exist")
    return [_file(objects, item, item["name"].removeprefix(prefix)) for item in items]


def _endpoint() -> str:
    host = os.environ.get("STORAGE_EMULATOR_HOST")
    if not host:
        return _GOOGLE
    return (host if "://" in host else f"http://{host}").rstrip("/")


def _listing(objects: str, prefix: str) -> Iterator[Json]:
    query = {"prefix": prefix, "fields": "items(name,size,generation,md5Hash),nextPageToken"}
    count = empty_pages = 0
    while True:
        page = _json(f"{objects}?{urlencode(query)}")
        with _as_documented(objects):
            items, token = [*page.get("items", ())], str(page.get("nextPageToken", ""))
            if not all(item["name"].startswith(prefix) for item in items):
                raise ValueError("an object that was not asked for")
        yield from items
        count, empty_pages = count + len(items), empty_pages + (not items)
        check_count(objects, count)
        if not token:
            return
        if token == query.get("pageToken") or empty_pages > _MAX_EMPTY_PAGES:
            raise ConnectionError(f"the listing of {shown_url(objects)} has no end")
        query["pageToken"] = token


def _json(url: str) -> Json:
    response = request(url, none_for=_MISSING)
    if response is None:
        raise FileNotFoundError(f"{shown_url(url)} does not exist")
    with response:
        content = read_page(response)
    with _as_documented(url):
        document = strict_json.parse(content)
        if not isinstance(document, dict):
            raise ValueError(f"{type(document).__name__} instead of an object")
        return document


@contextlib.contextmanager
def _as_documented(url: str) -> Iterator[None]:
    """What stands at the address need not be Google's, or a mirror's."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ConnectionError(f"{shown_url(url)} does not answer as Google's storage does: {what}") from error


def _file(objects: str, item: Json, name: str) -> RemoteFile:
    """The object at one generation: if it is overwritten meanwhile, the transfer fails rather than mixes."""
    with _as_documented(objects):
        return _remote_file(objects, item, name)


def _remote_file(objects: str, item: Json, name: str) -> RemoteFile:
    generation = str(item["generation"])
    query = urlencode({"alt": "media", "generation": generation})
    media = f"{objects}/{quote(item['name'], safe='')}?{query}"
    md5 = base64.b64decode(item["md5Hash"], validate=True) if "md5Hash" in item else None  # composed objects have none
    if (size := int(item["size"])) < 0:
        raise ValueError(f"an object of {size} bytes")
    return RemoteFile(name, size, generation, functools.partial(open_at, media, None), md5)
