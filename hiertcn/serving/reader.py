"""A further process of a sidecar, on the same port: it ranks, and passes on what changes things.

It reads the record store that the writing process keeps, follows the event log for new items and
the live counts (on a shared store, for the counts, what all its sidecars tell of), and follows the
release pointer like any sidecar. It shares the item table and the snapshots with the other
processes through the page cache. New items and live counts of the last half second may be missing
here.

    python -m hiertcn.serving.reader OPTIONS.json

starts one; ``worker_processes.py`` does.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from hiertcn.errors import HiertcnError
from hiertcn.files import read_json, write_json
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.live.last_items import LastItems
from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.serving.live.shared_arrivals import SharedArrivals
from hiertcn.serving.log.segments import log_identity
from hiertcn.serving.log.tail import LogTail
from hiertcn.serving.new_items.item_upserts import ItemUpserts
from hiertcn.serving.new_items.new_items import SAVED_FILE, NewItems
from hiertcn.serving.options import STORE_FOLDER, SidecarOptions
from hiertcn.serving.ranking.engine import Engine
from hiertcn.serving.records.writer_door import RemoteWriter, writer_url
from hiertcn.serving.rpc.admission import Admission
from hiertcn.serving.rpc.forwarding import forwarding_handlers
from hiertcn.serving.rpc.methods import method_handlers
from hiertcn.serving.rpc.servicers import RECOMMENDER, RELEASES, RecommenderMethods
from hiertcn.serving.rpc.validation import wall_clock_us
from hiertcn.serving.security.access_control import AccessControl
from hiertcn.serving.security.shared_rate_limit import rate_table
from hiertcn.serving.sidecar import Sidecar, cancelled
from hiertcn.serving.stores.crash_note import crashes_noted
from hiertcn.serving.stores.store import RecordStore
from hiertcn.serving.stores.store_opening import open_to_read
from hiertcn.serving.stores.store_valkey import ValkeyStore

_log = logging.getLogger(__name__)

_FOLLOW_S: Final = 0.5
_RANKS: Final = ("Recommend",)


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    """How a reading process runs.

    Attributes:
        sidecar: options of the writing process, with the port that it bound.
        door: folder of the writing process's socket and of the callers' rates.
        ready: file that is written when the process answers.
    """

    sidecar: SidecarOptions
    door: Path
    ready: Path

    def save(self, path: Path) -> None:
        """Write the options as JSON."""
        write_json(
            path,
            {
                "sidecar": self.sidecar.to_plain(),
                "door": str(self.door),
                "ready": str(self.ready),
            },
        )

    @classmethod
    def load(cls, path: Path) -> "ReaderOptions":
        """Read what :meth:`save` wrote."""
        found = read_json(path)
        return cls(
            sidecar=SidecarOptions.from_plain(found["sidecar"]),
            door=Path(found["door"]),
            ready=Path(found["ready"]),
        )


class Reader(Sidecar):
    """A sidecar that writes nothing."""

    def __init__(self, options: ReaderOptions) -> None:
        super().__init__(options.sidecar)
        self._writer_url = writer_url(options.door)
        self._rate_table = rate_table(options.door)

    async def _start(self) -> None:
        options = self._options
        repository = ReleaseRepository(options.repository)
        access = AccessControl(options, self._rate_table)
        self._serve_metrics()
        store = await asyncio.to_thread(open_to_read, options)
        self._parts.callback(store.close)
        channel = grpc.aio.insecure_channel(self._writer_url, options=_CHANNEL)
        self._parts.push_async_callback(channel.close)
        inference, control = self._served_models(repository)
        models = self._model_batcher(inference)
        recent = RecentInteractions()
        new_items = NewItems(options.max_new_items)
        upserts = ItemUpserts(new_items, inference)
        applied = await asyncio.to_thread(getattr, store, "newest_applied")
        tail = LogTail(options.state_dir / "log", applied)
        await asyncio.to_thread(new_items.load, options.state_dir / SAVED_FILE, tail)
        activation = await self._activate(repository, control, inference, models, recent, upserts)
        release, bound = activation.current_with_bound()
        await asyncio.to_thread(
            recent.fill, tail, tail.position, bound.oldest_watermark_us, release
        )
        followed: RecentInteractions | None = recent
        if isinstance(store, ValkeyStore):
            followed = None
            identity = log_identity(options.state_dir / "log")
            shared = SharedArrivals(store, identity, recent, own_after=tail.position)
            self._parts.push_async_callback(asyncio.to_thread, shared.stop)
            await asyncio.to_thread(shared.start)
        await asyncio.to_thread(release.live.at, wall_clock_us())
        self.metrics.watch_live(lambda: activation.current.live)
        engine = self._engine(activation, store, RemoteWriter(channel), models, upserts)
        for following in (activation.watch(), self._follow(tail, store, followed, upserts)):
            self._parts.push_async_callback(cancelled, asyncio.create_task(following))
        # Bound last: the kernel gives a listening process its share of the callers at once.
        server = self._bind(self._interceptors(access))
        await self._answer(server, self._handlers(engine, channel))
        gc.collect()
        gc.freeze()

    async def _follow(
        self,
        tail: LogTail,
        store: RecordStore,
        recent: RecentInteractions | None,
        upserts: ItemUpserts,
    ) -> None:
        """Take in what the writing process logs; no interactions where others tell of them."""
        assert self._activation is not None
        last_items = LastItems()
        while True:
            await asyncio.sleep(_FOLLOW_S)
            try:
                # The newest, because a shared store's users follow the log each for themselves. It
                # goes back when the store loses something, which then is applied again.
                applied = await asyncio.to_thread(getattr, store, "newest_applied")
                if applied > tail.position:
                    interactions, items = await asyncio.to_thread(tail.read, applied)
                    if recent is not None:
                        recent.add(
                            [(one.item_id, one.timestamp_us) for one in interactions],
                            last_items.before(interactions, self._activation.current),
                        )
                    for item in items:
                        upserts.new_items.put(item)
                release = self._activation.current
                if not upserts.is_complete(release):
                    with release.held():
                        await upserts.bring_up(release)
            except HiertcnError as error:
                _log.error("following the writing process failed: %s", error)
            except Exception:
                _log.exception("following the writing process failed; trying again")

    def _handlers(self, engine: Engine, channel: Any) -> tuple[Any, ...]:
        admission = Admission(
            self._options.max_in_flight, self.metrics, target_s=self._options.target_latency_s
        )
        methods = RecommenderMethods(engine)
        handlers = {
            **forwarding_handlers(RECOMMENDER, channel, but=_RANKS),
            **method_handlers(RECOMMENDER, methods, self.metrics, admission, only=_RANKS),
        }
        return (
            grpc.method_handlers_generic_handler(RECOMMENDER, handlers),
            grpc.method_handlers_generic_handler(RELEASES, forwarding_handlers(RELEASES, channel)),
        )


_CHANNEL: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


async def _serve(options: ReaderOptions) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    async with contextlib.AsyncExitStack() as parts:
        if not options.sidecar.store:
            parts.enter_context(crashes_noted(options.sidecar.state_dir / STORE_FOLDER))
        reader = Reader(options)
        await reader.start()
        parts.push_async_callback(reader.stop)
        write_json(options.ready, {"metrics_port": reader.metrics_port})
        await stopping.wait()


def main() -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    asyncio.run(_serve(ReaderOptions.load(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
