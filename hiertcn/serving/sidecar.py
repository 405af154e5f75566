"""The sidecar: a gRPC server over the engine, and the order in which its parts start and stop.

Starting binds the ports first, so a port in use is said before anything is loaded, then opens
store and log, attaches the current release, replays what the log holds beyond the store, and only
then answers. Health says SERVING exactly while a release is active. Stopping lets requests in
flight finish, then seals the log and rolls it into parquet. One process, one event loop; one
thread writes. Triton is someone else's to start (``supervisor.py``).
"""

import asyncio
import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hiertcn.errors import InputError
from hiertcn.release.repository import ReleaseRepository
from hiertcn.release.verified_files import VerifiedFiles
from hiertcn.serving.inference.inference import Inference, ModelControl, TritonInference
from hiertcn.serving.inference.models_in_process import InProcessModels
from hiertcn.serving.inference.triton_models import TritonModels
from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.serving.live.shared_arrivals import SharedArrivals
from hiertcn.serving.log.event_log import EventLog, Fsync
from hiertcn.serving.new_items.item_upserts import ItemUpserts
from hiertcn.serving.new_items.new_items import SAVED_FILE, NewItems
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.observability.metrics_server import Probes
from hiertcn.serving.observability.tracing import Tracing
from hiertcn.serving.options import SidecarOptions
from hiertcn.serving.preflight import require
from hiertcn.serving.ranking.batching import ModelBatcher
from hiertcn.serving.ranking.engine import Engine
from hiertcn.serving.records.sweeper import Sweeper
from hiertcn.serving.records.warmer import Warmer
from hiertcn.serving.records.writer import RecordWriter, Writer
from hiertcn.serving.records.writer_door import fold_handler, writer_url
from hiertcn.serving.releases.activation import Activation
from hiertcn.serving.rpc.admission import Admission
from hiertcn.serving.rpc.methods import service_handler
from hiertcn.serving.rpc.servicers import (
    RECOMMENDER,
    RELEASES,
    RecommenderMethods,
    ReleaseMethods,
)
from hiertcn.serving.rpc.unknown_methods import UnknownMethods
from hiertcn.serving.rpc.validation import wall_clock_us
from hiertcn.serving.security.access_control import AccessControl, AccessInterceptor, server_tls
from hiertcn.serving.security.shared_rate_limit import rate_table
from hiertcn.serving.stores.store import RecordStore
from hiertcn.serving.stores.store_opening import open_store
from hiertcn.serving.stores.store_valkey import ValkeyStore

_log = logging.getLogger(__name__)


class Sidecar:
    """A sidecar on the running event loop; start it, serve, stop it.

    Attributes (once started):
        port: the gRPC port bound.
        metrics_port: the Prometheus port bound, or None.
        metrics: the counters.
        store: the user records.
        sweeper: folds and forgets in the background.
        warmer: rebuilds active users for a new release.
        ui_url: where the web page is, or None.
        further_metrics_ports: gives the Prometheus ports of this sidecar's other processes.
    """

    def __init__(self, options: SidecarOptions, door: Path | None = None) -> None:
        """Take the options.

        Args:
            options: how to run.
            door: folder, private to this user, for the socket that the sidecar's other processes
                come through (``reader.py``), and for what they share; None where it has no others.
        """
        self._options = options
        self._door = door
        self._parts = contextlib.AsyncExitStack()
        self._activation: Activation | None = None
        self.metrics = Metrics()
        self.port = options.port
        self.metrics_port = options.metrics_port
        self.ui_url: str | None = None
        self.further_metrics_ports: Callable[[], Sequence[int]] = tuple
        self._probes = Probes()

    @property
    def address(self) -> str:
        """``host:port`` for a client."""
        return f"{self._options.host}:{self.port}"

    @property
    def release(self) -> int:
        """The release that is served.

        Raises:
            ReleaseError: none is.
        """
        if self._activation is None:
            raise InputError("the sidecar has not started; call start() first")
        return self._activation.current.number

    async def start(self) -> None:
        """Start every part; on failure all that started is stopped again.

        Raises:
            InputError: a port is in use, the repository does not exist or has no current release
                that can be served, the state folder is in use, or the log is damaged.
            ServingError: Triton does not answer.
        """
        try:
            await self._start()
        except BaseException:
            await self._parts.aclose()
            raise

    async def stop(self) -> None:
        """Drain, seal and export the log, and close everything."""
        await self._parts.aclose()
        _log.info("the sidecar on %s has stopped", self.address)

    async def _start(self) -> None:
        options = self._options
        repository = ReleaseRepository(options.repository)
        if not repository.root.is_dir():
            raise InputError(
                f"the release repository {repository.root} does not exist; publish a release "
                "there with 'python -m pipelines run', or give another --repository"
            )
        table = rate_table(self._door, create=True) if self._door is not None else None
        access = AccessControl(options, table)
        server = self._bind(self._interceptors(access))
        self._serve_metrics()
        log = EventLog.open(
            options.state_dir / "log",
            segment_bytes=options.segment_bytes,
            segment_age_s=options.segment_age_s,
            fsync=Fsync(options.fsync),
        )
        self._parts.callback(log.close)
        store = await asyncio.to_thread(open_store, options, log)
        self._parts.callback(store.close)

        inference, control = self._served_models(repository)
        models = self._model_batcher(inference)
        new_items = NewItems(options.max_new_items)
        await asyncio.to_thread(new_items.load, options.state_dir / SAVED_FILE, log)
        self.metrics.new_items.set_function(lambda: len(new_items))
        upserts = ItemUpserts(new_items, inference)
        recent = RecentInteractions()
        activation = await self._activate(repository, control, inference, models, recent, upserts)
        writer = RecordWriter(
            log,
            store,
            activation.current_with_bound,
            options.state_dir / "events",
            recent,
            self.metrics,
            new_items,
        )
        release, bound = activation.current_with_bound()
        await asyncio.to_thread(recent.fill, log, store.applied, bound.oldest_watermark_us, release)
        replayed = await asyncio.to_thread(writer.replay)
        if replayed:
            _log.info("applied %d logged entries that the store lacked", replayed)
        writer.start()
        self._parts.push_async_callback(asyncio.to_thread, writer.stop)
        if isinstance(store, ValkeyStore):
            shared = SharedArrivals(store, log.identity, recent, writer.log_deletion)
            writer.applier.tell = shared.tell
            self._parts.push_async_callback(asyncio.to_thread, shared.stop)
            await asyncio.to_thread(shared.start)
        await asyncio.to_thread(release.live.at, wall_clock_us())
        self.metrics.watch_live(lambda: activation.current.live)

        engine = self._engine(activation, store, writer, models, upserts)
        self.store = store
        self.warmer = Warmer(options, store, writer, recent, self.metrics)
        self._parts.push_async_callback(self.warmer.close)
        activation.warmer = self.warmer
        self.sweeper = Sweeper(
            store,
            writer,
            models,
            activation.current_with_bound,
            recent,
            self.metrics,
            user_ttl_s=options.user_ttl_s,
            limit_bytes=options.store_limit_bytes,
        )
        sweeping = asyncio.create_task(self.sweeper.run())
        self._parts.push_async_callback(cancelled, sweeping)
        watching = asyncio.create_task(activation.watch())
        self._parts.push_async_callback(cancelled, watching)
        admission = Admission(
            options.max_in_flight, self.metrics, target_s=options.target_latency_s
        )
        handlers = (
            service_handler(RECOMMENDER, RecommenderMethods(engine), self.metrics, admission),
            service_handler(RELEASES, ReleaseMethods(repository, activation), self.metrics),
        )
        await self._answer(server, handlers)
        if self._door is not None:
            await self._open_door(self._door, (*handlers, fold_handler(writer)))
        await self._show(engine, access, admission)
        # What lives until the end need not be traversed by every later collection.
        gc.collect()
        gc.freeze()
        _log.info("the sidecar serves release %d on %s", activation.current.number, self.address)

    async def _activate(
        self,
        repository: ReleaseRepository,
        control: ModelControl,
        inference: Inference,
        models: ModelBatcher,
        recent: RecentInteractions,
        upserts: ItemUpserts,
    ) -> Activation:
        activation = Activation(
            repository,
            control,
            inference,
            models,
            self.metrics,
            recent,
            upserts,
            VerifiedFiles(self._options.state_dir / "verified.json"),
            journal_entries=self._options.journal_entries,
            item_memory=self._options.item_memory,
        )
        self._parts.callback(activation.close)
        await activation.start()
        self._activation = activation
        return activation

    def _engine(
        self,
        activation: Activation,
        store: RecordStore,
        writer: Writer,
        models: ModelBatcher,
        upserts: ItemUpserts,
    ) -> Engine:
        engine = Engine(
            lambda: activation.current,
            store,
            writer,
            models,
            self.metrics,
            upserts,
            max_batch=self._options.max_batch,
            max_delay_s=self._options.batch_delay_s,
        )
        self._parts.callback(engine.close)
        return engine

    def _serve_metrics(self) -> None:
        options = self._options
        if options.metrics_port is None:
            return
        probes = self._probes = Probes(asyncio.get_running_loop())
        endpoint = self.metrics.serve(options.host, options.metrics_port, probes)
        self._parts.callback(endpoint.stop)
        self.metrics_port = endpoint.port

    def _model_batcher(self, inference: Inference) -> ModelBatcher:
        options = self._options
        return ModelBatcher(
            inference,
            self.metrics,
            max_batch=options.max_batch,
            max_delay_s=options.batch_delay_s,
            deadline_s=options.model_deadline_s,
        )

    def _served_models(self, repository: ReleaseRepository) -> tuple[Inference, ModelControl]:
        if self._options.models == "in-process":
            models = InProcessModels(repository.triton_repository)
            self._parts.push_async_callback(models.close)
            return models, models
        inference = TritonInference(self._options.triton_url)
        self._parts.push_async_callback(inference.close)
        control = TritonModels(self._options.triton_url, repository.triton_repository)
        self._parts.callback(control.close)
        return inference, control

    def _interceptors(self, access: AccessControl) -> list[Any]:
        # Each costs every request something, so there is none that would do nothing.
        interceptors: list[Any] = []
        if self._options.otlp_endpoint is not None:
            tracing = Tracing(self._options.otlp_endpoint, self._options.trace_sampling)
            self._parts.push_async_callback(asyncio.to_thread, tracing.stop)
            self.metrics.stages.listener = tracing
            interceptors.append(tracing.interceptor())
        if access.needs_token or access.limits_rate:
            interceptors.append(AccessInterceptor(access, self.metrics))
        return interceptors

    def _bind(self, interceptors: list[Any]) -> Any:
        options = self._options
        server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                # Two sidecars must not share a port, or each would miss half the requests; the
                # processes of one sidecar must.
                ("grpc.so_reuseport", int(options.workers > 1)),
                # gRPC takes up one call at a time. Without these, calls that nobody waits for any
                # more pile up before it under overload, and are all that it ever takes up.
                ("grpc.server.max_pending_requests", max(64, options.max_in_flight // 4)),
                (
                    "grpc.server.max_pending_requests_hard_limit",
                    max(128, options.max_in_flight // 2),
                ),
                ("grpc.max_receive_message_length", options.max_message_bytes),
                ("grpc.max_send_message_length", options.max_message_bytes),
            ],
        )
        tls = server_tls(options)
        credentials = tls.grpc_credentials() if tls is not None else None
        address = f"{options.host}:{options.port}"
        try:
            self.port = (
                server.add_insecure_port(address)
                if credentials is None
                else server.add_secure_port(address, credentials)
            )
        except RuntimeError:
            raise InputError(
                f"--port {options.port} on {options.host} cannot be bound; stop what holds it or "
                "give another"
            ) from None
        return server

    async def _answer(self, server: Any, handlers: Sequence[Any]) -> None:
        """Let callers in, and say so to whoever probes."""
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        server.add_generic_rpc_handlers(tuple(handlers))
        services = (RECOMMENDER, RELEASES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, server)
        server.add_generic_rpc_handlers((UnknownMethods(services),))
        for name in ("", RECOMMENDER, RELEASES):
            await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        self._parts.push_async_callback(server.stop, self._options.drain_s)
        self._parts.push_async_callback(checks.enter_graceful_shutdown)
        self._parts.callback(setattr, self._probes, "is_ready", False)
        self._probes.is_ready = True

    async def _open_door(self, door: Path, handlers: Sequence[Any]) -> None:
        """Answer the other processes of this sidecar; they have let the callers in."""
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", self._options.max_message_bytes),
                ("grpc.max_send_message_length", -1),
            ]
        )
        server.add_generic_rpc_handlers(tuple(handlers))
        server.add_insecure_port(writer_url(door))
        await server.start()
        self._parts.push_async_callback(server.stop, self._options.drain_s)

    async def _show(self, engine: Engine, access: AccessControl, admission: Admission) -> None:
        if self._options.ui_port is None:
            return
        # An extra: only who asks for the page needs what serves it.
        require("aiohttp", "ui", "--ui")
        from hiertcn.serving.ui.server import WebPage

        page = WebPage(
            self._options,
            engine,
            self.metrics,
            access,
            admission,
            lambda: self.further_metrics_ports(),
        )
        await page.start()
        self._parts.push_async_callback(page.stop)
        self.ui_url = page.url


async def cancelled(task: "asyncio.Task[None]") -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
