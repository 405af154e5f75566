"""The write-ahead log of recorded interactions: what makes an acknowledgement true.

A folder of numbered segments, appended to by one process. Every entry is framed by its length
and CRC-32; :meth:`EventLog.append` returns after fdatasync, so callers gather what arrives while
one sync runs and pay for the next one together (group commit). A crash can leave a torn entry at
the end of the last segment only; opening cuts it off and keeps the cut bytes beside the segment
as ``<segment>.torn``. A bad entry anywhere else is damage, which is refused, not skipped.

Sealed segments are rolled into parquet (``event_export.py``) and kept until no live snapshot needs
their events, so the store can be rebuilt from the log alone; then they are dropped. Entries never
change, but a deleted user's are erased from sealed segments. About 60 bytes an entry.
"""

import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from hiertcn.errors import InputError, ServingError
from hiertcn.files import read_json, whole_file, write_json
from hiertcn.serving.record import user_key

_log = logging.getLogger(__name__)

MAGIC: Final = b"HTCNLOG1"
_FRAME: Final = struct.Struct("<II")
_INTERACTION: Final = struct.Struct("<BxHHHqqQ")
_DELETION: Final = struct.Struct("<B7xq16s")
_KIND_INTERACTION: Final = 1
_KIND_DELETION: Final = 2
_MAX_PAYLOAD: Final = 1 << 20


class Position(NamedTuple):
    """A place between two entries: bytes into a segment's file."""

    segment: int
    offset: int


BEGINNING: Final = Position(0, 0)


@dataclass(frozen=True, slots=True)
class LoggedInteraction:
    """One recorded interaction; times in microseconds since the epoch, ``key`` 0 for none."""

    user_id: str
    item_id: str
    timestamp_us: int
    received_us: int
    key: int
    event_type: str


@dataclass(frozen=True, slots=True)
class LoggedDeletion:
    """From here on the user is forgotten: ``user_key`` is the store's digest of the id."""

    user_key: bytes
    deleted_us: int


Entry = LoggedInteraction | LoggedDeletion


@dataclass(frozen=True, kw_only=True)
class SealedSegment:
    """A segment that grows no more; ``last_us`` is its newest event time, None without events."""

    number: int
    path: Path
    exported: bool
    last_us: int | None


class EventLog:
    """The log in one folder. Not thread-safe: one thread owns an instance.

    Args of :meth:`open`:
        directory: the log's folder, made if absent.
        segment_bytes: size at which :attr:`is_full` asks for a rotation.
        segment_age_s: age in seconds at which it does.
    """

    def __init__(self, directory: Path, segment_bytes: int, segment_age_s: float) -> None:
        """Use :meth:`open`."""
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._segment_age_s = segment_age_s
        self._descriptor = -1
        self._broken: str | None = None
        self._position = BEGINNING
        self._opened_at = time.monotonic()

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        segment_bytes: int = 64 << 20,
        segment_age_s: float = 3600.0,
    ) -> "EventLog":
        """Open or create the log; cut a torn tail.

        Raises:
            InputError: the last segment is not one of this format.
        """
        directory.mkdir(parents=True, exist_ok=True)
        log = cls(directory, segment_bytes, segment_age_s)
        numbers = _numbers(directory)
        last = numbers[-1] if numbers else 1
        path = _segment_path(directory, last)
        if numbers and not log._is_sealed(last):
            _cut_torn_tail(path)
            log._open_segment(last)
        else:
            log._open_segment(last + 1 if numbers else last)
        return log

    @property
    def position(self) -> Position:
        """The end of the log; everything before it is durable."""
        return self._position

    @property
    def is_full(self) -> bool:
        """Whether the open segment is due for :meth:`rotate`."""
        if self._position.offset <= len(MAGIC):
            return False
        age_s = time.monotonic() - self._opened_at
        return self._position.offset >= self._segment_bytes or age_s >= self._segment_age_s

    def append(self, entries: Sequence[Entry]) -> Position:
        """Write the entries, wait until they are on disk, return the new end.

        Raises:
            ServingError: the disk is full or failing; nothing of ``entries`` is in the log.
        """
        if self._broken:
            raise ServingError(self._broken)
        frames = b"".join(_framed(entry) for entry in entries)
        path = _segment_path(self._directory, self._position.segment)
        try:
            _write_all(self._descriptor, frames)
        except OSError as error:
            self._take_back(path)
            raise ServingError(
                f"cannot append to the event log {path}: {error.strerror}; free some space "
                "(nothing was recorded)"
            ) from error
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            # After a failed fsync the kernel may have dropped the pages, so a retry proves nothing.
            self._broken = (
                f"the event log {path} could not be synced ({error.strerror}); check the disk and "
                "restart the sidecar"
            )
            raise ServingError(self._broken) from error
        self._position = Position(self._position.segment, self._position.offset + len(frames))
        return self._position

    def replay(self, after: Position = BEGINNING) -> Iterator[tuple[Position, Entry]]:
        """Yield every entry after a position with the position behind it, oldest first.

        Raises:
            InputError: a segment is damaged before its end, naming file and offset.
        """
        for number in _numbers(self._directory):
            if number < after.segment:
                continue
            start = after.offset if number == after.segment else 0
            path = _segment_path(self._directory, number)
            for end, entry in read_segment(path, start):
                yield Position(number, end), entry

    def segments(self, until: Position) -> list[tuple[Path, int | None]]:
        """The segments up to a position, oldest first, and where each ends (None: as the file)."""
        numbers = [number for number in _numbers(self._directory) if number <= until.segment]
        ends = [until.offset if number == until.segment else None for number in numbers]
        paths = [_segment_path(self._directory, number) for number in numbers]
        return list(zip(paths, ends, strict=True))

    def rotate(self) -> int | None:
        """Seal the open segment and begin the next; return the sealed one, None if it is empty."""
        if self._position.offset <= len(MAGIC):
            return None
        sealed = self._position.segment
        os.close(self._descriptor)
        self._open_segment(sealed + 1)
        return sealed

    def sealed(self) -> list[SealedSegment]:
        """All segments but the open one, oldest first."""
        found = []
        for number in _numbers(self._directory):
            if number == self._position.segment:
                continue
            marker = _marker_path(self._directory, number)
            exported = marker.exists()
            last_us = read_json(marker)["last_us"] if exported else None
            found.append(
                SealedSegment(
                    number=number,
                    path=_segment_path(self._directory, number),
                    exported=exported,
                    last_us=last_us,
                )
            )
        return found

    def mark_exported(self, number: int, *, events: int, last_us: int | None) -> None:
        """Note that a sealed segment's events lie in parquet."""
        write_json(_marker_path(self._directory, number), {"events": events, "last_us": last_us})

    def erase(self, segment: SealedSegment, deleted: Mapping[bytes, int], *, whole: bool) -> None:
        """Rewrite a sealed segment without the deleted users' interactions.

        Args:
            segment: the segment; no replay may begin within it any more.
            deleted: the users' keys, and at which entry of the segment each was deleted.
            whole: the deletions came after this segment, so all of the users' entries go.
        """
        kept = [
            entry
            for order, (_, entry) in enumerate(read_segment(segment.path))
            if isinstance(entry, LoggedDeletion)
            or (key := user_key(entry.user_id)) not in deleted
            or not (whole or order < deleted[key])
        ]
        with whole_file(segment.path) as aside:
            aside.write_bytes(MAGIC + b"".join(_framed(entry) for entry in kept))

    def drop(self, number: int) -> None:
        """Remove a sealed, exported segment."""
        _segment_path(self._directory, number).unlink(missing_ok=True)
        _marker_path(self._directory, number).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the open segment's file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _is_sealed(self, number: int) -> bool:
        return _marker_path(self._directory, number).exists()

    def _open_segment(self, number: int) -> None:
        path = _segment_path(self._directory, number)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o640)
        if os.fstat(self._descriptor).st_size == 0:
            _write_all(self._descriptor, MAGIC)
            os.fsync(self._descriptor)
            _sync_directory(self._directory)
        self._position = Position(number, os.fstat(self._descriptor).st_size)
        self._opened_at = time.monotonic()

    def _take_back(self, path: Path) -> None:
        try:
            os.ftruncate(self._descriptor, self._position.offset)
        except OSError as error:
            self._broken = (
                f"the event log {path} holds part of an entry that cannot be taken back "
                f"({error.strerror}); check the disk and restart the sidecar"
            )


def read_segment(path: Path, start: int = 0) -> Iterator[tuple[int, Entry]]:
    """Yield a segment's entries from byte ``start`` on, each with the offset behind it.

    Raises:
        InputError: the file is no segment, or an entry is damaged, naming the offset.
    """
    data = path.read_bytes()
    if data[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path} is not an event log segment; move it out of the state folder")
    at = max(start, len(MAGIC))
    while at < len(data):
        entry, end = _entry_at(data, at)
        if entry is None:
            raise InputError(
                f"the event log segment {path} is damaged at byte {at} of {len(data)}; restore it "
                "from a copy, or move it aside to start without its events"
            )
        yield end, entry
        at = end


def _cut_torn_tail(path: Path) -> None:
    data = path.read_bytes()
    if len(data) < len(MAGIC) and MAGIC.startswith(data):
        path.write_bytes(b"")
        return
    if data[: len(MAGIC)] != MAGIC:
        raise InputError(f"{path} is not an event log segment; move it out of the state folder")
    at = len(MAGIC)
    while at < len(data):
        entry, end = _entry_at(data, at)
        if entry is None:
            break
        at = end
    if at == len(data):
        return
    _log.warning(
        "cut %d bytes off the end of %s: an entry that was never acknowledged",
        len(data) - at,
        path,
    )
    path.with_suffix(".torn").write_bytes(data[at:])
    with path.open("r+b") as file:
        file.truncate(at)
        os.fsync(file.fileno())


def _framed(entry: Entry) -> bytes:
    if isinstance(entry, LoggedDeletion):
        payload = _DELETION.pack(_KIND_DELETION, entry.deleted_us, entry.user_key)
    else:
        user, item, kind = (
            text.encode() for text in (entry.user_id, entry.item_id, entry.event_type)
        )
        payload = (
            _INTERACTION.pack(
                _KIND_INTERACTION,
                len(user),
                len(item),
                len(kind),
                entry.timestamp_us,
                entry.received_us,
                entry.key,
            )
            + user
            + item
            + kind
        )
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _entry_at(data: bytes, at: int) -> tuple[Entry | None, int]:
    if at + _FRAME.size > len(data):
        return None, at
    length, crc = _FRAME.unpack_from(data, at)
    start, end = at + _FRAME.size, at + _FRAME.size + length
    if not 0 < length <= _MAX_PAYLOAD or end > len(data):
        return None, at
    payload = data[start:end]
    if zlib.crc32(payload) != crc:
        return None, at
    if payload[0] == _KIND_DELETION:
        _, deleted_us, key = _DELETION.unpack(payload)
        return LoggedDeletion(key, deleted_us), end
    _, users, items, kinds, timestamp_us, received_us, hashed = _INTERACTION.unpack_from(payload)
    text = payload[_INTERACTION.size :]
    return (
        LoggedInteraction(
            user_id=text[:users].decode(),
            item_id=text[users : users + items].decode(),
            timestamp_us=timestamp_us,
            received_us=received_us,
            key=hashed,
            event_type=text[users + items : users + items + kinds].decode(),
        ),
        end,
    )


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _numbers(directory: Path) -> list[int]:
    return sorted(int(path.stem) for path in directory.glob("*.log") if path.stem.isdecimal())


def _segment_path(directory: Path, number: int) -> Path:
    return directory / f"{number:012d}.log"


def _marker_path(directory: Path, number: int) -> Path:
    return directory / f"{number:012d}.exported.json"


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
