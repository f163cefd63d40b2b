"""What the server answers over plain HTTP, without sockets."""

import dataclasses
import functools
import importlib.resources
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from openpi.policies.contract import Contract
from openpi.policies.drift import Moved
from openpi.serving.catalog import Catalog
from openpi.serving.live import LiveSession, Parts, thumbnail
from openpi.serving.metrics import CONTENT_TYPE, Metrics
from openpi.serving.model_slot import ModelSlot
from openpi.shared import strict_json
from openpi.shared.page import jpeg_url
from openpi_client.base_policy import Observation

logger = logging.getLogger(__name__)

# Nothing from elsewhere: the page works without a network, and no other page may show it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_JPEG_QUALITY = 70
# Sessions of which all is shown, and how long a warning makes one of them.
_MOST_SHOWN, _LATELY_S = 8, 10.0


@dataclasses.dataclass(frozen=True)
class Page:
    """An answer to a GET."""

    body: bytes
    content_type: str = "application/json"
    status: int = 200
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


class SharedPage:
    """A page that is made once for all who ask for it at the same time. It is never older than the question."""

    def __init__(self, make: Callable[[], Page]) -> None:
        self._make = make
        self._lock = threading.Lock()  # guards what follows
        self._num_begun = 0
        self._made: Page | None = None

    def get(self) -> Page:
        seen = self._num_begun
        with self._lock:
            if self._made is None or self._num_begun == seen:
                self._num_begun += 1
                self._made = None  # if it fails, the next one who asks tries again
                self._made = self._make()
            return self._made


def status_page() -> Page:
    """The page for people; it asks for `/status.json` once a second, while it is visible."""
    headers = {"Content-Security-Policy": f"{_POLICY}; frame-ancestors 'none'"}
    return Page(_html(), "text/html; charset=utf-8", headers=headers)


def metrics_text(metrics: Metrics) -> Page:
    return Page(metrics.text(), CONTENT_TYPE)


def models_json(catalog: Catalog) -> Page:
    """`{"models": [id, ...]}`; an empty list when they cannot be listed, as clients expect."""
    try:
        ids = catalog.ids()
    except (OSError, ValueError):
        logger.exception("The models cannot be listed")
        ids = []
    return _json({"models": ids})


def keepalive() -> Page:
    """How long a server stays when nobody asks it anything: this one, until it is stopped."""
    return _json({"alive_seconds": None})


def wrong_method(expected: str) -> Page:
    return dataclasses.replace(text(f"Only {expected} is answered here.\n", 405), headers={"Allow": expected})


def not_found(path: str) -> Page:
    return text(f"There is nothing at {path}; see /, /healthz, /readyz, /metrics, /api/v1/models\n", 404)


def wrong_key() -> Page:
    """Browsers then ask for it."""
    headers = {"WWW-Authenticate": 'Basic realm="openpi: any name, the API key as password"'}
    return dataclasses.replace(text("Missing or wrong API key.\n", 401), headers=headers)


def off() -> Page:
    """What the status page would show is nobody's business who happens to reach the port."""
    return text(
        "The status page shows cameras, state and prompts. This server can be reached from other machines and has no "
        "API key, so the page is off. Start it with a key (OPENPI_API_KEY or --api-key), or with --host 127.0.0.1\n",
        403,
    )


def foreign_host(host: str) -> Page:
    return text(
        f"This server is not called {host[:100]!r}. Use its address or the name of its machine, or start it with "
        "--allowed-host NAME\n",
        403,
    )


def foreign_page(origin: str) -> Page:
    return text(
        f"Pages of other servers may not connect, and this one is of {origin[:100]!r}. Start the server with "
        "--allowed-host NAME for pages of that name\n",
        403,
    )


def text(content: str, status: int = 200) -> Page:
    return Page(content.encode(), "text/plain; charset=utf-8", status)


def status_json(
    slots: Sequence[ModelSlot],
    sessions: Sequence[LiveSession],
    *,
    ids: Callable[[], list[str]],
    chosen: Sequence[int] = (),
) -> Page:
    """Everything that the status page shows; images as the model sees them, as JPEG in data URLs.

    Args:
        chosen: numbers of sessions that somebody wants to look at. Of many sessions these are shown in full, then those
            that were told something lately, then the oldest: pictures of all would keep the robots waiting.
    """
    now_s = time.time()
    policies = {slot.model_id: slot.policy for slot in slots}
    ranked = sorted(sessions, key=lambda each: (each.number not in chosen, not _is_told(each, now_s), each.number))
    shown = {session.number for session in ranked[:_MOST_SHOWN]}
    return _json(
        {
            "now_s": now_s,
            "ids": ids(),
            "models": [_model(slot) for slot in slots],
            "sessions": [
                {**_session(each), **(_details(each, policies.get(each.model_id)) if each.number in shown else {})}
                for each in sessions
            ],
        }
    )


def _is_told(session: LiveSession, now_s: float) -> bool:
    """Whether there was a warning lately."""
    return any(now_s - told.last_s < _LATELY_S for told in session.told.values())


def _model(slot: ModelSlot) -> dict[str, object]:
    contract = getattr(slot.policy, "contract", None)
    return {
        "id": slot.model_id,
        "state": "loading" if slot.policy is None else "ready",
        "num_sessions": slot.num_sessions,
        "num_waiting": slot.thread.num_waiting(),
        "contract": None if contract is None else contract.describe(),
    }


def _session(session: LiveSession) -> dict[str, object]:
    return {
        "number": session.number,
        "protocol": session.protocol,
        "model": session.model_id,
        "address": session.address,
        "since_s": session.since_s,
        "last_s": session.last_s,
        "num_requests": session.num_requests,
        "num_errors": session.num_errors,
        "last_error": session.last_error,
        "warnings": [
            {"text": told.text, "last_s": told.last_s, "count": told.count} for told in reversed(session.told.values())
        ],
    }


def _details(session: LiveSession, policy: object) -> dict[str, object]:
    latencies = list(session.latencies_ms)
    return {
        "latencies_ms": [round(value, 2) for value in latencies],
        "quantiles_ms": np.percentile(latencies, [50, 90, 99]).tolist() if latencies else None,
        "parts_ms": _medians(list(session.parts)),
        "averages": _averages(session.averages(), getattr(policy, "contract", None)),
        **_shown(session, policy),
    }


def _shown(session: LiveSession, policy: object) -> dict[str, object]:
    """Its last exchange, if it can be shown: what one robot sends hides no other robot's."""
    try:
        return _last_exchange(session, policy)
    except Exception:
        logger.debug("the status page cannot show an exchange", exc_info=True)
        return {}


def _medians(parts: Sequence[Parts]) -> dict[str, float]:
    return dict(zip(Parts._fields, np.median(parts, axis=0).tolist(), strict=True)) if parts else {}


def _averages(averages: Sequence[Moved], contract: Contract | None) -> list[dict[str, object]]:
    """Of what was received beside training's, with names for people."""
    names = {} if contract is None else {vector.key: vector.names for vector in contract.state}

    def name(moved: Moved) -> str:
        known = names.get(moved.key, ())
        if isinstance(moved.part, str):
            return f"{moved.key}: {moved.part}"
        return known[moved.part] if moved.part < len(known) else f"{moved.key}[{moved.part}]"

    return [{**dataclasses.asdict(moved), "name": name(moved)} for moved in averages if moved.count]


def _last_exchange(session: LiveSession, policy: object) -> dict[str, object]:
    observation, result = session.observation, session.result
    if observation is None or result is None:
        return {}
    seen = _seen(policy, observation)
    contract = getattr(policy, "contract", None)
    names = list(contract.actions.names) if contract is not None else []
    actions, previous = _chunk(result.get("actions")), _chunk(session.previous)
    before_s, now_s = session.asked_s
    rate_hz = (contract.control_hz if contract is not None else None) or 0.0
    return {
        "prompt": str(seen["prompt"]) if seen.get("prompt") is not None else None,
        "cameras": {name: _data_url(image) for name, image in seen["image"].items()},
        "state": _state(seen.get("state"), contract),
        "actions": actions,
        "previous": previous if np.shape(previous)[1:] == np.shape(actions)[1:] else [],
        # Where in the chunk before the robot was when it asked again, if it plays at the contract's rate. Clocks that
        # are set go back, too.
        "rows_since": min(len(previous), max(0, round((now_s - before_s) * rate_hz))) if previous else 0,
        "action_names": names,
    }


def _chunk(actions: object) -> list[list[float]]:
    """Rows of a chunk; none of what is no chunk."""
    found = np.asarray([] if actions is None else actions, np.float64)
    return np.round(found, 5).tolist() if found.ndim == 2 else []


def _seen(policy: Any, observation: dict) -> Observation:
    """As the model sees it; as it was sent where the policy cannot say."""
    if hasattr(policy, "view"):
        try:
            return policy.view(observation)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            logger.debug("the status page cannot show an observation", exc_info=error)
    small = thumbnail(observation)
    images = {key: value for key, value in small.items() if isinstance(value, np.ndarray) and value.shape[2:] == (3,)}
    return {"image": images, "prompt": observation.get("prompt")}


def _state(state: object, contract: Contract | None) -> list[dict[str, object]]:
    if state is None:
        return []
    values = np.asarray(state, np.float64).reshape(-1)
    names = contract.state_names if contract is not None else ()
    low, high = (contract.state_q01, contract.state_q99) if contract is not None else (None, None)
    return [
        {
            "name": names[i] if i < len(names) else f"state_{i}",
            "value": float(value),
            "low": low[i] if low is not None and i < len(low) else None,
            "high": high[i] if high is not None and i < len(high) else None,
        }
        for i, value in enumerate(values[: len(names) or len(values)])
    ]


def _data_url(image: np.ndarray) -> str:
    from PIL import Image

    image = np.asarray(image)
    if image.dtype != np.uint8:  # models take [-1, 1]
        image = np.clip((image + 1) * 127.5, 0, 255).astype(np.uint8)
    return jpeg_url(Image.fromarray(image), quality=_JPEG_QUALITY)


@functools.cache
def _html() -> bytes:
    return importlib.resources.files("openpi.serving").joinpath("status.html").read_bytes()


def _json(content: object) -> Page:
    return Page(json.dumps(strict_json.with_nulls(content), separators=(",", ":")).encode())
