"""Rebuilds active users for a new release before it serves, so its first requests find states.

A record belongs to the serving release until the flip, so what is rebuilt waits in a file: the
records of everyone who interacted in the last day, under the new release, their closed sessions
folded in batches. At the flip they are handed to the writer, which keeps each whose record did not
change meanwhile; a second pass rebuilds the rest. Whoever asks before their turn is rebuilt at
that touch, as always: the warmer saves time and decides nothing.

Records know no user ids, so the new snapshot's users are hashed once to find their rows. Memory
is bounded by 60 bytes an active user and one batch; the file by a record an active user.
"""

import asyncio
import contextlib
import itertools
import logging
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from hiertcn.errors import HiertcnError
from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.ranking.batching import ModelBatcher
from hiertcn.serving.records import fold
from hiertcn.serving.records.batch_fold import fold_closed, settled_until_us
from hiertcn.serving.records.loop_share import LoopShare
from hiertcn.serving.records.record import decode, encode, user_key
from hiertcn.serving.records.snapshot import UserSnapshot
from hiertcn.serving.records.writer import RecordWriter
from hiertcn.serving.releases.serving_release import ServingRelease
from hiertcn.serving.stores.store import RecordStore

_log = logging.getLogger(__name__)

_ACTIVE_US: Final = 86_400_000_000
_SLICE: Final = 512
_FOLDED: Final = 64
"""Users whose sessions are folded together: some milliseconds of the event loop between waits."""
_HANDED_OVER: Final = 32
_PASSES: Final = 3
_STAGED: Final = struct.Struct("<16sII")


class Warmer:
    """Rebuilds the active users of one store.

    Args:
        store: the records, read here, written by ``writer``.
        writer: keeps what was rebuilt.
        models: the batched models.
        recent: what was recorded, whose time folding goes by.
        metrics: where rebuilds are counted.
        folder: where the waiting records' file is made.
        longest_s: seconds after which the flip is not held up any longer.
    """

    def __init__(
        self,
        store: RecordStore,
        writer: RecordWriter,
        models: ModelBatcher,
        recent: RecentInteractions,
        metrics: Metrics,
        folder: Path,
        *,
        longest_s: float = 60.0,
    ) -> None:
        self._store = store
        self._writer = writer
        self._models = models
        self._recent = recent
        self._metrics = metrics
        self._folder = folder
        self._longest_s = longest_s
        self._files = contextlib.ExitStack()
        self._staged: BinaryIO | None = None
        self._task: asyncio.Task[None] | None = None

    async def stage(self, release: ServingRelease) -> int:
        """Rebuild the active users under a release that does not serve yet; return how many.

        Failing or running out of time costs rebuilds at first touch, so it is logged, not raised.
        """
        await self.close()
        self._staged = self._files.enter_context(
            tempfile.TemporaryFile(dir=self._folder, prefix="warm-")  # noqa: SIM115
        )
        count = 0
        try:
            async with asyncio.timeout(self._longest_s):
                count = await self._stage(release, self._staged)
        except TimeoutError:
            _log.warning("release %d flips before all active users are rebuilt", release.number)
        except HiertcnError as error:
            _log.warning("active users are rebuilt at their next touch: %s", error)
        return count

    def keep(self, release: ServingRelease) -> None:
        """Hand over what was staged, now that the release serves, and rebuild what is left."""
        self._task = asyncio.create_task(self._keep(release))

    async def kept(self) -> None:
        """Wait until everything was handed over."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def close(self) -> None:
        """Stop and forget what is staged."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        self._files.close()
        self._staged = None

    async def _keep(self, release: ServingRelease) -> None:
        share = LoopShare()
        try:
            for _ in range(_PASSES):
                assert self._staged is not None
                staged = _read(self._staged)
                while some := list(itertools.islice(staged, _HANDED_OVER)):
                    share.resume()
                    for key, base, stored in some:
                        self._writer.keep_fold(key, base, decode(stored))
                    # The writing thread keeps the event loop waiting, too.
                    await self._writer.caught_up()
                    await share.leave()
                self._staged.seek(0)
                self._staged.truncate()
                if not await self._stage(release, self._staged):
                    break
            _log.info("active users are rebuilt under release %d", release.number)
        except HiertcnError as error:
            _log.warning("active users are rebuilt at their next touch: %s", error)

    async def _stage(self, release: ServingRelease, file: BinaryIO) -> int:
        now_us = settled_until_us(release, self._recent)
        share = LoopShare()
        keys = await self._active(release, now_us - _ACTIVE_US, share)
        rows = await self._snapshot_rows(release, set(keys), share)
        count = 0
        for first in range(0, len(keys), _FOLDED):
            some = keys[first : first + _FOLDED]
            stored = await asyncio.to_thread(self._store.get_many, some)
            share.resume()
            outdated = [
                (key, record)
                for key, record in zip(some, stored, strict=True)
                if record is not None and record.release != release.number
            ]
            # One look-up for all: alone, each costs as much as the rest of its rebuild.
            ids = [record.journal.item_ids for _, record in outdated]
            ends = list(itertools.accumulate(map(len, ids), initial=0))
            items = release.item_rows(list(itertools.chain.from_iterable(ids)))
            await share.leave()
            found = []
            for place, (key, record) in enumerate(outdated):
                of_journal = items[ends[place] : ends[place + 1]]
                rebuilt = fold.rebuilt_from(record, _at(release, rows, key), release, of_journal)
                found.append((key, record.revision, rebuilt))
                await share.leave()
            folded = await fold_closed(
                self._models, release, [record for _, _, record in found], now_us
            )
            share.resume()
            for (key, base, _), record in zip(found, folded, strict=True):
                encoded = encode(release.storable(record))
                file.write(_STAGED.pack(key, base, len(encoded)) + encoded)
                await share.leave()
            self._metrics.rebuilds.inc(len(folded))
            count += len(folded)
        return count

    async def _active(
        self, release: ServingRelease, since_us: int, share: LoopShare
    ) -> list[bytes]:
        active: list[bytes] = []
        after = b""
        while True:
            keys, after = await asyncio.to_thread(self._store.scan, after, _SLICE)
            stored = await asyncio.to_thread(self._store.get_many, keys)
            share.resume()
            for key, record in zip(keys, stored, strict=True):
                if (
                    record is not None
                    and record.release != release.number
                    and len(record.journal)
                    and record.journal.timestamps_us[-1] >= since_us
                ):
                    active.append(key)
                await share.leave()
            if not after:
                return active

    async def _snapshot_rows(
        self, release: ServingRelease, keys: set[bytes], share: LoopShare
    ) -> dict[bytes, int]:
        rows: dict[bytes, int] = {}
        users = release.snapshot.users
        for first in range(0, len(users), _SLICE):
            if len(rows) == len(keys):
                break
            places = range(first, min(first + _SLICE, len(users)))
            for row, user_id in zip(places, users.ids(places), strict=True):
                key = user_key(user_id)
                if key in keys:
                    rows[key] = row
            await share.leave()
        return rows


def _at(release: ServingRelease, rows: dict[bytes, int], key: bytes) -> UserSnapshot | None:
    row = rows.get(key)
    return None if row is None else release.snapshot.at(row)


def _read(file: BinaryIO) -> Iterator[tuple[bytes, int, bytes]]:
    file.seek(0)
    while head := file.read(_STAGED.size):
        key, base, size = _STAGED.unpack(head)
        yield key, base, file.read(size)
