"""Items upserted between builds: the durable set that overlays of releases are made from.

The event log makes an upsert durable; this set is what the log says, in memory. Before a segment
of the log is dropped, :meth:`NewItems.save` writes the set beside the log, so that nothing is lost
with it, and :meth:`NewItems.load` reads both. An item stays until every release that may serve
(the current one and the one that a roll-back returns to) knows it by itself.

Bounded: at most ``most`` items and 256 MiB of attributes. The writer's thread puts, any thread
reads. Reading a log of a gigabyte back takes about two seconds, most of it the disk's.
"""

import contextlib
import logging
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from hiertcn.errors import InputError, OverloadError
from hiertcn.files import whole_file
from hiertcn.serving.log.entries import MAGIC, Position, framed, read_entry, read_segment
from hiertcn.serving.log.logged_items import KIND, LoggedItem, pack
from hiertcn.serving.log.scan import entries_of_kind

_log = logging.getLogger(__name__)

SAVED_FILE: Final = "new_items.log"
"""Beside the log's folder: the set as of some moment, in the log's own format."""

_MOST_BYTES: Final = 256 << 20


class LogSegments(Protocol):
    """What is read of an event log, of this process or another."""

    @property
    def position(self) -> Position:
        """Where it is read up to."""
        ...

    def segments(self, until: Position) -> list[tuple[Path, int | None]]:
        """The segments up to a position, oldest first, and where each ends (None: as the file)."""
        ...


class NewItems:
    """The newest version of every item upserted and not yet known to the releases.

    Args:
        most: how many there may be.
        most_bytes: of all their entries together.
    """

    def __init__(self, most: int = 100_000, most_bytes: int = _MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        # By rising version, so that what is newer than a version is the end.
        self._items: dict[str, tuple[LoggedItem, int]] = {}
        self._bytes = 0
        self._coming: dict[str, int] = {}
        self._version = 0
        self._saved = True
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def next_version(self) -> int:
        """A version above every other."""
        with self._lock:
            self._version += 1
            return self._version

    def put(self, item: LoggedItem) -> None:
        """Keep an item, unless a newer version of it is there."""
        size = len(pack(item))
        with self._lock:
            self._version = max(self._version, item.version)
            before = self._items.get(item.item_id)
            if before is not None:
                if before[0].version >= item.version:
                    return
                self._bytes -= before[1]
                del self._items[item.item_id]
            self._items[item.item_id] = item, size
            self._bytes += size
            self._saved = False

    def since(self, version: int) -> list[LoggedItem]:
        """The items of versions above one, oldest version first."""
        found = []
        with self._lock:
            for item, _ in reversed(self._items.values()):
                if item.version <= version:
                    break
                found.append(item)
        return found[::-1]

    def forget(self, item_ids: Collection[str]) -> None:
        """Drop items that the releases know by now."""
        with self._lock:
            for item_id in item_ids:
                dropped = self._items.pop(item_id, None)
                if dropped is not None:
                    self._bytes -= dropped[1]
                    self._saved = False

    @contextlib.contextmanager
    def room_for(self, items: Iterable[LoggedItem]) -> Iterator[None]:
        """Hold room for items that are on their way into the log.

        Raises:
            OverloadError: there would be too many, or too many bytes of them.
        """
        sizes = {item.item_id: len(pack(item)) for item in items}
        with self._lock:
            count = len(self._items.keys() | self._coming.keys() | sizes.keys())
            size = self._bytes + sum(self._coming.values()) + sum(sizes.values())
            if count > self._most:
                raise OverloadError(
                    f"there would be {count} new items, more than the {self._most} of "
                    "--max-new-items; run the daily pipeline with what lies in the state folder's "
                    "events and items, so that the next release knows them"
                )
            if size > self._most_bytes:
                raise OverloadError(
                    f"the new items would take {size >> 20} MiB, more than the "
                    f"{self._most_bytes >> 20} MiB kept; send smaller attributes, or run the daily "
                    "pipeline so that the next release knows them"
                )
            mine = {item_id: size for item_id, size in sizes.items() if item_id not in self._coming}
            self._coming.update(mine)
        try:
            yield
        finally:
            with self._lock:
                for item_id in mine:
                    del self._coming[item_id]

    def save(self, path: Path) -> None:
        """Write the set, whole or not at all, if it has changed since.

        Raises:
            InputError: the disk is full.
        """
        with self._lock:
            if self._saved:
                return
            items = [item for item, _ in self._items.values()]
            self._saved = True
        try:
            with whole_file(path) as aside:
                aside.write_bytes(MAGIC + b"".join(framed(item) for item in items))
        except BaseException:
            self._saved = False
            raise

    def load(self, path: Path, log: LogSegments) -> None:
        """Read what was saved, and what the log holds of items.

        The log may be another process's: what a segment held that is dropped meanwhile was saved
        before, so the saved set is read last.

        Raises:
            InputError: the saved set or an entry is damaged; the file is named.
        """
        found: list[LoggedItem] = []
        for segment, end in log.segments(log.position):
            try:
                data = np.fromfile(segment, np.uint8)
            except FileNotFoundError:
                continue
            try:
                places = entries_of_kind(data, KIND, end)
            except InputError as error:
                raise InputError(
                    f"{segment} is damaged ({error}); restore it from a copy, or move it aside to "
                    "start without its events"
                ) from None
            for place in places.tolist():
                entry = read_entry(data, place)
                if not isinstance(entry, LoggedItem):
                    raise InputError(
                        f"{segment} is damaged at byte {place}; restore it from a copy, or move it "
                        "aside to start without its events"
                    )
                found.append(entry)
        if path.exists():
            found += [entry for _, entry in read_segment(path) if isinstance(entry, LoggedItem)]
        for item in sorted(found, key=lambda item: item.version):
            self.put(item)
        if found:
            _log.info("read %d new items back", len(self))
