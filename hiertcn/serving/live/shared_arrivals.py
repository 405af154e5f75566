"""Recorded interactions and deletions told to the other sidecars of one Valkey, by two streams.

Live counts and transitions are of the whole site, so every sidecar's ``RecentInteractions`` needs
what the others record. Each group of accepted interactions becomes one entry of the stream
``<prefix>:arrivals``, or several if it is long: item ids, the item before each in its session,
times, no users. Every process of every sidecar tails it, twice a second, from seven hours before
its start on. The process that writes skips its own sidecar's entries, which it has from its log.
The others take them too, because only the writing process knows which item a user was at when
another sidecar recorded that one. The stream holds at most about 100,000 entries, together no more
interactions than ``RecentInteractions`` keeps, and the server forgets it seven hours after the last
one.

Deletions go to ``<prefix>:deletions``, kept for 90 days: a sidecar that reads one logs it too, so
the person is erased from its log and exported events as well. The process that writes does that.

Telling is best effort after the commit: a sidecar that dies in between leaves the others' live
counts short by one group, and nothing else. The record's tombstone in the store is what forgets.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from hiertcn.errors import HiertcnError
from hiertcn.serving.live.recent_interactions import BEGAN, MOST, RecentInteractions
from hiertcn.serving.log.event_log import LoggedDeletion, Position
from hiertcn.serving.stores.store_valkey import ValkeyStore

_log = logging.getLogger(__name__)

_WINDOW_S: Final = 7 * 3600
_DELETIONS_S: Final = 90 * 86_400
_MOST: Final = 100_000
_TOGETHER: Final = MOST // _MOST
_READ: Final = 1000
_PAUSE_S: Final = 0.5


class SharedArrivals:
    """Tells the other sidecars, and listens to them on a thread.

    Args:
        store: the shared store.
        writer: a name of this sidecar's log that no other has.
        recent: takes what the others record.
        on_deletion: called with each deletion that another sidecar told of; None in a process
            that has no log to erase them from.
        own_after: end of what is known of this sidecar's own log, from where on its entries are
            taken too; None where they are known without.
    """

    def __init__(
        self,
        store: ValkeyStore,
        writer: str,
        recent: RecentInteractions,
        on_deletion: Callable[[LoggedDeletion], None] | None = None,
        own_after: Position | None = None,
    ) -> None:
        self._store = store
        self._writer = writer.encode()
        self._recent = recent
        self._on_deletion = on_deletion
        self._own_after = own_after
        self._arrivals = store.key("arrivals")
        self._deletions = store.key("deletions")
        self._place_key = store.key(f"deletions-seen:{writer}")
        since_ms = max(0, int((time.time() - _WINDOW_S) * 1000))
        self._after_arrival = b"%d-0" % since_ms
        self._after_deletion: bytes = store.execute("GET", self._place_key) or b"0-0"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="shared-arrivals", daemon=True)

    def start(self) -> None:
        """Take what was told before, and begin to listen.

        Raises:
            ServingError: the server cannot be reached.
        """
        self._read_all()
        self._thread.start()

    def tell(
        self,
        interactions: Sequence[tuple[str, int]],
        previous: Sequence[str | None],
        deletions: Sequence[LoggedDeletion],
        position: Position,
    ) -> None:
        """Tell the others; a server that is away is logged, not raised.

        Args:
            interactions: item ids and times in microseconds.
            previous: of each, the item before it in its session, see `RecentInteractions.add`.
            deletions: who was deleted.
            position: the end of all of them in this sidecar's log.
        """
        try:
            for first in range(0, len(interactions), _TOGETHER):
                part = slice(first, first + _TOGETHER)
                packed = _packed(interactions[part], previous[part], position)
                self._add(self._arrivals, _WINDOW_S, *packed)
            for deletion in deletions:
                told = deletion.user_key + deletion.deleted_us.to_bytes(8, "little")
                self._add(self._deletions, _DELETIONS_S, b"d", told)
        except HiertcnError as error:
            _log.warning("other sidecars are not told what was recorded here: %s", error)

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def read(self) -> int:
        """Take what the others have told since the last call; return how many entries.

        Raises:
            ServingError: the server cannot be reached.
        """
        count = 0
        for place, fields in self._range(self._arrivals, self._after_arrival):
            self._after_arrival = place
            count += 1
            if fields[b"w"] != self._writer or self._is_new_here(fields):
                self._recent.add(*_unpacked(fields))
        if self._on_deletion is None:
            return count
        for place, fields in self._range(self._deletions, self._after_deletion):
            if fields[b"w"] != self._writer:
                told = fields[b"d"]
                self._on_deletion(LoggedDeletion(told[:16], int.from_bytes(told[16:], "little")))
            self._after_deletion = place
            self._store.execute("SET", self._place_key, place, "EX", _DELETIONS_S)
            count += 1
        return count

    def _listen(self) -> None:
        while not self._stopping.wait(_PAUSE_S):
            try:
                self._read_all()
            except HiertcnError as error:
                _log.warning("what other sidecars record arrives late: %s", error)

    def _read_all(self) -> None:
        while self.read() >= _READ and not self._stopping.is_set():
            pass

    def _is_new_here(self, fields: dict[bytes, bytes]) -> bool:
        return self._own_after is not None and _position(fields) > self._own_after

    def _add(self, stream: bytes, kept_s: int, *fields: bytes) -> None:
        limits = ("MAXLEN", "~", _MOST)
        self._store.execute("XADD", stream, *limits, "*", b"w", self._writer, *fields)
        self._store.execute("EXPIRE", stream, kept_s)

    def _range(self, stream: bytes, after: bytes) -> list[tuple[bytes, dict[bytes, bytes]]]:
        found: list[Any] = self._store.execute("XRANGE", stream, b"(" + after, "+", "COUNT", _READ)
        return [(place, dict(fields)) for place, fields in found if fields]


def _packed(
    interactions: Sequence[tuple[str, int]], previous: Sequence[str | None], position: Position
) -> list[bytes]:
    times_us = np.array([time_us for _, time_us in interactions], "<i8")
    lengths, ids = _packed_texts([item_id for item_id, _ in interactions])
    # No item's id is empty.
    lengths_before, before = _packed_texts([one or "" for one in previous])
    return [
        *(b"e", b"%d:%d" % position, b"t", times_us.tobytes(), b"l", lengths, b"i", ids),
        *(b"m", lengths_before, b"b", before, b"s", bytes(one == BEGAN for one in previous)),
    ]


def _unpacked(fields: dict[bytes, bytes]) -> tuple[list[tuple[str, int]], list[str | None]]:
    times_us = np.frombuffer(fields[b"t"], "<i8").tolist()
    ids = _texts(fields[b"l"], fields[b"i"])
    # A sidecar of an older version does not tell what came before, or not what began a session.
    before = _texts(fields[b"m"], fields[b"b"]) if b"m" in fields else [""] * len(ids)
    began = fields.get(b"s", bytes(len(ids)))
    previous = [BEGAN if start else one or None for one, start in zip(before, began, strict=True)]
    return list(zip(ids, times_us, strict=True)), previous


def _position(fields: dict[bytes, bytes]) -> Position:
    segment, _, offset = fields.get(b"e", b"0:0").partition(b":")
    return Position(int(segment), int(offset))


def _packed_texts(texts: Sequence[str]) -> tuple[bytes, bytes]:
    encoded = [one.encode() for one in texts]
    return np.array([len(one) for one in encoded], "<u2").tobytes(), b"".join(encoded)


def _texts(lengths: bytes, joined: bytes) -> list[str]:
    ends = np.cumsum(np.frombuffer(lengths, "<u2"), dtype=np.int64).tolist()
    return [joined[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
