"""Public buckets of Google over their JSON API, without credentials and without Google's packages.

`STORAGE_EMULATOR_HOST` names another server of the same API, as for Google's own clients.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
from collections.abc import Iterator
from urllib.parse import quote, urlencode, urlsplit

from openpi.shared.remote.files import RemoteFile
from openpi.shared.remote.http_files import open_at, request
from openpi.shared.strict_json import Json

_GOOGLE = "https://storage.googleapis.com"
_MISSING = (404, 410)


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
        raise FileNotFoundError(f"{url} does not exist")
    return [_file(objects, item, item["name"].removeprefix(prefix)) for item in items]


def _endpoint() -> str:
    host = os.environ.get("STORAGE_EMULATOR_HOST")
    if not host:
        return _GOOGLE
    return (host if "://" in host else f"http://{host}").rstrip("/")


def _listing(objects: str, prefix: str) -> Iterator[Json]:
    query = {"prefix": prefix, "fields": "items(name,size,generation,md5Hash),nextPageToken"}
    while True:
        page = _json(f"{objects}?{urlencode(query)}")
        yield from page.get("items", ())
        if "nextPageToken" not in page:
            return
        query["pageToken"] = page["nextPageToken"]


def _json(url: str) -> Json:
    response = request(url, none_for=_MISSING)
    if response is None:
        raise FileNotFoundError(f"{url} does not exist")
    with response:
        return json.load(response)


def _file(objects: str, item: Json, name: str) -> RemoteFile:
    """The object at one generation: if it is overwritten meanwhile, the transfer fails rather than mixes."""
    generation = str(item["generation"])
    query = urlencode({"alt": "media", "generation": generation})
    media = f"{objects}/{quote(item['name'], safe='')}?{query}"
    md5 = base64.b64decode(item["md5Hash"]) if "md5Hash" in item else None  # composed objects have none
    return RemoteFile(name, int(item["size"]), generation, functools.partial(open_at, media, None), md5)
