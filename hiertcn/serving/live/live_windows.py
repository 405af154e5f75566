"""How often each item was interacted with in the last minutes, kept for a release that serves.

The windows are those of ``hiertcn.sessions.live_counts``: at time ``t``, in the minute ``b``, the
interactions of the minutes ``b - w .. b - 1``. The counts of a release are its own up to its
watermark (the ``live_counts`` part) and, beyond it, what was recorded here, whoever the user and
however late; so a restart or a flip of release forgets nothing, and rows are always the release's.

Counts are kept by minute and item. Those of the windows are dense, moved from minute to minute by
what enters and leaves, so a request within the same minute costs microseconds and a new minute the
interactions of the minutes that changed. Two times may be asked in turn (a replay beside the
present) without counting anew.

Bounded: the newest 1,860 minutes that saw an interaction, and 32 million counts of a minute and an
item (8 bytes each). Interactions more than a day ahead of the clock are refused at the door, so
whatever arrives, the six hours before the clock stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.files import read_json, whole_directory, write_json
from hiertcn.serving.live.live_followers import LiveFollowers, ReleasedTransitions
from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.sessions.live_counts import MINUTE_US, WINDOWS_MINUTES, minute_counts
from hiertcn.sessions.live_transitions import START, LiveTransitions
from hiertcn.sessions.store import SessionStore

_FORMAT: Final = 1
_MAX_MINUTES: Final = 1440 + 420
_MAX_COUNTS: Final = 32_000_000
_PIECES: Final = 16
_FAR_MINUTES: Final = 60
_KEPT_TIMES: Final = 2


@dataclass(frozen=True, kw_only=True)
class MinuteCounts:
    """Interactions by minute and item: the ``live_counts`` part of a release.

    Attributes:
        minutes: int64 ``[k]``, minutes since the epoch, ascending.
        item_rows: int32 ``[k]``, rows of the release.
        counts: int32 ``[k]``.
        watermark_us: time of the last interaction counted, in microseconds.
    """

    minutes: NDArray[np.int64]
    item_rows: NDArray[np.int32]
    counts: NDArray[np.int32]
    watermark_us: int

    @classmethod
    def of(cls, store: SessionStore) -> Self:
        """Count what the windows can still reach at the store's watermark."""
        until_us = store.meta.watermark_us
        # The longest window ends before the running minute, which is counted for those after it.
        minutes, rows, counts = minute_counts(store, until_us, WINDOWS_MINUTES[-1] + 1)
        return cls(minutes=minutes, item_rows=rows, counts=counts, watermark_us=until_us)

    def save(self, directory: Path) -> None:
        """Write the folder ``directory``, whole or not at all."""
        with whole_directory(directory) as folder:
            np.save(folder / "minutes.npy", self.minutes, allow_pickle=False)
            np.save(folder / "item_rows.npy", self.item_rows, allow_pickle=False)
            np.save(folder / "counts.npy", self.counts, allow_pickle=False)
            write_json(
                folder / "header.json", {"format": _FORMAT, "watermark_us": self.watermark_us}
            )

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: a file is missing or damaged, or the arrays do not fit together.
        """
        header = read_json(directory / "header.json")
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise InputError(
                f"{directory / 'header.json'} does not describe live counts of format {_FORMAT}; "
                "run backfill_user_states again"
            )
        try:
            minutes, rows, counts = (
                np.load(directory / f"{name}.npy", allow_pickle=False)
                for name in ("minutes", "item_rows", "counts")
            )
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"the live counts of {directory} cannot be read ({error}); run "
                "backfill_user_states again"
            ) from None
        if not minutes.shape == rows.shape == counts.shape == (len(minutes),):
            raise InputError(
                f"the live counts of {directory} have {minutes.shape} minutes, {rows.shape} item "
                f"rows and {counts.shape} counts; expected one of each, so run "
                "backfill_user_states again"
            )
        return cls(
            minutes=minutes,
            item_rows=rows,
            counts=counts,
            watermark_us=int(header["watermark_us"]),
        )


class LiveLevels(NamedTuple):
    """Items with any interaction, grouped by equal counts in every window.

    Attributes:
        counts: float32 ``[windows, levels]``.
        rows: int64 ``[live]``, of one level after another.
        offsets: int64 ``[levels + 1]``, where each level's rows begin.
    """

    counts: NDArray[np.float32]
    rows: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def best(self, weights: NDArray[np.float32], most: int) -> NDArray[np.int64]:
        """Rows of the ``most`` items with the largest ``weights [windows] @ counts``."""
        order = np.argsort(-(weights @ self.counts), kind="stable")
        sizes = np.diff(self.offsets)[order]
        levels = order[: int(np.searchsorted(np.cumsum(sizes), most)) + 1]
        return np.concatenate(
            [self.rows[self.offsets[level] : self.offsets[level + 1]] for level in levels.tolist()]
            or [self.rows]
        )[:most]


@dataclass
class LiveCountsAt:
    """The windows before one minute.

    Attributes:
        minute: the running minute, since the epoch.
        by_item: float32 ``[items, windows]``, whole numbers; an item's lie together.
        transitions: the newest ones that are known, whatever the minute.
    """

    minute: int
    by_item: NDArray[np.float32]
    transitions: LiveTransitions
    _rows: NDArray[np.int64] | None = None
    _counts_of_rows: NDArray[np.float32] | None = None
    _totals: NDArray[np.float32] | None = None
    _levels: LiveLevels | None = None

    @property
    def counts(self) -> NDArray[np.float32]:
        """The same as ``[windows, items]``, a view."""
        return self.by_item.T

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows ``[live]`` of the items with any interaction in the longest window, ascending."""
        if self._rows is None:
            self._rows = np.flatnonzero(self.counts[-1])
        return self._rows

    @property
    def counts_of_rows(self) -> NDArray[np.float32]:
        """The counts of ``rows``, float32 ``[windows, live]``."""
        if self._counts_of_rows is None:
            self._counts_of_rows = self.counts[:, self.rows]
        return self._counts_of_rows

    @property
    def totals(self) -> NDArray[np.float32]:
        """Interactions with any item in each window, float32 ``[windows]``."""
        if self._totals is None:
            self._totals = self.counts_of_rows.sum(axis=1)
        return self._totals

    @property
    def levels(self) -> LiveLevels:
        """``rows`` grouped by equal counts; made once a minute, in about 0.1 us a row."""
        if self._levels is None:
            # Counts of a shorter window are no larger, so the last one bounds the number's digits.
            base = int(self.counts[-1].max(initial=0.0)) + 1
            keys = np.zeros(len(self.rows), np.int64)
            for counts in self.counts_of_rows.astype(np.int64):
                keys = keys * base + counts
            order = np.argsort(keys, kind="stable")
            found = keys[order]
            starts = np.flatnonzero(np.diff(found, prepend=-1))
            self._levels = LiveLevels(
                counts=self.counts_of_rows[:, order[starts]],
                rows=self.rows[order],
                offsets=np.append(starts, len(order)),
            )
        return self._levels

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The counts of any rows, float32 ``[windows, n]``; 0 for items newer than the counts."""
        items = self.counts.shape[1]
        if not len(rows) or int(rows.max()) < items:
            return self.counts[:, rows]
        counts: NDArray[np.float32] = self.counts[:, np.minimum(rows, items - 1)]
        counts[:, rows >= items] = 0.0
        return counts

    def touch(self) -> None:
        """Note that the counts have changed."""
        self._rows = self._counts_of_rows = self._totals = self._levels = None


@dataclass
class _Minute:
    """Counts of one minute, in pieces; rows are distinct within a piece."""

    rows: list[NDArray[np.int32]] = field(default_factory=list)
    counts: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, rows: NDArray[np.int32], counts: NDArray[np.float32]) -> int:
        """Add a piece; return by how many entries the minute has grown."""
        self.rows.append(rows)
        self.counts.append(counts)
        if len(self.rows) < _PIECES:
            return len(rows)
        before = sum(map(len, self.rows)) - len(rows)
        joined, place = np.unique(np.concatenate(self.rows), return_inverse=True)
        summed = np.bincount(place, weights=np.concatenate(self.counts))
        self.rows, self.counts = [joined], [summed.astype(np.float32)]
        return len(joined) - before

    def add_to(self, out: NDArray[np.float32], sign: float) -> None:
        for rows, counts in zip(self.rows, self.counts, strict=True):
            out[rows] += sign * counts

    @property
    def size(self) -> int:
        return sum(map(len, self.rows))


class LiveWindows:
    """The live counts of one release. Not thread-safe: one thread at a time asks.

    Args:
        items: length of the catalogue.
        item_rows: the release's rows of item ids, -1 where unknown.
        watermark_us: interactions recorded up to it are the release's own business.
        recent: what was recorded.
        before: the release's own counts; None where it brings none.
        transitions_before: the release's own newest transitions; None where it brings none.
    """

    def __init__(
        self,
        items: int,
        item_rows: Callable[[Sequence[str]], NDArray[np.int64]],
        watermark_us: int,
        recent: RecentInteractions,
        before: MinuteCounts | None = None,
        transitions_before: ReleasedTransitions | None = None,
    ) -> None:
        self._items = items
        self._followers = LiveFollowers(items, transitions_before)
        self._item_rows = item_rows
        self._watermark_us = watermark_us
        self._recent = recent
        self._place = 0
        self._minutes: dict[int, _Minute] = {}
        self._newest = 0
        self._entries = 0
        self._asked: list[LiveCountsAt] = []
        if before is not None:
            self._add(before.minutes, before.item_rows, before.counts.astype(np.float32))
        self._catch_up()

    def widen(self, items: int) -> None:
        """Make room for items that came after the release; those before keep their counts."""
        self._items = max(self._items, items)
        self._followers.widen(self._items)
        for asked in self._asked:
            asked.transitions = self._followers.arrays
            more = self._items - len(asked.by_item)
            asked.by_item = np.pad(asked.by_item, ((0, more), (0, 0)))
            asked.touch()

    @property
    def interactions(self) -> int:
        """Interactions within the longest window before the minute last asked about."""
        return int(self._asked[-1].counts[-1].sum()) if self._asked else 0

    @property
    def newest_us(self) -> int:
        """Start of the newest minute that saw an interaction, in microseconds; 0 if none did."""
        return self._newest * MINUTE_US

    def at(self, timestamp_us: int) -> LiveCountsAt:
        """The windows before the minute of ``timestamp_us``; valid until the next call."""
        self._catch_up()
        minute = timestamp_us // MINUTE_US
        if self._asked and self._asked[-1].minute == minute:
            return self._asked[-1]
        nearest = min(self._asked, key=lambda one: abs(one.minute - minute), default=None)
        if nearest is not None and abs(nearest.minute - minute) <= _FAR_MINUTES:
            self._asked.remove(nearest)
            self._move(nearest, minute)
        else:
            nearest = self._counted(minute)
            del self._asked[: len(self._asked) - _KEPT_TIMES + 1]
        self._asked.append(nearest)
        return nearest

    def _catch_up(self) -> None:
        if self._place == self._recent.end:
            return
        found, self._place = self._recent.since(self._place)
        transitions = []
        for item_ids, codes, timestamps_us, previous in found:
            row_of = self._item_rows(item_ids)
            rows = row_of[codes]
            counted = (rows >= 0) & (timestamps_us > self._watermark_us)
            left = np.where(previous >= 0, row_of[np.maximum(previous, 0)], START)
            moved = counted & ((left >= 0) | (previous == START))
            transitions.append((left[moved], rows[moved], timestamps_us[moved]))
            rows, minutes = rows[counted], timestamps_us[counted] // MINUTE_US
            self._add(minutes, rows.astype(np.int32), np.ones(len(rows), np.float32))
        if transitions:
            self._followers.add(*map(np.concatenate, zip(*transitions, strict=True)))

    def _add(
        self, minutes: NDArray[np.int64], rows: NDArray[np.int32], counts: NDArray[np.float32]
    ) -> None:
        if not len(minutes):
            return
        order = np.lexsort((rows, minutes))
        minutes, rows, counts = minutes[order], rows[order], counts[order]
        is_first = np.ones(len(rows), np.bool_)
        is_first[1:] = (minutes[1:] != minutes[:-1]) | (rows[1:] != rows[:-1])
        firsts = np.flatnonzero(is_first)
        counts = np.add.reduceat(counts, firsts).astype(np.float32)
        minutes, rows = minutes[firsts], rows[firsts]
        distinct, starts = np.unique(minutes, return_index=True)
        bounds = [*starts.tolist(), len(minutes)]
        for place, minute in enumerate(distinct.tolist()):
            piece = slice(bounds[place], bounds[place + 1])
            kept = self._minutes.setdefault(minute, _Minute())
            self._entries += kept.add(rows[piece], counts[piece])
            for asked in self._asked:
                self._count(asked, minute, rows[piece], counts[piece])
        self._newest = max(self._newest, int(distinct[-1]))
        while len(self._minutes) > _MAX_MINUTES or self._entries > _MAX_COUNTS:
            self._drop(min(self._minutes))

    def _drop(self, minute: int) -> None:
        dropped = self._minutes.pop(minute)
        self._entries -= dropped.size
        for asked in self._asked:
            for rows, counts in zip(dropped.rows, dropped.counts, strict=True):
                self._count(asked, minute, rows, -counts)

    def _count(
        self,
        asked: LiveCountsAt,
        minute: int,
        rows: NDArray[np.int32],
        counts: NDArray[np.float32],
    ) -> None:
        for window, length in enumerate(WINDOWS_MINUTES):
            if asked.minute - length <= minute < asked.minute:
                asked.counts[window, rows] += counts
                asked.touch()

    def _counted(self, minute: int) -> LiveCountsAt:
        counts = np.zeros((self._items, len(WINDOWS_MINUTES)), np.float32)
        for window, length in enumerate(WINDOWS_MINUTES):
            self._add_minutes(counts[:, window], minute - length, minute, 1.0)
        return LiveCountsAt(minute=minute, by_item=counts, transitions=self._followers.arrays)

    def _move(self, asked: LiveCountsAt, minute: int) -> None:
        before, sign = asked.minute, 1.0 if minute > asked.minute else -1.0
        low, high = min(before, minute), max(before, minute)
        for window, length in enumerate(WINDOWS_MINUTES):
            self._add_minutes(asked.counts[window], low, high, sign)
            self._add_minutes(asked.counts[window], low - length, high - length, -sign)
        asked.minute = minute
        asked.touch()

    def _add_minutes(self, out: NDArray[np.float32], low: int, high: int, sign: float) -> None:
        for minute in range(low, high):
            kept = self._minutes.get(minute)
            if kept is not None:
                kept.add_to(out, sign)
