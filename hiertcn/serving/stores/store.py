"""What serving needs of a store of user records, whichever database holds them.

Records are read by key and written by compare-and-set: a change names the revision it was made
from, and is refused if the store holds another by then. With one writing process (LMDB,
``store_lmdb.py``) nothing is ever refused but folds that came too late; with several on one
Valkey (``store_valkey.py``) the refused writer reads again and applies its entries anew, so no
update is lost.

The position of the event log up to which entries are applied is kept in the same transaction as
the records, so replay neither skips nor repeats an entry.
"""

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple, Protocol

from hiertcn.errors import ServingError
from hiertcn.serving.log.event_log import Position
from hiertcn.serving.records.record import UserRecord


class Change(NamedTuple):
    """A record to be stored (None: removed) in place of the one with ``base_revision``.

    ``base_revision`` is None if there was no record, ``record.DAMAGED`` if it fails its checksum.
    """

    record: UserRecord | None
    base_revision: int | None


class StoreBehindError(ServingError):
    """The store lacks entries that it had: its newest (a failover, a restart), or all (damage).

    Nothing was written; applying the log from :attr:`RecordStore.applied` on heals it.
    """


class RecordStore(Protocol):
    """User records by key. Reads may come from any thread, writes from one."""

    @property
    def is_local(self) -> bool:
        """Whether a read costs microseconds and waits for no network."""
        ...

    @property
    def applied(self) -> Position:
        """The log position up to which every entry is applied.

        Raises:
            ServingError: the store cannot be reached.
        """
        ...

    @property
    def newest_applied(self) -> Position:
        """The newest log position that an applied entry has.

        Raises:
            ServingError: the store cannot be reached.
        """
        ...

    def applied_for(self, key: bytes) -> Position:
        """The position up to which this user's entries are applied, at or after ``applied``.

        As of the last read of :attr:`applied`, or of the last write.
        """
        ...

    def get(self, key: bytes) -> UserRecord | None:
        """The user's record, or None; a damaged one counts as None, see :meth:`damaged`.

        Raises:
            ServingError: the store cannot be reached.
        """
        ...

    def get_many(self, keys: Sequence[bytes]) -> list[UserRecord | None]:
        """The users' records ``[n]``, read together.

        Raises:
            ServingError: the store cannot be reached.
        """
        ...

    def damaged(self) -> Set[bytes]:
        """Users whose record was found damaged here, and has not been read whole since.

        Only a change that is based on ``record.DAMAGED`` takes its place.
        """
        ...

    def write(self, changes: Mapping[bytes, Change], applied: Position | None = None) -> set[bytes]:
        """Make the changes whose base is stored, and note the log position with them.

        Args:
            changes: by the user's key.
            applied: every entry of the log up to here is in the changes or was applied before.

        Returns:
            The keys that were refused, for which the position did not move either. They are to be
            read, changed and written again before anything newer.

        Raises:
            StoreBehindError: the store lost its newest writes.
            ServingError: it cannot be written or reached.
        """
        ...

    def scan(self, after: bytes, count: int) -> tuple[list[bytes], bytes]:
        """About ``count`` users' keys, and what to go on from; ``b""`` begins and is the end.

        A record that stays from the first call to the last is met at least once.

        Raises:
            ServingError: the store cannot be reached.
        """
        ...

    @property
    def live_bytes(self) -> int:
        """Bytes of disk that the records occupy; 0 for a server, which has its own limit."""
        ...

    def __len__(self) -> int:
        """How many users have a record."""
        ...

    def sync(self) -> None:
        """Wait until everything written is as durable as this store makes it."""
        ...

    def close(self) -> None:
        """Sync and close."""
        ...
