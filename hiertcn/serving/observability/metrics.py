"""The sidecar's Prometheus metrics, in a registry of their own so that tests can run several."""

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from hiertcn.serving.live.live_windows import LiveWindows
from hiertcn.serving.observability.metrics_server import MetricsServer, Probes
from hiertcn.serving.observability.stages import Stages

_SECONDS: Final = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0, 5.0,
)  # fmt: skip
_AGES: Final = (
    60.0, 600.0, 3600.0, 6 * 3600.0, 86400.0, 2 * 86400.0, 7 * 86400.0, 30 * 86400.0, 90 * 86400.0,
)  # fmt: skip
_BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters, gauges and histograms of one sidecar; seconds and counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.stages = Stages(_SECONDS)
        self.registry.register(self.stages)
        self.requests = Counter(
            "hiertcn_requests",
            "Requests answered, by method and gRPC status.",
            ["method", "code"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "hiertcn_request_seconds",
            "Time from a request's arrival to its reply, by method.",
            ["method"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.state_age_seconds = Histogram(
            "hiertcn_state_age_seconds",
            "Time from the last interaction folded into a user's state to the request it ranked.",
            buckets=_AGES,
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "hiertcn_queue_depth",
            "What waits, by queue (recommend: requests for a batch, gru_step: sessions to be "
            "folded, commit: groups of interactions for the log).",
            ["queue"],
            registry=self.registry,
        )
        self.model_seconds = Histogram(
            "hiertcn_model_seconds",
            "Time of one batched call to Triton, by model.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.model_batch = Histogram(
            "hiertcn_model_batch",
            "Requests in one batched call to Triton, by model.",
            ["model"],
            buckets=_BATCH,
            registry=self.registry,
        )
        self.model_errors = Counter(
            "hiertcn_model_errors",
            "Batched calls to Triton that failed or ran past their deadline, by model.",
            ["model"],
            registry=self.registry,
        )
        self.commit_seconds = Histogram(
            "hiertcn_commit_seconds",
            "Time to make one group of interactions durable and apply it.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.commit_batch = Histogram(
            "hiertcn_commit_batch",
            "Interactions in one group commit.",
            buckets=_BATCH,
            registry=self.registry,
        )
        self.interactions = Counter(
            "hiertcn_interactions",
            "Interactions received, by what became of them (accepted, duplicate, late).",
            ["outcome"],
            registry=self.registry,
        )
        self.unknown_items = Counter(
            "hiertcn_unknown_items",
            "Item ids that the serving release does not know, by method.",
            ["method"],
            registry=self.registry,
        )
        self.fallbacks = Counter(
            "hiertcn_fallbacks",
            "Recommendations ranked without the model, by ranking (session, popularity).",
            ["ranking"],
            registry=self.registry,
        )
        self.sessions_folded = Counter(
            "hiertcn_sessions_folded",
            "Closed sessions pushed through the GRU.",
            registry=self.registry,
        )
        self.rebuilds = Counter(
            "hiertcn_rebuilds",
            "User records rebuilt from a snapshot and the journal.",
            registry=self.registry,
        )
        self.warming = Gauge(
            "hiertcn_warming",
            "1 while active users are rebuilt for a release that is to serve or just began to.",
            registry=self.registry,
        )
        self.records_repaired = Counter(
            "hiertcn_records_repaired",
            "User records that failed their checksum and were made again from snapshot and log.",
            registry=self.registry,
        )
        self.release = Gauge(
            "hiertcn_release", "The release that is served.", registry=self.registry
        )
        self.watermark = Gauge(
            "hiertcn_release_watermark_timestamp_seconds",
            "Event time up to which the served release has seen the log, since the epoch.",
            registry=self.registry,
        )
        self.activations = Counter(
            "hiertcn_activations",
            "Releases activated or refused, by result (served, refused).",
            ["result"],
            registry=self.registry,
        )
        self.log_bytes = Gauge(
            "hiertcn_log_bytes", "Bytes in the event log's open segment.", registry=self.registry
        )
        self.live_interactions = Gauge(
            "hiertcn_live_interactions",
            "Interactions in the six hours before the minute last ranked for.",
            registry=self.registry,
        )
        self.live_newest = Gauge(
            "hiertcn_live_newest_timestamp_seconds",
            "Minute of the newest interaction that live counts have seen, since the epoch.",
            registry=self.registry,
        )

        self.in_flight = Gauge(
            "hiertcn_requests_in_flight",
            "Requests admitted and not yet answered, by method.",
            ["method"],
            registry=self.registry,
        )
        self.in_flight_bound = Gauge(
            "hiertcn_requests_in_flight_bound",
            "Requests in flight at which the next is refused now, by method.",
            ["method"],
            registry=self.registry,
        )
        self.breaker_open = Gauge(
            "hiertcn_breaker_open",
            "1 while calls to a model are not tried because they keep failing, by model.",
            ["model"],
            registry=self.registry,
        )
        self.breaker_changes = Counter(
            "hiertcn_breaker_changes",
            "Times that calls to a model were given up or taken up again, by model and state "
            "(open, closed).",
            ["model", "state"],
            registry=self.registry,
        )

        self.new_items = Gauge(
            "hiertcn_new_items",
            "Upserted items that the serving release or the one before does not know.",
            registry=self.registry,
        )

    def watch_live(self, current: Callable[[], LiveWindows]) -> None:
        """Read size and newest minute of the serving release's live windows when asked."""
        self.live_interactions.set_function(lambda: current().interactions)
        self.live_newest.set_function(lambda: current().newest_us / 1e6)

    def serve(self, host: str, port: int, probes: Probes | None = None) -> MetricsServer:
        """Answer ``GET /metrics`` and probes on threads of their own; port 0 takes any free one.

        Raises:
            InputError: the port is in use.
        """
        return MetricsServer(self.registry, probes or Probes(), host, port)
