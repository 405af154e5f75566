"""The one thread that writes: log first, then records, then the acknowledgement.

Requests hand over entries and wait for a future. The thread takes all that has gathered, appends
it to the event log with one fdatasync, applies it to the users' records in one store transaction
that also commits the log position, and only then resolves the futures: an acknowledged
interaction is durable and visible. Readers never wait for it.

Should applying fail after the log took the entries, nothing is acknowledged, and the entries are
applied from the log before anything newer; a caller's retry is then a duplicate. After a crash
:meth:`RecordWriter.replay` does the same, so every logged entry is applied exactly once.

Rotation, the parquet export and the dropping of segments that no live snapshot needs happen here
too; the export runs on a thread of its own, so commits do not wait for it.
"""

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from hiertcn.errors import HiertcnError, ServingError
from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.serving.log.event_export import export_parquet
from hiertcn.serving.log.event_log import (
    Entry,
    EventLog,
    LoggedDeletion,
    Position,
)
from hiertcn.serving.log.logged_items import LoggedItem
from hiertcn.serving.new_items.new_items import SAVED_FILE, NewItems
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.records.applying import Applied, EntryApplier, UserEntry, key_of
from hiertcn.serving.records.fold import JournalBound
from hiertcn.serving.records.record import NEVER_US, UserRecord
from hiertcn.serving.releases.serving_release import ServingRelease
from hiertcn.serving.stores.store import Change, RecordStore, StoreBehindError

_log = logging.getLogger(__name__)

_REPLAY_ENTRIES: Final = 4096
_MAX_GROUP: Final = 4096
_MAX_WAITING: Final = 16_384
_IDLE_CHECK_S: Final = 5.0
_REPAIR_S: Final = 10.0


@dataclass(frozen=True)
class _Commit:
    entries: Sequence[Entry]
    future: "asyncio.Future[list[Applied]]"


@dataclass(frozen=True)
class _KeepFold:
    key: bytes
    base_revision: int | None
    record: UserRecord | None


@dataclass(frozen=True)
class _Repair:
    keys: Collection[bytes]
    future: "asyncio.Future[list[Applied]]"


@dataclass(frozen=True)
class _Barrier:
    future: "asyncio.Future[list[Applied]]"


_Job = _Commit | _KeepFold | _Repair | _Barrier | None


class Writer(Protocol):
    """What requests need of whoever writes: ``RecordWriter``, or ``writer_door.RemoteWriter``."""

    async def commit(self, entries: Sequence[Entry]) -> list[Applied]:
        """See ``RecordWriter.commit``."""
        ...

    def keep_fold(self, key: bytes, base_revision: int | None, record: UserRecord) -> None:
        """See ``RecordWriter.keep_fold``."""
        ...

    async def repair(self, keys: Collection[bytes]) -> None:
        """See ``RecordWriter.repair``."""
        ...


class RecordWriter:
    """Owns the log and the store's writes; ``applier`` does them, on the writing thread.

    Args:
        log: the event log.
        store: the user records.
        current: gives the release that serves, and what journals may keep.
        events: folder that sealed segments are rolled into.
        recent: what live counts are fed by.
        metrics: where groups are counted.
        new_items: upserted items, which are put into it once they are logged.
    """

    def __init__(
        self,
        log: EventLog,
        store: RecordStore,
        current: Callable[[], tuple[ServingRelease, JournalBound]],
        events: Path,
        recent: RecentInteractions,
        metrics: Metrics,
        new_items: NewItems,
    ) -> None:
        self._event_log = log
        self._new_items = new_items
        self._store = store
        self.applier = EntryApplier(store, log, current, recent, metrics, new_items)
        self._current = current
        self._events = events
        self._metrics = metrics
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        metrics.queue_depth.labels("commit").set_function(self._jobs.qsize)
        self._behind = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._exporter = ThreadPoolExecutor(1, thread_name_prefix="event-export")

    def replay(self) -> int:
        """Apply what the log holds beyond the store's position; return how many entries.

        Raises:
            InputError: a log segment is damaged.
            ServingError: the store cannot be written.
        """
        self._event_log.continue_after(self._store.newest_applied)
        try:
            replayed = self._replay(self._event_log.position)
        except StoreBehindError as error:
            _log.warning("%s; applying the log again", error)
            replayed = self._replay(self._event_log.position)
        self._behind = False
        return replayed

    def _replay(self, until: Position) -> int:
        replayed = 0
        chunk: list[UserEntry] = []
        position = start = self._store.applied
        counted = self.applier.counted
        for end, entry in self._event_log.replay(start):
            if end > until:
                break
            if chunk and (len(chunk) == _REPLAY_ENTRIES or position <= counted < end):
                self.applier.apply(chunk, position)
                replayed += len(chunk)
                chunk = []
            position = end
            if isinstance(entry, LoggedItem):
                # The set of new items was read from the whole log, and keeps the newest version.
                self._new_items.put(entry)
                continue
            if end > self._store.applied_for(key_of(entry)):
                chunk.append(entry)
        self.applier.apply(chunk, position)
        self._store.write({}, position)
        return replayed + len(chunk)

    def start(self) -> None:
        """Begin to take jobs; call it on the event loop that awaits them."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="record-writer", daemon=True)
        self._thread.start()
        self._exporter.submit(self._export)

    async def commit(self, entries: Sequence[Entry]) -> list[Applied]:
        """Log and apply the entries; return what became of each, once that is durable.

        Raises:
            ServingError: the disk is full or failing, so nothing is acknowledged.
        """
        future: asyncio.Future[list[Applied]] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Commit(entries, future))
        return await future

    def keep_fold(self, key: bytes, base_revision: int | None, record: UserRecord) -> None:
        """Keep a folded or rebuilt record, unless the user's record changed meanwhile.

        Losing it costs another fold at the next touch, never a wrong state; so while a slow disk
        leaves many jobs waiting, nothing is kept.

        Args:
            key: the user's key.
            base_revision: revision of the stored record it was made from, None if there was none.
            record: the record to keep.
        """
        if self._jobs.qsize() < _MAX_WAITING:
            self._jobs.put(_KeepFold(key, base_revision, record))

    async def repair(self, keys: Collection[bytes]) -> None:
        """Make records again that were found damaged.

        Returns when that is done, has failed, or takes longer than ten seconds.
        """
        future: asyncio.Future[list[Applied]] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Repair(keys, future))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(future, _REPAIR_S)

    def remove(self, key: bytes, base_revision: int) -> None:
        """Remove a record that is not needed any more, unless it changed meanwhile."""
        self._jobs.put(_KeepFold(key, base_revision, None))

    def log_deletion(self, deletion: LoggedDeletion) -> None:
        """Log and apply a deletion, from any thread and without waiting."""
        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(self.commit([deletion]), self._loop)

    async def caught_up(self) -> None:
        """Wait until every job before this call is done."""
        future: asyncio.Future[list[Applied]] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Barrier(future))
        await future

    def stop(self) -> None:
        """Finish the jobs in the queue, seal and export the log, sync the store."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None
        try:
            self._rotate()
        except HiertcnError as error:
            _log.error("%s; what the store lacks is applied at the next start", error)
        self._exporter.shutdown(wait=True)

    def _work(self) -> None:
        stopping = False
        while not stopping:
            commits: list[_Commit] = []
            folds: list[_KeepFold] = []
            repairs: list[_Repair] = []
            barriers: list[_Barrier] = []
            for job in self._gathered():
                if isinstance(job, _Commit):
                    commits.append(job)
                elif isinstance(job, _KeepFold):
                    folds.append(job)
                elif isinstance(job, _Repair):
                    repairs.append(job)
                elif isinstance(job, _Barrier):
                    barriers.append(job)
                else:
                    stopping = True
            damaged = {key for repair in repairs for key in repair.keys}
            if not commits and not folds:
                # What nobody waits for, such as what the sweeper met.
                damaged |= self._store.damaged()
            if damaged:
                self._attempt(self.applier.repair, damaged)
            if folds:
                self._attempt(self._keep_folds, folds)
            if commits:
                self._attempt(self._commit_group, commits)
            if self._event_log.is_full:
                self._attempt(self._rotate)
            if not commits and not folds:
                self._attempt(self._look_for_loss)
            if self._behind:
                self._attempt(self.replay)
            waited = [barrier.future for barrier in barriers] + [one.future for one in repairs]
            if waited:
                self._resolve([(future, []) for future in waited])

    def _attempt(self, work: Callable[..., object], *arguments: object) -> None:
        """Do a part of the work, whose failure must not keep the others from being done."""
        try:
            work(*arguments)
        except StoreBehindError as error:
            _log.warning("%s; applying the log again", error)
            self._behind = True
        except HiertcnError as error:
            _log.error("%s", error)
        except Exception:
            _log.exception("the record writer met an error; it goes on with what follows")

    def _look_for_loss(self) -> None:
        self._store.write({}, None if self._store.is_local else self._event_log.position)

    def _gathered(self) -> list[_Job]:
        try:
            jobs: list[_Job] = [self._jobs.get(timeout=_IDLE_CHECK_S)]
        except queue.Empty:
            return []
        while len(jobs) < _MAX_GROUP:
            try:
                jobs.append(self._jobs.get_nowait())
            except queue.Empty:
                break
        return jobs

    def _commit_group(self, commits: list[_Commit]) -> None:
        began = time.perf_counter()
        entries = [entry for commit in commits for entry in commit.entries]
        try:
            if self._behind:
                self.replay()
            before = self._event_log.position
            position = self._event_log.append(entries)
            self._behind = True
            try:
                applied = self.applier.apply(entries, position)
            except StoreBehindError as error:
                _log.warning("%s; applying the log again", error)
                self._replay(before)
                applied = self.applier.apply(entries, position)
            self._behind = False
        except Exception as error:
            reason = error
            if not isinstance(error, HiertcnError):
                _log.exception("interactions could not be applied")
                reason = ServingError(f"interactions could not be applied ({error!r}); retry")
            self._resolve([(commit.future, reason) for commit in commits])
            return
        results: list[tuple[asyncio.Future[list[Applied]], list[Applied] | Exception]] = []
        at = 0
        for commit in commits:
            results.append((commit.future, applied[at : at + len(commit.entries)]))
            at += len(commit.entries)
        self._resolve(results)
        self._metrics.commit_seconds.observe(time.perf_counter() - began)
        self._metrics.commit_batch.observe(len(entries))
        self._metrics.log_bytes.set(position.offset)

    def _resolve(
        self,
        results: Sequence[tuple["asyncio.Future[list[Applied]]", list[Applied] | Exception]],
    ) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_set_results, results)

    def _keep_folds(self, folds: list[_KeepFold]) -> None:
        # Of several folds of one base the first wins: they are equal.
        waiting = {(fold.key, fold.base_revision): fold.record for fold in reversed(folds)}
        while waiting:
            changes = {key: Change(record, base) for (key, base), record in waiting.items()}
            refused = self._store.write(changes)
            tried = {(key, change.base_revision) for key, change in changes.items()}
            waiting = {
                (key, base): record
                for (key, base), record in waiting.items()
                if key in refused and (key, base) not in tried
            }

    def _rotate(self) -> None:
        if self._behind:
            return
        if self._event_log.rotate() is not None:
            self._store.write({}, self._event_log.position)
        # Only a store that is on disk may outlive the segments it was made from.
        self._store.sync()
        self._exporter.submit(self._export)

    def _export(self) -> None:
        try:
            export_parquet(self._event_log, self._events)
            _, bound = self._current()
            # Before a segment goes, what it says of items must be elsewhere.
            self._new_items.save(self._events.with_name(SAVED_FILE))
            for segment in self._event_log.sealed():
                last_us = segment.last_us if segment.last_us is not None else NEVER_US
                if segment.exported and last_us <= bound.oldest_watermark_us:
                    self._event_log.drop(segment.number)
        except Exception:
            _log.exception("recorded interactions could not be rolled into %s", self._events)


def _set_results(
    results: Sequence[tuple["asyncio.Future[list[Applied]]", list[Applied] | Exception]],
) -> None:
    for future, result in results:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
