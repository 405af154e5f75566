"""Entries of the event log and the segments that hold them, byte by byte.

A segment begins with eight bytes that name the format; every entry is framed by its length and
CRC-32, little-endian.
"""

import logging
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.serving.log import logged_items
from hiertcn.serving.log.logged_items import LoggedItem

_log = logging.getLogger(__name__)

MAGIC: Final = b"HTCNLOG1"
_FRAME: Final = struct.Struct("<II")
_INTERACTION: Final = struct.Struct("<BxHHHqqQ")
_DELETION: Final = struct.Struct("<B7xq16s")
_KIND_INTERACTION: Final = 1
_KIND_DELETION: Final = 2
_KIND_VOID: Final = 3
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


Entry = LoggedInteraction | LoggedDeletion | LoggedItem


class SegmentedLog(Protocol):
    """A log's files, whoever appends to them: ``EventLog``, or ``LogTail`` in other processes."""

    @property
    def position(self) -> Position:
        """The end of the log."""
        ...

    def segments(self, until: Position) -> list[tuple[Path, int | None]]:
        """The segments up to a position, oldest first, and where each ends (None: as the file)."""
        ...


_VOID: Final = LoggedDeletion(b"", 0)


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
        if entry is not _VOID:
            yield end, entry
        at = end


def cut_torn_tail(path: Path) -> None:
    """Cut what follows the segment's last whole entry and keep it beside as ``<segment>.torn``.

    Raises:
        InputError: the file is no segment.
    """
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


def framed(entry: Entry) -> bytes:
    """The entry as a segment holds it."""
    if isinstance(entry, LoggedItem):
        payload = logged_items.pack(entry)
    elif isinstance(entry, LoggedDeletion):
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


def read_entry(segment: NDArray[np.uint8], at: int) -> Entry | None:
    """The entry that begins at byte ``at`` of a segment, None if it is damaged."""
    length, _ = _FRAME.unpack_from(segment.data, at)
    return _entry_at(segment[at : at + _FRAME.size + length].tobytes(), 0)[0]


def void(size: int) -> bytes:
    """An entry of ``size`` bytes that says nothing."""
    payload = bytes([_KIND_VOID]).ljust(size - _FRAME.size, b"\0")
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
    if payload[0] == _KIND_VOID:
        return _VOID, end
    if payload[0] == logged_items.KIND:
        return logged_items.unpack(payload), end
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
