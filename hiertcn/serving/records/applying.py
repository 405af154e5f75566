"""Applies logged entries to the users' records: each exactly once, in the order of the log.

A record that fails its checksum is made again by the same rules: from the release's snapshot and
every entry that the log still holds of the user, which is all that came after that snapshot.
"""

import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np

from hiertcn.errors import InputError, ServingError
from hiertcn.serving.live.recent_interactions import BEGAN, RecentInteractions
from hiertcn.serving.log.event_log import (
    BEGINNING,
    Entry,
    EventLog,
    LoggedDeletion,
    LoggedInteraction,
    Position,
)
from hiertcn.serving.log.logged_items import LoggedItem
from hiertcn.serving.new_items.new_items import NewItems
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.records.fold import (
    UNKNOWN_ROW,
    JournalBound,
    Outcome,
    history,
    rebuilt,
    rebuilt_from,
    recorded,
)
from hiertcn.serving.records.record import DAMAGED, UserRecord, new_record, user_key
from hiertcn.serving.releases.serving_release import ServingRelease
from hiertcn.serving.stores.store import Change, RecordStore

_log = logging.getLogger(__name__)

_MAX_CONFLICTS: Final = 1000
_REVISIONS: Final = 1 << 30


class Applied(NamedTuple):
    """What became of one logged entry.

    ``known_item`` is false for items without a row; ``previous`` is the item before it in its
    session, `BEGAN` where it began one, None where it came late or is no interaction.
    """

    outcome: Outcome
    known_item: bool
    previous: str | None = None


UserEntry = LoggedInteraction | LoggedDeletion
Tell = Callable[
    [Sequence[tuple[str, int]], Sequence[str | None], Sequence[LoggedDeletion], Position], None
]


class EntryApplier:
    """Applies entries to the records of a store, to the live counts' source and the new items.

    ``tell``, if set, hears what was accepted and who was deleted (``SharedArrivals.tell``).

    Args:
        store: the user records.
        log: where the entries come from.
        current: gives the release that serves, and what journals may keep.
        recent: what live counts are fed by.
        metrics: where rebuilt records are counted.
        new_items: upserted items.
    """

    def __init__(
        self,
        store: RecordStore,
        log: EventLog,
        current: Callable[[], tuple[ServingRelease, JournalBound]],
        recent: RecentInteractions,
        metrics: Metrics,
        new_items: NewItems,
    ) -> None:
        self._store = store
        self._event_log = log
        self._current = current
        self._recent = recent
        self._metrics = metrics
        self._new_items = new_items
        self.tell: Tell | None = None
        self.counted = BEGINNING
        """Up to where live counts and ``tell`` have had the log: a store that lost records is given
        entries again."""

    def apply(self, entries: Sequence[Entry], position: Position) -> list[Applied]:
        """Apply the entries that the log ends at ``position`` with, or those before them again.

        Raises:
            ServingError: the store cannot be written.
            StoreBehindError: the store has lost entries before these.
        """
        of_users = [entry for entry in entries if not isinstance(entry, LoggedItem)]
        applied = iter(self._apply_to_users(of_users, position))
        results = []
        for entry in entries:
            if isinstance(entry, LoggedItem):
                self._new_items.put(entry)
                results.append(Applied(Outcome.ACCEPTED, known_item=True))
            else:
                results.append(next(applied))
        return results

    def repair(self, keys: Collection[bytes]) -> None:
        """Make records again that the store found damaged.

        Reads the whole log. Of a store that sidecars share, it knows what was recorded here.

        Raises:
            ServingError: the store cannot be read or written.
        """
        keys = list(keys)
        damaged = self._store.damaged()
        stored = dict(zip(keys, self._store.get_many(keys), strict=True))
        if self._store.is_local:
            # Nobody else can have made them again without what this log says of them.
            stored = {key: one for key, one in stored.items() if one is None and key in damaged}
        if not stored:
            return
        release, bound = self._current()
        changes = {}
        for key, entries in self._logged(stored).items():
            base = record = stored[key]
            if record is None and entries:
                # A fold of the record from before the damage must not fit this one.
                revision = secrets.randbelow(_REVISIONS)
                record = replace(new_record(np.asarray(release.start_state)), revision=revision)
            items = [one.item_id for one in entries if isinstance(one, LoggedInteraction)]
            rows = iter(release.item_rows(items).tolist())
            for entry in entries:
                row = next(rows) if isinstance(entry, LoggedInteraction) else UNKNOWN_ROW
                record, _ = self._with_entry(record, entry, row, release, bound)
            if base is None:
                changes[key] = Change(record, DAMAGED if key in damaged else None)
            elif record is not base:
                changes[key] = Change(record, base.revision)
        made = changes.keys() - self._store.write(changes)
        self._metrics.records_repaired.inc(len(made))
        _log.warning("made %d damaged user records again from snapshot and log", len(made))

    def _logged(self, keys: Collection[bytes]) -> dict[bytes, list[UserEntry]]:
        """What the log says of some users, and the store has been told; oldest first."""
        until = {key: self._store.applied_for(key) for key in keys}
        newest = max(until.values())
        found: dict[bytes, list[UserEntry]] = {key: [] for key in keys}
        try:
            for end, entry in self._event_log.replay():
                if end > newest:
                    break
                if isinstance(entry, LoggedItem):
                    continue
                key = key_of(entry)
                if end <= until.get(key, BEGINNING):
                    if isinstance(entry, LoggedDeletion):
                        found[key].clear()
                    found[key].append(entry)
        except InputError as error:
            _log.error("%s; records are made again from what comes before", error)
        return found

    def _apply_to_users(self, entries: Sequence[UserEntry], position: Position) -> list[Applied]:
        release, bound = self._current()
        interactions = [entry for entry in entries if isinstance(entry, LoggedInteraction)]
        rows = iter(release.item_rows([entry.item_id for entry in interactions]).tolist())
        pending = {
            place: (
                key_of(entry),
                next(rows) if isinstance(entry, LoggedInteraction) else UNKNOWN_ROW,
            )
            for place, entry in enumerate(entries)
        }
        applied: dict[int, Applied] = {}
        # A local store commits records and position together.
        for place, (key, _) in [] if self._store.is_local else list(pending.items()):
            if self._store.applied_for(key) >= position:
                # An attempt that failed at another user's record had written this one.
                applied[place] = Applied(Outcome.ACCEPTED, known_item=True)
                del pending[place]
        for _ in range(_MAX_CONFLICTS):
            keys = list(dict.fromkeys(key for key, _ in pending.values()))
            stored = dict(zip(keys, self._store.get_many(keys), strict=True))
            if damaged := self._store.damaged() & set(keys):
                self.repair(damaged)
                stored = dict(zip(keys, self._store.get_many(keys), strict=True))
            user_of = {
                key: entry.user_id
                for place, (key, _) in pending.items()
                if isinstance(entry := entries[place], LoggedInteraction)
            }
            records = self._under(release, stored, user_of)
            for place, (key, row) in pending.items():
                records[key], applied[place] = self._with_entry(
                    records[key], entries[place], row, release, bound
                )
            refused = self._store.write(_changes(stored, records), position)
            # Only another process on the same store can have been faster.
            pending = {place: one for place, one in pending.items() if one[0] in refused}
            if not pending:
                break
        else:
            raise ServingError(
                "interactions could not be applied, because other writers changed the same users' "
                f"records {_MAX_CONFLICTS} times meanwhile; retry"
            )
        if position > self.counted:
            self._count(
                [
                    (entry, applied[place].previous)
                    for place, entry in enumerate(entries)
                    if applied[place].outcome is not Outcome.DUPLICATE
                ],
                position,
            )
            self.counted = position
        return [applied[place] for place in range(len(entries))]

    def _count(self, changed: Sequence[tuple[UserEntry, str | None]], position: Position) -> None:
        accepted = [
            (entry, previous) for entry, previous in changed if isinstance(entry, LoggedInteraction)
        ]
        arrivals = [(entry.item_id, entry.timestamp_us) for entry, _ in accepted]
        previous = [before for _, before in accepted]
        self._recent.add(arrivals, previous)
        if self.tell is not None:
            deletions = [one for one, _ in changed if isinstance(one, LoggedDeletion)]
            self.tell(arrivals, previous, deletions, position)

    def _under(
        self,
        release: ServingRelease,
        stored: dict[bytes, UserRecord | None],
        user_of: dict[bytes, str],
    ) -> dict[bytes, UserRecord | None]:
        """The records, those that interactions come to rebuilt for the release in one look-up."""
        outdated = [
            key
            for key in user_of
            if (record := stored[key]) is None or record.release != release.number
        ]
        snapshots = release.user_snapshots([user_of[key] for key in outdated])
        self._metrics.rebuilds.inc(len(outdated))
        return stored | {
            key: rebuilt_from(stored[key], snapshot, release)
            for key, snapshot in zip(outdated, snapshots, strict=True)
        }

    def _with_entry(
        self,
        record: UserRecord | None,
        entry: UserEntry,
        row: int,
        release: ServingRelease,
        bound: JournalBound,
    ) -> tuple[UserRecord, Applied]:
        if isinstance(entry, LoggedDeletion):
            if record is not None and record.erased_us >= entry.deleted_us:
                # Told of or replayed: what came since must stay.
                return record, Applied(Outcome.DUPLICATE, known_item=True)
            known = Applied(Outcome.ACCEPTED, record is not None)
            return _erased(entry, record, release), known
        if record is None or record.release != release.number:
            # A deletion, or an entry that joined a folded session, came just before in the group.
            self._metrics.rebuilds.inc()
            record = rebuilt(record, entry.user_id, release)
        after, outcome = recorded(
            record,
            entry.item_id,
            row,
            entry.timestamp_us,
            entry.key,
            gap_us=release.gap_us,
            bound=bound,
        )
        previous = None
        if outcome is Outcome.ACCEPTED:
            previous = _previous_item(record, entry.timestamp_us, release)
        return release.storable(after), Applied(outcome, row != UNKNOWN_ROW, previous)


def key_of(entry: UserEntry) -> bytes:
    """The store's key of the user whom an entry is about."""
    return entry.user_key if isinstance(entry, LoggedDeletion) else user_key(entry.user_id)


def _previous_item(record: UserRecord, timestamp_us: int, release: ServingRelease) -> str | None:
    """The item that a user's open session was at, `BEGAN` if none is open, None before its last.

    Items that the release does not know are passed over, as they are in a session store.
    """
    rows, timestamps_us = history(release.resolved(record))
    if not len(rows) or timestamp_us - timestamps_us[-1] > release.gap_us:
        return BEGAN
    if timestamp_us < timestamps_us[-1]:
        return None
    return release.items.ids(rows[-1:])[0]


def _changes(
    stored: dict[bytes, UserRecord | None], records: dict[bytes, UserRecord | None]
) -> dict[bytes, Change]:
    return {
        key: Change(record, base.revision if base is not None else None)
        for (key, base), record in zip(stored.items(), records.values(), strict=True)
        if record is not base
    }


def _erased(
    entry: LoggedDeletion, before: UserRecord | None, release: ServingRelease
) -> UserRecord:
    return replace(
        new_record(np.asarray(release.start_state)),
        revision=before.revision + 1 if before is not None else 1,
        erased_us=entry.deleted_us,
    )
