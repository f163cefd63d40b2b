"""What `/metrics` counts, in Prometheus' text form."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from openpi.policies.guards import code_of

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)
_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The figures of one server. Models are told apart by the label `model`."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "openpi_requests",
            "Answered requests; outcome ok, refused or failed",
            ("model", "protocol", "outcome"),
            registry=registry,
        )
        self._request_s = Histogram(
            "openpi_request_seconds",
            "From a message's arrival to its answer, waiting included",
            ("model",),
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._infer_s = Histogram(
            "openpi_inference_seconds",
            "One batch in the policy",
            ("model",),
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._batch_size = Histogram(
            "openpi_batch_size", "Observations of one batch", ("model",), buckets=_SIZE_BUCKETS, registry=registry
        )
        self._warned = Counter("openpi_warned", "Answers with warnings", ("model",), registry=registry)
        self._warnings = Counter("openpi_warnings", "Of answers, by code", ("model", "code"), registry=registry)
        self._bytes = Counter("openpi_received_bytes", "Of messages", ("model",), registry=registry)
        self._sessions = Gauge("openpi_sessions", "Open sessions", ("protocol",), registry=registry)
        self._refused = Counter("openpi_refused_connections", "By reason", ("reason",), registry=registry)
        self._queue = Gauge("openpi_queue_length", "Requests that wait for the model", ("model",), registry=registry)
        self._loaded = Gauge("openpi_model_loaded", "1 = in memory", ("model",), registry=registry)
        self._load_s = Gauge("openpi_model_load_seconds", "How long the last load took", ("model",), registry=registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def answered(self, model_id: str, protocol: str, outcome: str, *, num_bytes: int, seconds: float) -> None:
        self._requests.labels(model_id, protocol, outcome).inc()
        self._request_s.labels(model_id).observe(seconds)
        self._bytes.labels(model_id).inc(num_bytes)

    def warned(self, model_id: str, warnings: Iterable[str]) -> None:
        """An answer had these."""
        self._warned.labels(model_id).inc()
        for warning in warnings:
            self._warnings.labels(model_id, code_of(warning)).inc()

    def batch_ran(self, model_id: str, size: int, infer_s: float) -> None:
        self._infer_s.labels(model_id).observe(infer_s)
        self._batch_size.labels(model_id).observe(size)

    def session_opened(self, protocol: str) -> None:
        self._sessions.labels(protocol).inc()

    def session_closed(self, protocol: str) -> None:
        self._sessions.labels(protocol).dec()

    def connection_refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def model_loaded(self, model_id: str, seconds: float) -> None:
        self._loaded.labels(model_id).set(1)
        self._load_s.labels(model_id).set(seconds)

    def model_gone(self, model_id: str) -> None:
        self._loaded.labels(model_id).set(0)

    def watch_queue(self, model_id: str, length: Callable[[], int]) -> None:
        self._queue.labels(model_id).set_function(length)
