"""`openpi dataset view DATASET`: a page on this machine, episode by episode: pictures, signals, actions, findings.

Pictures are decoded by the reader that training uses, frame by frame, so that what is seen is what a model gets,
whatever the codec. The page asks for nothing from elsewhere, and the server answers this machine only.
"""

from __future__ import annotations

import importlib.resources
import io
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from openpi.data.lerobot.features import INDEX_FEATURES, dimension_names

if TYPE_CHECKING:
    from openpi.data.check.findings import Finding
    from openpi.data.lerobot.reader import LeRobotDataset

HOST = "127.0.0.1"
_POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "frame-ancestors 'none'"
)
_JPEG_QUALITY = 88
_MOST_DIMENSIONS = 64  # of a vector; wider ones are tactile pictures and the like
Answer = tuple[HTTPStatus, str, bytes]
_NONE: Answer = (HTTPStatus.NOT_FOUND, "text/plain", b"there is no such page")


class Pages:
    """What the server answers, without sockets.

    Args:
        findings: of `openpi dataset check`.
    """

    def __init__(self, dataset: LeRobotDataset, findings: Sequence[Finding]):
        self._dataset = dataset
        self._findings = findings
        metadata = dataset.metadata
        self._vectors = [
            key
            for key in metadata.column_keys
            if key not in INDEX_FEATURES
            and metadata.features[key]["dtype"] != "string"
            and int(np.prod(metadata.features[key]["shape"])) <= _MOST_DIMENSIONS
        ]

    def get(self, path: str) -> Answer:
        """The answer to a path of a URL."""
        if path == "/":
            return HTTPStatus.OK, "text/html; charset=utf-8", page().encode()
        if path == "/dataset.json":
            return _json(self._overview())
        if (match := re.fullmatch(r"/episode/(\d{1,9})\.json", path)) and self._has(position := int(match[1])):
            return _json(self._episode(position))
        if match := re.fullmatch(r"/frame/(\d{1,9})/(\d{1,9})/(\d{1,9})\.jpg", path):
            return self._frame(*map(int, match.groups()))
        return _NONE

    def _has(self, position: int) -> bool:
        return position < len(self._dataset.episodes)

    def _overview(self) -> dict[str, Any]:
        metadata = self._dataset.metadata
        codes: dict[int, set[str]] = {}
        for finding in self._findings:
            if finding.episode is not None:
                codes.setdefault(finding.episode, set()).add(finding.code)
        episodes = [
            {"index": each.index, "length": each.length, "codes": sorted(codes.get(each.index, ()))}
            for each in self._dataset.episodes
        ]
        return {
            "name": metadata.root.name,
            "fps": metadata.fps,
            "cameras": list(metadata.camera_keys),
            "episodes": episodes,
        }

    def _episode(self, position: int) -> dict[str, Any]:
        episode = self._dataset.episodes[position]
        begin, end = self._dataset.episode_bounds[position]
        tasks = dict.fromkeys(self._dataset.column("task_index")[begin:end].tolist())
        found = [f for f in self._findings if f.episode in (None, episode.index)]
        return {
            "length": episode.length,
            "tasks": [self._dataset.metadata.tasks[index] for index in tasks],
            "findings": [f.to_json() | {"place": f.place or "the dataset"} for f in found],
            "signals": [self._signal(key, slice(begin, end)) for key in self._vectors],
        }

    def _signal(self, key: str, rows: slice) -> dict[str, Any]:
        values = self._dataset.column(key)[rows].astype(np.float64)
        values = values.reshape(len(values), -1).T
        names = dimension_names(self._dataset.metadata.features[key])
        names = names if len(names) == len(values) else tuple(map(str, range(len(values))))
        told = [[round(v, 6) if np.isfinite(v) else None for v in row] for row in values.tolist()]
        return {"key": key, "names": list(names), "values": told}

    def _frame(self, camera: int, position: int, number: int) -> Answer:
        keys = self._dataset.metadata.camera_keys
        if camera >= len(keys) or not self._has(position) or number >= self._dataset.episodes[position].length:
            return _NONE
        try:
            [frame] = self._dataset.camera_frames(keys[camera], position, [number])
        except (ValueError, OSError) as error:
            return HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", str(error).encode()
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "jpeg", quality=_JPEG_QUALITY)
        return HTTPStatus.OK, "image/jpeg", buffer.getvalue()


def page() -> str:
    """The page; its data come from the server."""
    text = importlib.resources.files("openpi.cli").joinpath("dataset_view.html").read_text(encoding="utf-8")
    style = importlib.resources.files("openpi.shared").joinpath("report.css").read_text(encoding="utf-8")
    return text.replace("/*STYLE*/", style)


def open_server(pages: Pages, port: int = 0) -> ThreadingHTTPServer:
    """Listens, and answers when `serve_forever` is called; 0 = a free port."""
    # One thread that stays: those of the server come and go, and each would open every video anew.
    worker = ThreadPoolExecutor(1, thread_name_prefix="view")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another page must not reach this one by a name that leads here (DNS rebinding).
            name = self.headers.get("Host", "").rpartition(":")[0]
            if name not in (HOST, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            status, kind, body = worker.submit(pages.get, self.path.partition("?")[0]).result()
            self.send_response(status)
            headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": _POLICY}
            for header, value in headers.items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: a line for each picture helps nobody."""

    server = ThreadingHTTPServer((HOST, port), Handler)
    server.daemon_threads = True
    return server


def _json(content: dict[str, Any]) -> Answer:
    return HTTPStatus.OK, "application/json", json.dumps(content, ensure_ascii=False).encode()
