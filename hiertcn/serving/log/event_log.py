"""The write-ahead log of recorded interactions: what makes an acknowledgement true.

A folder of numbered segments, appended to by one process. Every entry is framed by its length
and CRC-32; callers gather what arrives while one sync runs and pay for the next one together
(group commit). A crash can leave a torn entry at the end of the last segment only; opening cuts it
off and keeps the cut bytes beside the segment as ``<segment>.torn``. A bad entry anywhere else is
damage, which is refused, not skipped.

What an acknowledged entry survives, by the policy of :class:`Fsync`:

==========  ====================================  ==========================================
policy      killed process                        crash of the machine or its power
==========  ====================================  ==========================================
always      everything                            everything
interval    everything                            all but the last interval (0.1 s) and one sync
os          everything                            all but what Linux wrote back (about 30 s)
==========  ====================================  ==========================================

Sealed segments are synced under every policy, rolled into parquet (``event_export.py``) and kept
until no live snapshot needs their events, so the store can be rebuilt from the log alone; then they
are dropped. Entries never move: a deleted user's are overwritten by void ones of the same length,
at latest 5 minutes after the deletion, when the segment is sealed for it. About 60 bytes an entry.
"""

import contextlib
import enum
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from hiertcn.errors import ServingError
from hiertcn.files import whole_file
from hiertcn.serving.log import segments
from hiertcn.serving.log.entries import (
    BEGINNING,
    MAGIC,
    Entry,
    LoggedDeletion,
    LoggedInteraction,
    Position,
    cut_torn_tail,
    framed,
    read_segment,
)
from hiertcn.serving.log.folder_lock import locked
from hiertcn.serving.log.segments import SealedSegment, segment_numbers, segment_path

__all__ = [
    "BEGINNING",
    "MAGIC",
    "Entry",
    "EventLog",
    "Fsync",
    "LoggedDeletion",
    "LoggedInteraction",
    "Position",
    "SealedSegment",
    "read_segment",
]

_log = logging.getLogger(__name__)


class Fsync(enum.Enum):
    """When appended entries are forced to disk: before the acknowledgement, or some time after."""

    ALWAYS = "always"
    INTERVAL = "interval"
    OS = "os"


class EventLog:
    """The log in one folder. Not thread-safe: one thread owns an instance.

    Args of :meth:`open`:
        directory: the log's folder, made if absent.
        segment_bytes: size at which :attr:`is_full` asks for a rotation.
        segment_age_s: age in seconds at which it does.
        erase_age_s: seconds after a deletion at which it does, for the erasure to begin.
        fsync: when entries are forced to disk.
        fsync_interval_s: seconds between syncs under ``Fsync.INTERVAL``.
    """

    def __init__(
        self,
        directory: Path,
        segment_bytes: int,
        segment_age_s: float,
        erase_age_s: float,
        fsync: Fsync,
        fsync_interval_s: float,
    ) -> None:
        """Use :meth:`open`."""
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._segment_age_s = segment_age_s
        self._erase_age_s = erase_age_s
        self._deleted_at: float | None = None
        self._fsync = fsync
        # Held while the open segment is synced or changes, by whichever thread does.
        self._syncing = threading.Lock()
        self._unsynced = False
        self._closed = threading.Event()
        self._syncer: threading.Thread | None = None
        if fsync is Fsync.INTERVAL:
            self._syncer = threading.Thread(
                target=self._sync_often, args=(fsync_interval_s,), name="log-sync", daemon=True
            )
        self._descriptor = self._lock_descriptor = -1
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
        erase_age_s: float = 300.0,
        fsync: Fsync = Fsync.ALWAYS,
        fsync_interval_s: float = 0.1,
    ) -> "EventLog":
        """Open or create the log; cut a torn tail.

        Raises:
            InputError: the last segment is not one of this format, or another process has the log.
        """
        directory.mkdir(parents=True, exist_ok=True)
        log = cls(directory, segment_bytes, segment_age_s, erase_age_s, fsync, fsync_interval_s)
        log._lock_descriptor = locked(directory)
        numbers = segment_numbers(directory)
        last = numbers[-1] if numbers else 1
        try:
            if numbers and not segments.is_exported(directory, last):
                cut_torn_tail(segment_path(directory, last))
                log._open_segment(last)
            else:
                log._open_segment(last + 1 if numbers else last)
        except BaseException:
            os.close(log._lock_descriptor)
            raise
        if log._syncer is not None:
            log._syncer.start()
        return log

    @property
    def identity(self) -> str:
        """A name of this log that no other log has, 32 hexadecimal digits."""
        path = self._directory / segments.IDENTITY_FILE
        if not path.exists():
            with whole_file(path) as aside:
                aside.write_text(uuid.uuid4().hex)
        return segments.log_identity(self._directory)

    @property
    def position(self) -> Position:
        """The end of the log; everything before it is as durable as the policy makes it."""
        return self._position

    @property
    def is_full(self) -> bool:
        """Whether the open segment is due for :meth:`rotate`."""
        if self._position.offset <= len(MAGIC):
            return False
        now = time.monotonic()
        if self._deleted_at is not None and now - self._deleted_at >= self._erase_age_s:
            return True
        age_s = now - self._opened_at
        return self._position.offset >= self._segment_bytes or age_s >= self._segment_age_s

    def append(self, entries: Sequence[Entry]) -> Position:
        """Write the entries, wait until they are as durable as asked, return the new end.

        Raises:
            ServingError: the disk is full or failing; nothing of ``entries`` is in the log.
        """
        if self._broken:
            raise ServingError(self._broken)
        frames = b"".join(framed(entry) for entry in entries)
        path = segment_path(self._directory, self._position.segment)
        try:
            _write_all(self._descriptor, frames)
        except OSError as error:
            self._take_back(path)
            raise ServingError(
                f"cannot append to the event log {path}: {error.strerror}; free some space "
                "(nothing was recorded)"
            ) from error
        self._unsynced = True
        if self._fsync is Fsync.ALWAYS:
            self._sync()
        self._position = Position(self._position.segment, self._position.offset + len(frames))
        if self._deleted_at is None and any(isinstance(one, LoggedDeletion) for one in entries):
            self._deleted_at = time.monotonic()
        return self._position

    def replay(self, after: Position = BEGINNING) -> Iterator[tuple[Position, Entry]]:
        """Yield every entry after a position with the position behind it, oldest first.

        A segment that is dropped meanwhile may be passed over.

        Raises:
            InputError: a segment is damaged before its end, naming file and offset.
        """
        for number in segment_numbers(self._directory):
            if number < after.segment:
                continue
            start = after.offset if number == after.segment else 0
            path = segment_path(self._directory, number)
            with contextlib.suppress(FileNotFoundError):
                for end, entry in read_segment(path, start):
                    yield Position(number, end), entry

    def segments(self, until: Position) -> list[tuple[Path, int | None]]:
        """The segments up to a position, oldest first, and where each ends (None: as the file)."""
        numbers = [number for number in segment_numbers(self._directory) if number <= until.segment]
        ends = [until.offset if number == until.segment else None for number in numbers]
        paths = [segment_path(self._directory, number) for number in numbers]
        return list(zip(paths, ends, strict=True))

    def rotate(self) -> int | None:
        """Seal the open segment and begin the next; return the sealed one, None if it is empty."""
        if self._position.offset <= len(MAGIC):
            return None
        sealed = self._position.segment
        self._sync()
        self._begin(sealed + 1)
        return sealed

    def continue_after(self, position: Position) -> None:
        """Begin a segment behind ``position`` if the log ends before it, having lost its tail.

        So no place is named twice, and what a store knows of a lost entry is no place of another.
        """
        if position > self._position:
            _log.error(
                "the event log %s ends before what was applied from it; its newest entries are "
                "lost, though the store has them",
                self._directory,
            )
            self._sync()
            self._begin(position.segment + 1)

    def sealed(self) -> list[SealedSegment]:
        """All segments but the open one, oldest first."""
        return [
            segments.sealed_segment(self._directory, number)
            for number in segment_numbers(self._directory)
            if number != self._position.segment
        ]

    def mark_exported(self, number: int, *, events: int, last_us: int | None) -> None:
        """Note that a sealed segment's events lie in parquet."""
        segments.mark_exported(self._directory, number, events=events, last_us=last_us)

    def drop(self, number: int) -> None:
        """Remove a sealed, exported segment."""
        segments.drop(self._directory, number)

    def close(self) -> None:
        """Sync and close the open segment's file."""
        self._closed.set()
        if self._syncer is not None and self._syncer.is_alive():
            self._syncer.join()
        if self._descriptor >= 0:
            if self._broken is None:
                self._sync()
            os.close(self._descriptor)
            os.close(self._lock_descriptor)
            self._descriptor = self._lock_descriptor = -1

    def _sync(self) -> None:
        with self._syncing:
            if not self._unsynced:
                return
            # Before the sync, so that what is appended meanwhile asks for another.
            self._unsynced = False
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                # The kernel may have dropped the pages, so a retry would prove nothing.
                path = segment_path(self._directory, self._position.segment)
                self._broken = (
                    f"the event log {path} could not be synced ({error.strerror}); check the disk "
                    "and restart the sidecar"
                )
                raise ServingError(self._broken) from error

    def _sync_often(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            try:
                self._sync()
            except ServingError as error:
                _log.error("%s", error)
                return

    def _begin(self, number: int) -> None:
        with self._syncing:
            os.close(self._descriptor)
            self._open_segment(number)
            self._deleted_at = None

    def _open_segment(self, number: int) -> None:
        path = segment_path(self._directory, number)
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


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
