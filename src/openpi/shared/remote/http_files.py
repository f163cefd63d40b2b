"""Files of web servers; folders where the server lists them, as nginx, Apache and `python -m http.server` do."""

from __future__ import annotations

import contextlib
import functools
import html.parser
import http.client
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from openpi.shared.errors import first_line, printable, shown_url
from openpi.shared.remote.files import NUM_CONNECTIONS, Body, CutError, RefusedError, RemoteFile
from openpi.shared.remote.listings import MAX_DEPTH, check_count, read_page

if TYPE_CHECKING:
    from http.client import HTTPResponse


TIMEOUT_S = 60  # without any byte

_CHUNK_BYTES = 1 << 20
_MAX_REASON = 80  # of what a server says about its status
_REFUSED, _NO_SUCH_RANGE = (401, 403), (416,)
_NO_HEAD = (403, 405, 501)  # servers without the method; signed links are signed for GET only
_PASSING = (408, 429)  # and all from 500 on


def http_files(url: str) -> list[RemoteFile]:
    """A file, or what the listings of a folder lead to."""
    base, is_folder, file = _probe(url, name="")
    if not is_folder:
        return [file]
    links = list(_links_below(base))
    with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
        probed = pool.map(lambda link: _probe(link, unquote(link.removeprefix(base)))[2], links)
        return list(probed)


def _probe(url: str, name: str) -> tuple[str, bool, RemoteFile]:
    """Asks for everything but the content: the address after redirects, whether it is a folder's listing, the file."""
    response = request(url, method="HEAD", none_for=_NO_HEAD) or request(url)  # its body is not read
    with response:
        is_folder = response.url.endswith("/") and response.headers.get_content_type() == "text/html"
        version = _version(response)
        file = RemoteFile(name, _length(response), version, functools.partial(open_at, url, version))
        return response.url, is_folder, file


@contextlib.contextmanager
def open_at(url: str, version: str | None, start: int) -> Iterator[Body]:
    """The content from a byte on, or from its start where the server has no ranges or another version.

    Args:
        version: None = the URL names it, or it is not known.
    """
    # None: it has become shorter.
    response = request(url, {"Range": f"bytes={start}-"} if start else {}, none_for=_NO_SUCH_RANGE) or request(url)
    if response.status == http.client.PARTIAL_CONTENT and not _continues(response, start, version):
        response.close()
        response = request(url)
    with response:
        begin = start if response.status == http.client.PARTIAL_CONTENT else 0
        length = _length(response)
        if length is None and response.headers.get("Transfer-Encoding") is None:
            raise ConnectionError(f"{shown_url(url)} comes without a length, so that a cut could not be noticed")
        yield Body(begin, None if length is None else begin + length, _chunks(response))


def _continues(response: HTTPResponse, start: int, version: str | None) -> bool:
    says = response.headers.get("Content-Range", "")
    return says.startswith(f"bytes {start}-") and (version is None or _version(response) in (None, version))


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read(_CHUNK_BYTES):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise CutError(f"{type(error).__name__}: {first_line(error)}") from error


def request(
    url: str, headers: Mapping[str, str] | None = None, method: str = "GET", none_for: Collection[int] = ()
) -> Any:
    """The reply, after redirects, its body unread; None if its status is one of `none_for`.

    Raises:
        RefusedError: it is not for us.
        CutError: no answer, or one that will be another later.
        ConnectionError: the server has nothing there.
    """
    question = urllib.request.Request(url, headers={"User-Agent": "openpi", **(headers or {})}, method=method)
    try:
        return urllib.request.urlopen(question, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in none_for:
            return None
        passes = error.code in _PASSING or error.code >= http.client.INTERNAL_SERVER_ERROR
        kind = RefusedError if error.code in _REFUSED else CutError if passes else ConnectionError
        raise kind(f"HTTP {error.code} {printable(str(error.reason))[:_MAX_REASON]} from {shown_url(url)}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise CutError(f"no answer from {urlsplit(url).netloc}: {reason}") from error


def _version(response: HTTPResponse) -> str | None:
    """Equal only for equal bytes, or as nearly so as the server knows: a strong ETag or a date."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _length(response: HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length")
    if length is None:
        return None
    if not (length.isascii() and length.isdigit()):
        raise ConnectionError(f"{shown_url(response.url)} announces {length[:80]!r} bytes")
    return int(length)


def _links_below(folder: str) -> Iterator[str]:
    """Every file below a folder, through the listings of its sub-folders.

    Raises:
        ConnectionError: there is no end to them.
    """
    folders, count = [folder], 0
    while folders:
        current = folders.pop()
        if current.removeprefix(folder).count("/") > MAX_DEPTH:
            raise ConnectionError(
                f"{shown_url(folder)} lists folders in folders in folders, as {shown_url(current)[:200]}"
            )
        below = _links_in(current)
        folders += [link for link in reversed(below) if link.endswith("/")]
        files = [link for link in below if not link.endswith("/")]
        count += len(below)
        check_count(folder, count)
        yield from files


def _links_in(folder: str) -> list[str]:
    with request(folder) as response:
        parser = _LinkParser()
        parser.feed(read_page(response).decode(errors="replace"))
    links = {urldefrag(urljoin(folder, href)).url.partition("?")[0] for href in parser.hrefs}
    return sorted(link for link in links if link.startswith(folder) and link != folder)


class _LinkParser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value]
