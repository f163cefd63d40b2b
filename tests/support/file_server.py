"""Web servers that misbehave as they are told: cut connections, ignore ranges, lie about lengths."""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from typing import TypeVar
from urllib.parse import parse_qs, quote, unquote, urlsplit


@dataclasses.dataclass
class FileServer:
    """What is served, and how; tests change it while it runs.

    Attributes:
        files: content by path.
        cuts: bytes after which the next replies with content end, one each; later ones are whole.
        has_ranges, has_versions, has_head: whether the server knows them.
        extra_claimed: added to every announced length.
        is_damaging: content arrives with its first byte changed.
        held: the path whose content stops halfway until `release` is set; `is_held` says that it does.
        requests: `METHOD path`, and `from N` where not from the first byte, of every request so far.
    """

    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    cuts: list[int] = dataclasses.field(default_factory=list)
    has_ranges: bool = True
    has_versions: bool = True
    has_head: bool = True
    extra_claimed: int = 0
    is_damaging: bool = False
    held: str = ""
    release: threading.Event = dataclasses.field(default_factory=threading.Event)
    is_held: threading.Event = dataclasses.field(default_factory=threading.Event)
    requests: list[str] = dataclasses.field(default_factory=list)
    url: str = ""

    def reply(self, request: "_Request") -> None:
        """A file, or the listing of a folder."""
        path = unquote(urlsplit(request.path).path)
        below = {file.removeprefix(path).partition("/")[::2] for file in self.files if file.startswith(path)}
        if path in self.files:
            request.send_content(self.files[path])
        elif not below:
            request.send_error(404)
        elif not path.endswith("/"):
            request.send_response(301)
            request.send_header("Location", quote(path) + "/")
            request.send_header("Content-Length", "0")
            request.end_headers()
        else:
            names = sorted({name + ("/" if rest else "") for name, rest in below})
            links = "".join(f'<a href="{quote(name)}">{name}</a>' for name in ["../", *names])
            request.send("text/html", f"<html><a href='?C=N'>Name</a>{links}</html>".encode())


@dataclasses.dataclass
class GoogleServer(FileServer):
    """The few calls of Google's storage API (JSON, v1) that reading takes; `files` are `/<bucket>/<name>`.

    Attributes:
        private: buckets that refuse anonymous callers.
        page_size: objects in one answer to a listing.
    """

    private: tuple[str, ...] = ()
    page_size: int = 2

    def reply(self, request: "_Request") -> None:
        url = urlsplit(request.path)
        bucket, _, name = url.path.removeprefix("/storage/v1/b/").partition("/o")
        name, query = unquote(name.removeprefix("/")), parse_qs(url.query)
        if bucket in self.private:
            request.send_json(401, {"error": {"code": 401, "message": "Anonymous caller does not have access"}})
        elif not name:
            request.send_json(200, self._page(bucket, query))
        elif f"/{bucket}/{name}" not in self.files:
            request.send_json(404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}})
        elif query.get("alt") == ["media"]:
            assert query["generation"] == [self._object(bucket, name)["generation"]]
            request.send_content(self.files[f"/{bucket}/{name}"])
        else:
            request.send_json(200, self._object(bucket, name))

    def _page(self, bucket: str, query: dict[str, list[str]]) -> dict:
        start, prefix = int(query.get("pageToken", ["0"])[0]), query["prefix"][0]
        paths = sorted(path for path in self.files if path.startswith(f"/{bucket}/{prefix}"))
        end = start + self.page_size
        items = [self._object(bucket, path.removeprefix(f"/{bucket}/")) for path in paths[start:end]]
        return (
            {"kind": "storage#objects"}
            | ({"items": items} if items else {})
            | ({"nextPageToken": str(end)} if end < len(paths) else {})
        )

    def _object(self, bucket: str, name: str) -> dict[str, str]:
        digest = hashlib.md5(self.files[f"/{bucket}/{name}"])
        return {
            "kind": "storage#object",
            "name": name,
            "size": str(len(self.files[f"/{bucket}/{name}"])),
            "generation": str(int(digest.hexdigest()[:12], 16)),
            "md5Hash": base64.b64encode(digest.digest()).decode(),
        }


@dataclasses.dataclass
class HubServer(FileServer):
    """The few calls of the Hugging Face hub that reading takes; `files` are `/[datasets/]<org>/<repository>/<name>`.

    Attributes:
        commits: branch or tag -> commit, of every repository.
        missing: files that are listed and cannot be had.
    """

    commits: dict[str, str] = dataclasses.field(default_factory=lambda: {"main": "a" * 40})
    missing: set[str] = dataclasses.field(default_factory=set)

    def reply(self, request: "_Request") -> None:
        path = unquote(urlsplit(request.path).path)
        if path.startswith(("/api/models/", "/api/datasets/")):
            kind, org, name, *rest = path.removeprefix("/api/").split("/")
            call, revision = (rest + ["revision", "main"][len(rest) :])[:2]
            below = f"/{org}/{name}/" if kind == "models" else f"/{kind}/{org}/{name}/"
            self._answer(request, below, call, revision)
            return
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        commit, content = self._commit(revision), self.files.get(f"{repo}/{name}")
        if commit is None or content is None or f"{repo}/{name}" in self.missing:
            request.send_error(404)
        else:
            request.send_content(content, {"X-Repo-Commit": commit})

    def _answer(self, request: "_Request", below: str, call: str, revision: str) -> None:
        commit, names = self._commit(revision), [path for path in self.files if path.startswith(below)]
        if commit is None or not names:
            error = "RevisionNotFound" if names else "RepoNotFound"
            request.send("application/json", b"{}", 404, {"X-Error-Code": error})
        elif call == "refs":
            tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": self.commits[tag]} for tag in self.commits]
            request.send_json(200, {"branches": [], "converts": [], "tags": tags})
        elif call == "tree":
            entries = [self._entry("path", below, path) | {"type": "file"} for path in names]
            request.send_json(200, entries)
        else:
            siblings = [self._entry("rfilename", below, path) for path in names]
            request.send_json(200, {"id": below.strip("/"), "sha": commit, "siblings": siblings})

    def _entry(self, key: str, below: str, path: str) -> dict[str, object]:
        content = self.files[path]
        blob = {"oid": hashlib.md5(content).hexdigest(), "blobId": hashlib.md5(content).hexdigest()}
        return {key: path.removeprefix(below), "size": len(content)} | blob

    def _commit(self, revision: str) -> str | None:
        return revision if revision in self.commits.values() else self.commits.get(revision)


Server = TypeVar("Server", bound=FileServer)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Serves on a free port of this machine."""
    handler = type("Handler", (_Request,), {"served": server})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        server.url = f"http://127.0.0.1:{httpd.server_port}"
        yield server
        server.release.set()
        httpd.shutdown()
        thread.join()


class _Request(http.server.BaseHTTPRequestHandler):
    served: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        start = self._start()
        self.served.requests.append(f"{self.command} {self.path}" + (f" from {start}" if start else ""))
        self.served.reply(self)

    def do_HEAD(self) -> None:
        if self.served.has_head:
            self.do_GET()
        else:
            self.send_error(501)

    def send_json(self, status: int, value: object) -> None:
        self.send("application/json", json.dumps(value).encode(), status)

    def send(self, kind: str, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_content(self, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Honours `Range`, if the server does."""
        version = f'"{hashlib.md5(content).hexdigest()}"'
        start = self._start() if self.served.has_ranges else 0
        self.send_response(206 if start else 200)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.served.has_versions:
            self.send_header("ETag", version)
        self.send_header("Content-Length", str(len(content) - start + self.served.extra_claimed))
        self.end_headers()
        if self.command == "HEAD":
            return
        end = len(content)
        if self.served.is_damaging:
            content = bytes([content[0] ^ 1]) + content[1:]
        if self.served.cuts:
            end = start + self.served.cuts.pop(0)
        if self.path == self.served.held and not self.served.release.is_set():
            self.wfile.write(content[start : end // 2])
            self.served.is_held.set()
            self.served.release.wait()
            start = end // 2
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[start:end])
        self.close_connection = self.close_connection or end < len(content) or self.served.extra_claimed != 0

    def _start(self) -> int:
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))

    def log_message(self, format: str, *args: object) -> None:
        pass
