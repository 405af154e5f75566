"""Which release is served, and how it is changed without a failed or a mixed reply.

Activation: files verified -> Triton loads the models -> every length bucket warm -> parts mapped
-> active users rebuilt aside (``warmer.py``) -> the pointer flips -> new requests take the new
object. Until the last step nothing changes for anyone, and a failure anywhere leaves the old
release serving. Requests under way keep the release they began with; its models stay loaded beside
the new one's until the flip after next.

The repository's pointer is followed once a second, so a publisher on the same file system needs
no call; a Triton that came back without its models gets them loaded again.
"""

import asyncio
import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar, TypeVarTuple

from hiertcn.errors import HiertcnError, InputError, ReleaseError
from hiertcn.export.tensors import TCN
from hiertcn.items.index import IdIndex
from hiertcn.release.repository import MODELS, OPTIONAL_MODELS, ReleaseRepository
from hiertcn.release.verified_files import VerifiedFiles
from hiertcn.serving.inference.inference import Inference, ModelControl
from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.serving.new_items.item_upserts import ItemUpserts, RowsOf
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.ranking.batching import ModelBatcher
from hiertcn.serving.records.fold import JournalBound
from hiertcn.serving.records.loop_share import give_way
from hiertcn.serving.records.warmer import Warmer
from hiertcn.serving.releases.serving_release import ServingRelease

_log = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

_WATCH_S: Final = 1.0
_LARGE_BYTES: Final = 256 << 20
_VERIFY_ASIDE_S: Final = 60.0
_DRAIN_POLL_S: Final = 0.01
_DRAIN_TIMEOUT_S: Final = 10.0


class Activation:
    """Holds the serving release and flips it.

    Args:
        repository: the release repository.
        control: loads model versions into Triton.
        inference: asks Triton whether they are there.
        models: warms them.
        metrics: where activations are counted.
        recent: the interactions recorded here, which live counts go on with.
        upserts: brings new items into a release before it serves.
        verified: remembers which releases' checksums were right.
        journal_entries: longest journal of a user.
        item_memory: as in ``SidecarOptions``.
    """

    def __init__(
        self,
        repository: ReleaseRepository,
        control: ModelControl,
        inference: Inference,
        models: ModelBatcher,
        metrics: Metrics,
        recent: RecentInteractions,
        upserts: ItemUpserts,
        verified: VerifiedFiles,
        *,
        journal_entries: int,
        item_memory: str = "mapped",
    ) -> None:
        self._repository = repository
        self._control = control
        self._inference = inference
        self._models = models
        self._metrics = metrics
        self._recent = recent
        self._upserts = upserts
        self._verified_files = verified
        self._journal_entries = journal_entries
        self._item_memory = item_memory
        self._serving: tuple[ServingRelease, JournalBound] | None = None
        self._before: ServingRelease | None = None
        self._refused: int | None = None
        self._changing = asyncio.Lock()
        self.warmer: Warmer | None = None
        # Model control and checksums block, and must not wait behind anything else that does.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="activation")
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="verify", initializer=give_way)

    @property
    def current(self) -> ServingRelease:
        """The release that serves."""
        return self.current_with_bound()[0]

    def current_with_bound(self) -> tuple[ServingRelease, JournalBound]:
        """The release that serves, and what journals must keep for it and the one before."""
        if self._serving is None:
            raise ReleaseError("no release is active; activate one first")
        return self._serving

    async def start(self) -> None:
        """Serve the release that the repository points at.

        Raises:
            ReleaseError: there is none, or it must not be served.
            ServingError: Triton does not answer.
        """
        number = self._repository.current()
        if number is None:
            raise ReleaseError(
                f"{self._repository.root} has no current release; publish one with "
                "'python -m pipelines run', or activate one with 'hiertcn releases activate'"
            )
        async with self._changing:
            await self._attach(number)

    async def activate(self, number: int) -> None:
        """Serve another release and point the repository at it.

        Raises:
            ReleaseError: the release must not be served; the old one still is.
            ServingError: Triton does not answer; the old one still serves.
        """
        async with self._changing:
            if self._serving is None or self.current.number != number:
                await self._attach(number, flip=True)
            else:
                await self._blocking(self._repository.activate, number)

    async def roll_back(self) -> int:
        """Activate the release that was current before; return its number.

        Raises:
            ReleaseError: there is none, or it must not be served.
            ServingError: Triton does not answer.
        """
        previous = self._repository.previous()
        if previous is None:
            raise ReleaseError(
                f"{self._repository.root} has no previous release to roll back to; activate one "
                "by number"
            )
        await self.activate(previous)
        return previous

    async def watch(self) -> None:
        """Follow the repository's pointer and Triton's models until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                await self._follow_pointer()
                await self._restore_models()
            except HiertcnError as error:
                _log.error("%s", error)
            except Exception:
                _log.exception("following the release pointer failed; trying again")

    def close(self) -> None:
        """End the worker thread."""
        self._worker.shutdown(wait=False)
        self._aside.shutdown(wait=False)

    async def _follow_pointer(self) -> None:
        number = self._repository.current()
        if number is None or number in (self.current.number, self._refused):
            return
        async with self._changing:
            if number == self.current.number:
                return
            # Remembered before the attempt, so a bad release is tried (and logged) only once.
            self._refused = number
            await self._attach(number)

    async def _restore_models(self) -> None:
        if await self._inference.is_ready(TCN, self.current.number) is not False:
            return
        async with self._changing:
            _log.warning("Triton lost release %d; loading it again", self.current.number)
            await self._load(self.current.number)

    async def _attach(self, number: int, *, flip: bool = False) -> None:
        try:
            await self._verified(number)
            await self._load(number)
            release = await self._blocking(
                ServingRelease, self._repository, number, self._recent, self._item_memory
            )
            await self._blocking(release.warm)
            await self._models.warm(release)
            await self._upserts.bring_up(release)
            if self.warmer is not None and self._serves_by_model():
                await self.warmer.stage(release)
            if len(release.overlay):
                await self._blocking(release.recount_live)
            if flip:
                # Its checksums were compared above.
                point = functools.partial(self._repository.activate, number, checksums=False)
                await self._blocking(point)
            while not self._upserts.is_complete(release):
                await self._upserts.bring_up(release)
        except HiertcnError:
            self._metrics.activations.labels("refused").inc()
            raise
        before = self._serving[0] if self._serving is not None else None
        self._serving = (release, self._bound(release, before))
        if self._before is not None:
            self._before.let_go()
        self._before = before
        self._upserts.settle(self._indexes(release, before))
        self._refused = None
        if self.warmer is not None:
            await self.warmer.keep(release)
        self._metrics.activations.labels("served").inc()
        self._metrics.release.set(number)
        self._metrics.watermark.set(self.current.watermark_us / 1e6)
        _log.info("serving release %d", number)

    def _serves_by_model(self) -> bool:
        """Whether requests lose nothing by a flip that comes later."""
        return self._serving is not None and self._repository.has_model(TCN, self.current.number)

    async def _verified(self, number: int) -> None:
        verify = functools.partial(self._verified_files.verify, self._repository, number)
        large = self._repository.manifest(number).total_bytes > _LARGE_BYTES
        if large and self._serving is not None:
            # Checksums of gigabytes must not keep the processors from answering requests; on a
            # machine that is never idle, they would never end.
            verified = asyncio.get_running_loop().run_in_executor(self._aside, verify)
            if (await asyncio.wait([verified], timeout=_VERIFY_ASIDE_S))[0]:
                verified.result()
                return
        await self._blocking(verify)

    async def _load(self, number: int) -> None:
        kept = {number}
        if self._serving is not None:
            # Whoever deleted its files past the lock must not keep the sidecar from going on.
            if self._repository.has_model(TCN, self.current.number):
                kept.add(self.current.number)
        elif (previous := self._repository.previous()) in self._repository.numbers():
            kept.add(int(previous or number))
        if self._before is not None and self._before.number not in kept:
            await _drained(self._before)
        for model in MODELS:
            await self._blocking(self._control.load, model, sorted(kept))
        for model in OPTIONAL_MODELS:
            await self._blocking(self._load_optional, model, kept)

    def _load_optional(self, model: str, releases: set[int]) -> None:
        having = [
            number for number in sorted(releases) if self._repository.has_model(model, number)
        ]
        if having:
            self._control.load(model, having)
        elif self._control.loaded(model):
            self._control.unload(model)

    def _indexes(self, release: ServingRelease, before: ServingRelease | None) -> list[RowsOf]:
        """Look-ups of the release and of the one that a roll-back would return to."""
        found: list[RowsOf] = [release.released_rows]
        if before is not None:
            found.append(before.released_rows)
        elif (previous := self._repository.previous()) is not None:
            try:
                index = IdIndex.open(self._repository.path(previous) / "item_index")
                found.append(index.rows)
            except InputError as error:
                _log.warning("cannot roll back: %s", error)
        return found

    def _bound(self, release: ServingRelease, before: ServingRelease | None) -> JournalBound:
        watermarks = [release.watermark_us]
        if before is not None:
            watermarks.append(before.watermark_us)
        elif (previous := self._repository.previous()) is not None:
            try:
                watermarks.append(self._repository.manifest(previous).watermark_us)
            except InputError as error:
                _log.warning("cannot roll back: %s", error)
        return JournalBound(entries=self._journal_entries, oldest_watermark_us=min(watermarks))

    async def _blocking(
        self, function: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)


async def _drained(release: ServingRelease) -> None:
    """Wait until no request uses the release, whose models are about to be unloaded."""
    waited_s = 0.0
    while release.in_flight and waited_s < _DRAIN_TIMEOUT_S:
        await asyncio.sleep(_DRAIN_POLL_S)
        waited_s += _DRAIN_POLL_S
