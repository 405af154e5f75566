"""Goes over the user records for ever, a slice at a time: folds, forgets, and keeps the bounds.

- A session that closed without another touch is folded: all due users of a slice in one call of
  ``gru_step``. So the next request finds the state ready, and an idle user's record is up to date.
- A record without an interaction for ``user_ttl_s`` is removed, and so is what is left of a
  deleted user once no live snapshot knows the user.
- While the store holds more than ``limit_bytes``, the longest idle records are removed, down to
  nine tenths of it. Their last day is in the log, their past in the next release.

A fold or removal is kept only if the record did not change meanwhile (compare-and-set), and state
and folded point are written together: whatever dies in between, a session is folded once.
Records of another release are left to the first touch and to the warmer (``warmer.py``).
"""

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Final

import numpy as np

from hiertcn.errors import HiertcnError
from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.ranking.batching import ModelBatcher
from hiertcn.serving.records import fold
from hiertcn.serving.records.batch_fold import fold_closed, settled_until_us
from hiertcn.serving.records.fold import JournalBound
from hiertcn.serving.records.record import NEVER_US, UserRecord
from hiertcn.serving.records.writer import RecordWriter
from hiertcn.serving.releases.serving_release import ServingRelease
from hiertcn.serving.rpc.validation import wall_clock_us
from hiertcn.serving.stores.store import RecordStore

_log = logging.getLogger(__name__)

SLICE: Final = 128
"""Records read at once: 6 ms of the event loop, which requests can bear."""

_PAUSE_S: Final = 0.125
_BETWEEN_PASSES_S: Final = 30.0
"""A small store would otherwise be swept all the time, at a tenth of the event loop's."""
_AFTER_ERROR_S: Final = 5.0
_SAMPLE: Final = 65_536
_DOWN_TO: Final = 0.9


class Sweeper:
    """The endless pass over one store's records.

    Args:
        store: the records, read here, written by ``writer``.
        writer: keeps folds and removes records.
        models: the batched models.
        current: gives the release that serves, and what journals may keep.
        recent: what was recorded, whose time folding goes by.
        metrics: where folds are counted.
        user_ttl_s: seconds without an interaction after which a record is removed; 0 never.
        limit_bytes: most bytes of records; 0 for no limit. Ignored by a store that others bound.
    """

    def __init__(
        self,
        store: RecordStore,
        writer: RecordWriter,
        models: ModelBatcher,
        current: Callable[[], tuple[ServingRelease, JournalBound]],
        recent: RecentInteractions,
        metrics: Metrics,
        *,
        user_ttl_s: float = 0.0,
        limit_bytes: int = 0,
    ) -> None:
        self._store = store
        self._writer = writer
        self._models = models
        self._current = current
        self._recent = recent
        self._metrics = metrics
        self._ttl_us = int(user_ttl_s * 1e6)
        self._limit_bytes = limit_bytes
        self._after = b""
        self._idle_before_us = NEVER_US
        self._last_seen_us: list[int] = []
        self._draw = np.random.default_rng(0)

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                was_last = await self.step(wall_clock_us())
                await asyncio.sleep(_BETWEEN_PASSES_S if was_last else _PAUSE_S)
            except HiertcnError as error:
                _log.warning("sweeping user records paused: %s", error)
                await asyncio.sleep(_AFTER_ERROR_S)
            except Exception:
                _log.exception("sweeping user records failed; going on")
                await asyncio.sleep(_AFTER_ERROR_S)

    async def step(self, now_us: int) -> bool:
        """Sweep one slice; return whether it was the last of a pass.

        Args:
            now_us: what idle users are idle for. Sessions are folded by the log's own time.

        Raises:
            ServingError: store or model cannot be reached; the slice comes again.
        """
        keys, after = await asyncio.to_thread(self._store.scan, self._after, SLICE)
        stored = await asyncio.to_thread(self._store.get_many, keys)
        release, bound = self._current()
        folds_until_us = settled_until_us(release, self._recent)
        with release.held():
            due: list[tuple[bytes, UserRecord]] = []
            for key, record in zip(keys, stored, strict=True):
                if record is None:
                    continue
                if self._is_needless(record, bound, now_us):
                    self._writer.remove(key, record.revision)
                elif record.release == release.number and _is_due(record, release, folds_until_us):
                    due.append((key, release.resolved(record)))
            records = [record for _, record in due]
            next_states = functools.partial(self._models.next_states, release)
            folded = await fold_closed(next_states, release, records, folds_until_us)
            for (key, before), record in zip(due, folded, strict=True):
                self._writer.keep_fold(key, before.revision, release.storable(record))
                self._metrics.sessions_folded.inc(record.revision - before.revision)
        self._after = after
        if not after:
            self._idle_before_us = self._cutoff()
            self._last_seen_us.clear()
        return not after

    def _is_needless(self, record: UserRecord, bound: JournalBound, now_us: int) -> bool:
        seen_us = last_seen_us(record)
        if seen_us == NEVER_US:
            # Nothing since a deletion: needed until no snapshot knows the user.
            return NEVER_US < record.erased_us < bound.oldest_watermark_us
        if self._limit_bytes:
            if len(self._last_seen_us) < _SAMPLE:
                self._last_seen_us.append(seen_us)
            else:
                self._last_seen_us[int(self._draw.integers(_SAMPLE))] = seen_us
        if record.erased_us >= bound.oldest_watermark_us:
            return False
        is_idle = bool(self._ttl_us) and seen_us < now_us - self._ttl_us
        return is_idle or seen_us < self._idle_before_us

    def _cutoff(self) -> int:
        live = self._store.live_bytes if self._limit_bytes else 0
        if live <= self._limit_bytes or not self._last_seen_us:
            return NEVER_US
        share = 1.0 - _DOWN_TO * self._limit_bytes / live
        _log.info("removing the longest idle %.0f%% of user records: %d bytes", 100 * share, live)
        return int(np.quantile(np.array(self._last_seen_us), share, method="higher"))


def last_seen_us(record: UserRecord) -> int:
    """Time of the user's newest interaction that the record knows of, ``NEVER_US`` if none."""
    newest_us = record.folded_until_us
    for times_us in (record.journal.timestamps_us, record.history_timestamps_us):
        if len(times_us):
            newest_us = max(newest_us, int(times_us[-1]))
    return newest_us


def _is_due(record: UserRecord, release: ServingRelease, now_us: int) -> bool:
    # The cut of most records is not needed: nothing lies after their folded point, or one session
    # that is still open.
    since_us, newest_us = record.folded_until_us, last_seen_us(record)
    if newest_us <= since_us:
        return False
    oldest_us = min(
        int(times_us[np.searchsorted(times_us, since_us, side="right")])
        for times_us in (record.journal.timestamps_us, record.history_timestamps_us)
        if len(times_us) and times_us[-1] > since_us
    )
    if newest_us - oldest_us <= release.gap_us and now_us - newest_us <= release.gap_us:
        return False
    return bool(fold.sessions(record, gap_us=release.gap_us, now_us=now_us).closed)
