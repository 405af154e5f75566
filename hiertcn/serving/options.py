"""How a sidecar and the process around it run; importing this costs nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from hiertcn.errors import InputError

STORE_FOLDER: Final = "store"
"""Of the user records, in the state folder."""


@dataclass(frozen=True, kw_only=True)
class SidecarOptions:
    """How a sidecar runs.

    Attributes:
        repository: the release repository's root, or its ``triton_repo``.
        triton_url: ``host:port`` of Triton's gRPC door.
        state_dir: folder of the log, the records and the exported events; one sidecar each.
        host: address to listen on.
        port: gRPC port; 0 takes any free one.
        metrics_port: Prometheus port; 0 takes any free one, None serves no metrics.
        workers: processes that answer on the port; one of them writes.
        models: where the models run: "triton", or "in-process" without one.
        item_memory: how the item table is held: "mapped" (shared with all processes, read when
            touched), "prefault" (shared, read in before the release serves) or "huge-pages"
            (copied into this process's own memory, where the kernel grants huge pages).
        model_deadline_s: seconds after which a call to Triton is given up for a fallback ranking.
        batch_delay_s: longest that a request waits for others to share a call with while the one
            before is under way, in seconds; else an eighth of it.
        max_batch: most requests in one call to Triton.
        max_in_flight: requests in flight of a method at which the next is refused
            (RESOURCE_EXHAUSTED).
        target_latency_s: mean seconds that a recommendation may take before fewer requests are
            let in.
        journal_entries: most interactions kept in a user's record.
        max_new_items: most items from UpsertItems that no release knows yet.
        segment_bytes: size at which a log segment is sealed and rolled into parquet.
        segment_age_s: age in seconds at which it is.
        fsync: when a recorded interaction is forced to disk: "always" (before it is acknowledged),
            "interval" (at latest 0.1 s after) or "os" (when Linux writes back).
        store: where user records live: "" for LMDB in the state folder, or
            ``valkey://host:port[,host:port]/db`` (``store_valkey.py`` says the rest).
        state_dtype: of the stored states, "float32" or "float16".
        user_ttl_s: seconds without an interaction after which a user's record is removed; 0 never.
        store_limit_bytes: size of the LMDB records above which the longest idle users' records
            are removed; 0 for no limit.
        drain_s: longest that stopping waits for requests in flight, in seconds.
        tls_cert: PEM certificate of the gRPC door and the web page; None serves plain text.
        tls_key: its PEM key, without a password.
        tls_client_ca: PEM certificates of the authorities that clients' certificates must come
            from (mutual TLS); None asks clients for none.
        token_file: the bearer tokens that callers must show one of (``tokens.py``); None asks
            for none.
        rate_limit: requests a second of each caller, 0 for any number.
        max_message_bytes: largest request and reply.
        ui_port: port of the web page; 0 takes any free one, None serves no page.
        otlp_endpoint: ``http://host:port`` (or https) of an OpenTelemetry collector's gRPC door,
            which gets traces; None traces nothing.
        trace_sampling: share of the requests without a caller's trace that are traced, 0 to 1.
    """

    repository: Path
    triton_url: str
    state_dir: Path
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_port: int | None = None
    workers: int = 1
    models: str = "triton"
    item_memory: str = "mapped"
    model_deadline_s: float = 0.2
    batch_delay_s: float = 0.016
    max_batch: int = 64
    max_in_flight: int = 256
    target_latency_s: float = 0.2
    journal_entries: int = 4096
    max_new_items: int = 100_000
    segment_bytes: int = 64 << 20
    segment_age_s: float = 3600.0
    fsync: str = "always"
    # Its URL may hold a password.
    store: str = field(default="", repr=False)
    state_dtype: str = "float32"
    user_ttl_s: float = 0.0
    store_limit_bytes: int = 0
    drain_s: float = 5.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    token_file: Path | None = None
    rate_limit: float = 0.0
    max_message_bytes: int = 16 << 20
    ui_port: int | None = None
    otlp_endpoint: str | None = None
    trace_sampling: float = 0.01

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port", "ui_port"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 65535:
                raise InputError(f"{name} is {value}; expected 0 to 65535")
        for name in (
            "model_deadline_s",
            "workers",
            "max_batch",
            "max_in_flight",
            "target_latency_s",
            "journal_entries",
            "max_new_items",
            "segment_bytes",
        ):
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"{name} is {value}; expected more than 0")
        for name in ("batch_delay_s", "drain_s"):
            value = getattr(self, name)
            if not 0 <= value <= 60:
                raise InputError(f"{name} is {value}; expected 0 to 60 seconds")
        for name, known in (
            ("models", ("triton", "in-process")),
            ("item_memory", ("mapped", "prefault", "huge-pages")),
            ("fsync", ("always", "interval", "os")),
            ("state_dtype", ("float32", "float16")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        for name in ("user_ttl_s", "store_limit_bytes"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} is {value}; expected 0 (none) or more")
        self._check_doors()

    def to_plain(self) -> dict[str, Any]:
        """The options as JSON types."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "SidecarOptions":
        """Read what :meth:`to_plain` gave."""
        paths = {field.name for field in fields(cls) if "Path" in str(field.type)}
        values: dict[str, Any] = {
            name: Path(value) if name in paths and value is not None else value
            for name, value in plain.items()
        }
        return cls(**values)

    def _check_doors(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key belong together; one of them is missing")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InputError("--tls-client-ca needs --tls-cert and --tls-key; they are missing")
        if not 0 <= self.rate_limit < float("inf"):
            raise InputError(
                f"rate_limit is {self.rate_limit}; expected requests/s, or 0 for no limit"
            )
        if not 1 << 10 <= self.max_message_bytes < 1 << 31:
            raise InputError(
                f"max_message_bytes is {self.max_message_bytes}; expected 1024 to 2147483647"
            )
        if not 0 <= self.trace_sampling <= 1:
            raise InputError(f"trace_sampling is {self.trace_sampling}; expected 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What to serve, and where.

    Attributes:
        sidecar: the sidecar's options; ``triton_url`` is set from Triton if one is started.
        triton_url: ``host:port`` of a running Triton's gRPC door; None starts one.
        triton_grpc_port: gRPC port of the Triton that is started; 0 takes any free one.
        triton_http_port: HTTP port of the Triton that is started; 0 takes any free one.
    """

    sidecar: SidecarOptions
    triton_url: str | None = None
    triton_grpc_port: int = 8001
    triton_http_port: int = 8000
