"""How interactions become state: the law ``state(release, user) = fold(snapshot, journal)``.

Pure functions on records; nothing here reads a disk or calls a model. A record of another release
is rebuilt (snapshot's state plus the journal after its watermark), a recorded interaction enters
the journal, and whatever lies after the folded point is cut into sessions by the idle gap, so the
caller can push the closed ones through the GRU in order. The same record gives the user's recent
history, which the scoring terms read: the snapshot's followed by the journal's.

Interactions may arrive out of order. One at or before the folded point is late: kept for
training, never folded. One after it that lies within a gap of it belongs to a session already
folded; the record is then marked for rebuilding, so the session is folded again as a whole and
the law holds. Only where the journal's bound has pushed out what a rebuild needs does such an
interaction begin a session of its own.
"""

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from hiertcn.serving.records.record import (
    NEVER_US,
    NO_RELEASE,
    Journal,
    UserRecord,
    new_record,
)
from hiertcn.serving.records.snapshot import UserSnapshot
from hiertcn.sessions.memory import HISTORY

UNKNOWN_ROW: Final = -1


class StateSource(Protocol):
    """What folding needs of a release."""

    @property
    def number(self) -> int:
        """The release's number."""
        ...

    @property
    def watermark_us(self) -> int:
        """Event time up to which the release's snapshot has seen the log."""
        ...

    @property
    def start_state(self) -> NDArray[np.float32]:
        """float32 ``[layers, hidden]``, the state before the first session."""
        ...

    def item_rows(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of the items, -1 where unknown."""
        ...


class UserStates(StateSource, Protocol):
    """A release whose users' snapshots can be looked up."""

    def user_snapshot(self, user_id: str) -> UserSnapshot | None:
        """The user's snapshot, None for an unknown user."""
        ...


class Outcome(enum.Enum):
    """What became of a recorded interaction."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    LATE = "late"


@dataclass(frozen=True, kw_only=True)
class JournalBound:
    """What the journal keeps: at most ``entries``, and nothing up to ``oldest_watermark_us``."""

    entries: int
    oldest_watermark_us: int


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """The interactions after the folded point, cut by the idle gap.

    ``closed`` holds each closed session's item rows (int32, oldest first), ``closed_until_us``
    the time of each one's last interaction; ``open_rows`` is the session still open.
    """

    closed: list[NDArray[np.int32]]
    closed_until_us: list[int]
    open_rows: NDArray[np.int32]


def rebuilt(record: UserRecord | None, user_id: str, release: UserStates) -> UserRecord:
    """The user's record under ``release``, nothing after the snapshot folded yet."""
    return rebuilt_from(record, release.user_snapshot(user_id), release)


def rebuilt_from(
    record: UserRecord | None,
    snapshot: UserSnapshot | None,
    release: StateSource,
    journal_rows: NDArray[np.int64] | None = None,
) -> UserRecord:
    """:func:`rebuilt` with what ``release.user_snapshot`` says of the user.

    ``journal_rows`` is what ``release.item_rows`` says of the journal's items, if it was asked.
    """
    before = record if record is not None else new_record(release.start_state)
    if release.watermark_us <= before.erased_us:
        snapshot = None
    journal = before.journal
    if len(journal):
        rows = release.item_rows(journal.item_ids) if journal_rows is None else journal_rows
        journal = journal.with_rows(rows.astype(np.int32))
    return UserRecord(
        release=release.number,
        revision=before.revision + 1,
        watermark_us=release.watermark_us,
        folded_until_us=NEVER_US if snapshot is None else snapshot.folded_until_us,
        trimmed_until_us=before.trimmed_until_us,
        erased_us=before.erased_us,
        state=release.start_state if snapshot is None else _float32(snapshot.state),
        history_item_rows=_NO_ROWS if snapshot is None else snapshot.history_item_rows,
        history_timestamps_us=_NO_TIMES if snapshot is None else snapshot.history_timestamps_us,
        journal=journal,
    )


def recorded(
    record: UserRecord,
    item_id: str,
    item_row: int,
    timestamp_us: int,
    key: int,
    *,
    gap_us: int,
    bound: JournalBound,
) -> tuple[UserRecord, Outcome]:
    """The record after one more interaction; the same record if it was there before.

    Args:
        record: the user's record, of a release.
        item_id: the item's text id.
        item_row: its row in the record's release, ``UNKNOWN_ROW`` if it has none.
        timestamp_us: the interaction's time.
        key: the hash of the caller's idempotency key, 0 for none.
        gap_us: the release's session gap.
        bound: what the journal may keep.
    """
    if record.journal.contains(item_id, timestamp_us, key):
        return record, Outcome.DUPLICATE
    passed_by_state = timestamp_us <= record.folded_until_us
    late = passed_by_state or timestamp_us <= record.watermark_us
    joins_folded_session = (
        not late
        and item_row != UNKNOWN_ROW
        and timestamp_us - record.folded_until_us <= gap_us
        and record.trimmed_until_us <= record.watermark_us
    )
    journal = record.journal.inserted(
        item_id, item_row, timestamp_us, late=passed_by_state, key=key
    )
    journal, trimmed_until_us = _trimmed(journal, record.trimmed_until_us, bound)
    changed = replace(
        record,
        revision=record.revision + 1,
        release=NO_RELEASE if joins_folded_session else record.release,
        trimmed_until_us=trimmed_until_us,
        journal=journal,
    )
    return changed, Outcome.LATE if late else Outcome.ACCEPTED


def folded(record: UserRecord, state: NDArray[np.float32], folded_until_us: int) -> UserRecord:
    """The record after the closed sessions up to ``folded_until_us`` went through the GRU."""
    return replace(
        record, revision=record.revision + 1, state=state, folded_until_us=folded_until_us
    )


def _float32(state: NDArray[Any]) -> NDArray[np.float32]:
    return state.astype(np.float32, copy=False)


_NO_ROWS: Final = np.empty(0, np.int32)
_NO_TIMES: Final = np.empty(0, np.int64)


def sessions(record: UserRecord, *, gap_us: int, now_us: int) -> Sessions:
    """Cut what lies after the folded point; the last session is closed if idle over ``gap_us``.

    Items unknown to the release are skipped first, as in training, so they neither extend nor
    split a session.
    """
    item_rows, timestamps_us = unfolded(record)
    if not len(item_rows):
        return Sessions(closed=[], closed_until_us=[], open_rows=item_rows)
    bounds = [0, *(np.flatnonzero(np.diff(timestamps_us) > gap_us) + 1).tolist(), len(item_rows)]
    if now_us - int(timestamps_us[-1]) <= gap_us:
        open_from = bounds[-2]
        bounds.pop()
    else:
        open_from = len(item_rows)
    return Sessions(
        closed=[item_rows[a:b] for a, b in itertools.pairwise(bounds)],
        closed_until_us=[int(timestamps_us[b - 1]) for b in bounds[1:]],
        open_rows=item_rows[open_from:],
    )


def unfolded(record: UserRecord) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Rows and times ``[n]`` of the interactions after the folded point, oldest first."""
    journal = record.journal
    remembered_us = record.history_timestamps_us
    if not len(journal) and not (len(remembered_us) and remembered_us[-1] > record.folded_until_us):
        return _NO_ROWS, _NO_TIMES
    # The journal is sorted by time, so what the snapshot or the state has seen is a prefix.
    seen_until_us = max(record.folded_until_us, record.watermark_us)
    start = int(np.searchsorted(journal.timestamps_us, seen_until_us, side="right"))
    item_rows = journal.item_rows[start:]
    timestamps_us = journal.timestamps_us[start:]
    counts = (item_rows != UNKNOWN_ROW) & ~journal.late[start:]
    if not counts.all():
        item_rows, timestamps_us = item_rows[counts], timestamps_us[counts]
    carried = int(
        np.searchsorted(record.history_timestamps_us, record.folded_until_us, side="right")
    )
    if carried == len(record.history_timestamps_us):
        return item_rows, timestamps_us
    # The snapshot's open session ends at its watermark, so it precedes the journal's part.
    return (
        np.concatenate([record.history_item_rows[carried:], item_rows]),
        np.concatenate([record.history_timestamps_us[carried:], timestamps_us]),
    )


def history(record: UserRecord) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Rows and times ``[n]`` of the user's last ``HISTORY`` interactions, oldest first.

    Late ones have their place among them, as they will in the next snapshot; items unknown to the
    release are skipped. The session still open is its end.
    """
    journal = record.journal
    if not len(journal):
        return record.history_item_rows[-HISTORY:], record.history_timestamps_us[-HISTORY:]
    start = int(np.searchsorted(journal.timestamps_us, record.watermark_us, side="right"))
    known = journal.item_rows[start:] != UNKNOWN_ROW
    item_rows = journal.item_rows[start:][known][-HISTORY:]
    timestamps_us = journal.timestamps_us[start:][known][-HISTORY:]
    before = HISTORY - len(item_rows)
    if before == 0 or not len(record.history_item_rows):
        return item_rows, timestamps_us
    return (
        np.concatenate([record.history_item_rows[-before:], item_rows]),
        np.concatenate([record.history_timestamps_us[-before:], timestamps_us]),
    )


def seen_rows(record: UserRecord) -> NDArray[np.int64]:
    """Distinct rows of all items that the record knows the user to have interacted with, int64."""
    seen = np.union1d(record.history_item_rows, record.journal.item_rows)
    rows: NDArray[np.int64] = seen[seen != UNKNOWN_ROW].astype(np.int64)
    return rows


def last_known_rows(record: UserRecord, found: Sessions) -> NDArray[np.int32]:
    """Item rows of the newest session of which anything is known; empty if nothing is."""
    if len(found.open_rows):
        return found.open_rows
    if found.closed:
        return found.closed[-1]
    known: NDArray[np.int32] = record.journal.item_rows[record.journal.item_rows != UNKNOWN_ROW]
    return known[-1:]


def _trimmed(journal: Journal, trimmed_until_us: int, bound: JournalBound) -> tuple[Journal, int]:
    times_us = journal.timestamps_us
    needless = 0
    if times_us[0] <= bound.oldest_watermark_us:
        needless = int(times_us.searchsorted(bound.oldest_watermark_us, side="right"))
    drop = max(needless, len(times_us) - bound.entries)
    if drop <= 0:
        return journal, trimmed_until_us
    return journal.without_first(drop), max(trimmed_until_us, int(times_us[drop - 1]))
