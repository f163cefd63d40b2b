"""`openpi dataset view DATASET`: a page on this machine, episode by episode: pictures, signals, actions, findings.

Pictures are decoded by the reader that training uses, frame by frame, so that what is seen is what a model gets,
whatever the codec. The page asks for nothing from elsewhere, and the server answers this machine only.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from openpi.cli import _pages
from openpi.cli._pages import NONE, Answer
from openpi.data.lerobot.features import INDEX_FEATURES, dimension_names
from openpi.shared.page import template

if TYPE_CHECKING:
    from openpi.data.check.findings import Finding
    from openpi.data.lerobot.reader import LeRobotDataset

_JPEG_QUALITY = 88
_MOST_DIMENSIONS = 64  # of a vector; wider ones are tactile pictures and the like


class Pages:
    """What the server answers, without sockets.

    Args:
        findings: of `openpi dataset check`.
    """

    def __init__(self, dataset: LeRobotDataset, findings: Sequence[Finding]):
        self._dataset = dataset
        self._findings = findings
        features = dataset.metadata.features
        columns = [key for key in dataset.metadata.column_keys if key not in INDEX_FEATURES]
        numbers = [key for key in columns if features[key]["dtype"] != "string"]
        self._vectors = [key for key in numbers if int(np.prod(features[key]["shape"])) <= _MOST_DIMENSIONS]
        self._others = [f"{key} {features[key]['shape']}" for key in columns if key not in self._vectors]

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
        return NONE

    def _has(self, position: int) -> bool:
        return position < len(self._dataset.episodes)

    def _overview(self) -> dict[str, object]:
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
            "others": self._others,
            "episodes": episodes,
        }

    def _episode(self, position: int) -> dict[str, object]:
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

    def _signal(self, key: str, rows: slice) -> dict[str, object]:
        values = self._dataset.column(key)[rows].astype(np.float64)
        values = values.reshape(len(values), -1).T
        names = dimension_names(self._dataset.metadata.features[key])
        names = names if len(names) == len(values) else tuple(map(str, range(len(values))))
        # Nine digits are all of a float32, whatever its unit.
        told = [[float(f"{v:.9g}") if np.isfinite(v) else None for v in row] for row in values.tolist()]
        return {"key": key, "names": list(names), "values": told}

    def _frame(self, camera: int, position: int, number: int) -> Answer:
        keys = self._dataset.metadata.camera_keys
        if camera >= len(keys) or not self._has(position) or number >= self._dataset.episodes[position].length:
            return NONE
        try:
            [frame] = self._dataset.camera_frames(keys[camera], position, [number])
        except (ValueError, OSError) as error:
            return HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", str(error).encode()
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "jpeg", quality=_JPEG_QUALITY)
        return HTTPStatus.OK, "image/jpeg", buffer.getvalue()


def page() -> str:
    """The page; its data come from the server."""
    return template("openpi.cli.data", "dataset_view.html")


def open_server(pages: Pages, port: int = 0) -> ThreadingHTTPServer:
    """Listens on this machine only, and answers when `serve_forever` is called; 0 = a free port."""
    return _pages.open_server(_InOneThread(pages), port=port)


class _InOneThread:
    """The pages, from one thread that stays: those of the server come and go, and each would open every video anew."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="view")

    def get(self, path: str) -> Answer:
        return self._worker.submit(self._pages.get, path).result()

    def post(self, path: str, body: bytes) -> Answer:
        return NONE


def _json(content: Mapping[str, object]) -> Answer:
    return HTTPStatus.OK, "application/json", json.dumps(content, ensure_ascii=False).encode()
