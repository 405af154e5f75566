"""Recorded interactions and deletions told to the other sidecars of one Valkey, by two streams.

Live counts are of the whole site, so every sidecar's ``RecentInteractions`` needs what the others
record. Each group of accepted interactions becomes one entry of the stream ``<prefix>:arrivals``:
item ids and times, no users. Every sidecar tails it from seven hours before its start on and skips
its own entries, which it has from its log; so does each of its processes. The stream holds at most
about 100,000 groups, and the server forgets it seven hours after the last one.

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
from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.serving.log.event_log import LoggedDeletion
from hiertcn.serving.stores.store_valkey import ValkeyStore

_log = logging.getLogger(__name__)

_WINDOW_S: Final = 7 * 3600
_DELETIONS_S: Final = 90 * 86_400
_MOST: Final = 100_000
_READ: Final = 1000
_PAUSE_S: Final = 0.5


class SharedArrivals:
    """Tells the other sidecars, and listens to them on a thread.

    Args:
        store: the shared store.
        writer: a name of this sidecar's log that no other has.
        recent: takes what the others record.
        on_deletion: called on the thread with each deletion that another sidecar told of; None
            in a process that has no log to erase them from.
    """

    def __init__(
        self,
        store: ValkeyStore,
        writer: str,
        recent: RecentInteractions,
        on_deletion: Callable[[LoggedDeletion], None] | None = None,
    ) -> None:
        self._store = store
        self._writer = writer.encode()
        self._recent = recent
        self._on_deletion = on_deletion
        self._arrivals = store.key("arrivals")
        self._deletions = store.key("deletions")
        self._place_key = store.key(f"deletions-seen:{writer}")
        since_ms = max(0, int((time.time() - _WINDOW_S) * 1000))
        self._after_arrival = b"%d-0" % since_ms
        self._after_deletion: bytes = store.execute("GET", self._place_key) or b"0-0"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="shared-arrivals", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def tell(
        self, interactions: Sequence[tuple[str, int]], deletions: Sequence[LoggedDeletion]
    ) -> None:
        """Tell the others; a server that is away is logged, not raised."""
        try:
            if interactions:
                self._add(self._arrivals, _WINDOW_S, *_packed(interactions))
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
            if fields[b"w"] != self._writer:
                self._recent.add(_unpacked(fields))
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
                while self.read() >= _READ and not self._stopping.is_set():
                    pass
            except HiertcnError as error:
                _log.warning("what other sidecars record arrives late: %s", error)

    def _add(self, stream: bytes, kept_s: int, *fields: bytes) -> None:
        limits = ("MAXLEN", "~", _MOST)
        self._store.execute("XADD", stream, *limits, "*", b"w", self._writer, *fields)
        self._store.execute("EXPIRE", stream, kept_s)

    def _range(self, stream: bytes, after: bytes) -> list[tuple[bytes, dict[bytes, bytes]]]:
        found: list[Any] = self._store.execute("XRANGE", stream, b"(" + after, "+", "COUNT", _READ)
        return [(place, dict(fields)) for place, fields in found if fields]


def _packed(interactions: Sequence[tuple[str, int]]) -> list[bytes]:
    ids = [item_id.encode() for item_id, _ in interactions]
    times_us = np.array([time_us for _, time_us in interactions], "<i8")
    lengths = np.array([len(one) for one in ids], "<u2")
    return [b"t", times_us.tobytes(), b"l", lengths.tobytes(), b"i", b"".join(ids)]


def _unpacked(fields: dict[bytes, bytes]) -> list[tuple[str, int]]:
    times_us = np.frombuffer(fields[b"t"], "<i8").tolist()
    ends = np.cumsum(np.frombuffer(fields[b"l"], "<u2"), dtype=np.int64).tolist()
    text = fields[b"i"]
    ids = [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
    return list(zip(ids, times_us, strict=True))
