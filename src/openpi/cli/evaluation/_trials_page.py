"""The page of `openpi trials`: it asks what the terminal would ask, one question after the other."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path

from openpi.cli._pages import NONE, Answer
from openpi.cli.evaluation._question import Question
from openpi.shared.page import template


class TrialsPage:
    """Call it with a question; it waits for the answer of a browser, as `input` does for that of a terminal."""

    def __init__(self, file: Path) -> None:
        """
        Args:
            file: of results.
        """
        self._file = file
        self._changed = threading.Condition()  # guards what follows
        self._question = Question("The servers are started.")
        self._number = 0  # of the question; an answer to another one is too late
        self._answer: str | None = None
        self._summary: Sequence[str] = ()

    def __call__(self, question: str) -> str:
        asked = question if isinstance(question, Question) else Question(question, takes_text=True)
        with self._changed:
            self._question, self._answer = asked, None
            self._number += 1
            while self._answer is None:
                self._changed.wait()
            self._question = Question("One moment.", about=asked.about)
            return self._answer

    def finish(self, summary: Sequence[str]) -> None:
        """Shows what came of it until somebody has seen it."""
        self._summary = summary
        self(Question("All trials are done.", choices={"close": ""}))

    def get(self, path: str) -> Answer:
        if path == "/":
            return HTTPStatus.OK, "text/html; charset=utf-8", template("openpi.cli.evaluation", "trials.html").encode()
        if path == "/state.json":
            return _json(self._state())
        if path == "/results.csv" and self._file.exists():
            return HTTPStatus.OK, "text/csv; charset=utf-8", self._file.read_bytes()
        return NONE

    def post(self, path: str, body: bytes) -> Answer:
        """`{"number": of the question, "text": answer}` to `/answer`."""
        if path != "/answer":
            return NONE
        try:
            sent = json.loads(body)
            number, text = int(sent["number"]), str(sent["text"])
            text.encode()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return _json({"error": f"no answer: {error}"}, HTTPStatus.BAD_REQUEST)
        with self._changed:
            if number != self._number or self._answer is not None:
                return _json({"error": "this question was answered already"}, HTTPStatus.CONFLICT)
            self._answer = text
            self._changed.notify_all()
        return _json({})

    def _state(self) -> dict[str, object]:
        from openpi.evaluation import trials

        with self._changed:
            question, number, summary = self._question, self._number, list(self._summary)
        done = trials.read(self._file) if self._file.exists() else []
        return {
            "number": number,
            "question": question.shown,
            "about": question.about,
            "note": question.note,
            "choices": dict(question.choices),
            "takes_text": question.takes_text,
            "summary": summary,
            "done": [
                {"trial": row.trial, "task": row.task, "success": row.success, "notes": row.notes} for row in done
            ],
        }


def _json(content: Mapping[str, object], status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return status, "application/json", json.dumps(content, ensure_ascii=False).encode()
