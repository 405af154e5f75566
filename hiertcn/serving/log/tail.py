"""Follows an event log that another process on this machine appends to.

Only what the store has applied is read (`RecordStore.applied`), so no entry is torn. A segment that
was dropped before it was read is passed over: what it held is older than any live snapshot.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hiertcn.serving.log.entries import MAGIC, Position, read_entry
from hiertcn.serving.log.logged_items import KIND, LoggedItem
from hiertcn.serving.log.scan import entries_of_kind, scan
from hiertcn.serving.log.segments import segment_paths

_REMEMBERED: Final = 65_536


class LoggedArrival(NamedTuple):
    """A logged interaction: the item, its time in microseconds, and a hash of who it was."""

    item_id: str
    timestamp_us: int
    user: int


class LogTail:
    """Reads a log from a position on; one thread uses it.

    Args:
        directory: the log's folder.
        after: entries behind it are read.
    """

    def __init__(self, directory: Path, after: Position) -> None:
        self.position = after
        self._directory = directory
        # A retry that reached the log twice was applied once.
        self._seen: set[int] = set()
        self._oldest: deque[int] = deque()

    def segments(self, until: Position) -> list[tuple[Path, int | None]]:
        """The segments up to a position, oldest first, and where each ends (None: as the file)."""
        return [
            (path, until.offset if number == until.segment else None)
            for number, path in segment_paths(self._directory)
            if number <= until.segment
        ]

    def read(self, until: Position) -> tuple[list[LoggedArrival], list[LoggedItem]]:
        """What was logged since the last call, up to a position: interactions, items upserted."""
        interactions: list[LoggedArrival] = []
        items: list[LoggedItem] = []
        for data in self._parts(until):
            scanned = scan(data)
            ids = scanned.item_ids.to_pylist()
            for item_id, time_us, user, same, key in zip(
                ids,
                scanned.timestamps_us.tolist(),
                scanned.users.tolist(),
                scanned.same.tolist(),
                scanned.keys.tolist(),
                strict=True,
            ):
                if self._is_new(same) and (not key or self._is_new(key)):
                    interactions.append(LoggedArrival(item_id, time_us, user))
            for place in entries_of_kind(data, KIND).tolist():
                entry = read_entry(data, place)
                if isinstance(entry, LoggedItem):
                    items.append(entry)
        self.position = until
        return interactions, items

    def _parts(self, until: Position) -> Iterator[NDArray[np.uint8]]:
        for number, path in segment_paths(self._directory):
            if not self.position.segment <= number <= until.segment:
                continue
            start = self.position.offset if number == self.position.segment else 0
            start = max(start, len(MAGIC))
            try:
                with path.open("rb") as file:
                    file.seek(start)
                    end = until.offset - start if number == until.segment else -1
                    data = file.read(max(0, end) if end != -1 else -1)
            except FileNotFoundError:
                continue
            if data:
                yield np.frombuffer(MAGIC + data, np.uint8)

    def _is_new(self, value: int) -> bool:
        if value in self._seen:
            return False
        self._seen.add(value)
        self._oldest.append(value)
        if len(self._oldest) > _REMEMBERED:
            self._seen.discard(self._oldest.popleft())
        return True
