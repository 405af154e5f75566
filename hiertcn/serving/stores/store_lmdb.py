"""User records in LMDB: embedded, read without locks or copies of the tree, one writer.

The log (``event_log.py``) makes writes durable, so commits are not synced here: after a killed
process everything committed is still there (the kernel holds the pages); only a crash of the
machine can tear the tree, which a marker with the kernel's boot id detects: the store is then
emptied and rebuilt from the log. So it is if a record was found damaged, or if the process before
died in native code, which is what a damaged page of a mapped file can do to it
(``crash_note.py``). Where LMDB itself finds a page damaged, the next write empties the store at
once. The position up to which the log is applied is committed in the same transaction as the
records, so replay neither skips nor repeats an entry.

One process writes; others on the same machine may open the store ``read_only``, see every commit
at once, and follow to the new file of a store that was emptied. A file that is mostly free is
compacted when the writer opens it (``lmdb_file.py``).

Measured while planning with 2 KB records: 140,000 reads/s and 17,000 unsynced writes/s on one
thread. Every record of 2 to 4 KB occupies one 4 KB page.
"""

import logging
import os
import shutil
import struct
import threading
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Final, NoReturn

import lmdb

from hiertcn.errors import InputError, ServingError
from hiertcn.files import read_json, write_json
from hiertcn.serving.log.event_log import BEGINNING, Position
from hiertcn.serving.log.folder_lock import locked
from hiertcn.serving.records.record import (
    CorruptRecordError,
    UserRecord,
    decode,
    encode,
    has_revision,
)
from hiertcn.serving.stores.crash_note import take_note
from hiertcn.serving.stores.lmdb_file import (
    DAMAGE,
    compact_if_mostly_free,
    file_number,
    live_bytes,
    opened,
    opened_and_tried,
)
from hiertcn.serving.stores.store import Change, StoreBehindError

_log = logging.getLogger(__name__)

_POSITION_KEY: Final = b"applied-log-position"
_POSITION: Final = struct.Struct("<qq")
_FIRST_MAP_BYTES: Final = 1 << 30
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class LmdbStore:
    """A :class:`~.store.RecordStore` in one folder, for one writing process."""

    is_local: Final = True

    def __init__(
        self,
        directory: Path,
        *,
        map_bytes: int = _FIRST_MAP_BYTES,
        read_only: bool = False,
        state_dtype: str = "float32",
    ) -> None:
        """Open or create the store.

        Args:
            directory: the store's folder.
            map_bytes: address space reserved at first; it doubles whenever the data fill it.
            read_only: open what another process writes; nothing is created or locked.
            state_dtype: of the states written, float32 or float16; either is read.

        Raises:
            InputError: another process writes the store, or the folder cannot be used.
        """
        self._state_dtype = state_dtype
        self._read_only = read_only
        self._directory = directory
        self._records = directory / "records"
        self._marker = directory / "state.json"
        self._lock_descriptor: int | None = None
        # A map must not be resized under a reader, whichever thread it is on.
        self._resizing = threading.Lock()
        self._damaged = False
        self._damaged_records: set[bytes] = set()
        self._torn = False
        self._map_bytes = map_bytes
        self._inode = 0
        self.was_emptied = False
        if not read_only:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock_descriptor = locked(directory)
            self.was_emptied = self._empty_if_torn()
            self._write_marker(clean=False)
        try:
            self._environment: Any = self._open() if read_only else self._opened_whole()
        except lmdb.Error as error:
            self._unlock()
            if read_only:
                raise InputError(
                    f"the record store {directory} cannot be read ({error}); start the process "
                    "that writes it first"
                ) from error
            raise InputError(
                f"the record store {directory} cannot be opened ({error}); remove that folder, it "
                "is rebuilt from the event log"
            ) from error

    def get(self, key: bytes) -> UserRecord | None:
        """The user's record, or None; a damaged one counts as None."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[bytes]) -> list[UserRecord | None]:
        """The users' records ``[n]`` in one transaction."""
        try:
            with self._resizing:
                found = self._read(keys)
        except lmdb.Error as error:
            if self._followed():
                return self.get_many(keys)
            self._note_torn(error)
            self._damaged_records.update(keys)
            return [None] * len(keys)
        return [self._decoded(key, stored) for key, stored in zip(keys, found, strict=True)]

    def damaged(self) -> Set[bytes]:
        """Users whose record was found damaged here, and has not been read whole since."""
        return self._damaged_records

    @property
    def applied(self) -> Position:
        """The log position up to which entries are applied; the beginning, of a torn store."""
        self._followed()
        try:
            with self._resizing:
                (stored,) = self._read([_POSITION_KEY])
        except lmdb.Error as error:
            self._note_torn(error)
            return BEGINNING
        return Position(*_POSITION.unpack(stored)) if stored else BEGINNING

    @property
    def newest_applied(self) -> Position:
        """The same: one transaction holds all."""
        return self.applied

    def applied_for(self, key: bytes) -> Position:
        """The same for every user: one transaction holds all."""
        return self.applied

    def scan(self, after: bytes, count: int) -> tuple[list[bytes], bytes]:
        """Up to ``count`` users' keys and what to go on from; ``b""`` begins and ends."""
        keys: list[bytes] = []
        try:
            with self._resizing, self._environment.begin() as transaction:
                cursor = transaction.cursor()
                found = cursor.set_range(after) if after else cursor.first()
                while found and len(keys) < count:
                    key = cursor.key()
                    if key not in (after, _POSITION_KEY):
                        keys.append(key)
                    found = cursor.next()
        except lmdb.MapResizedError:
            self.get_many([])
            return self.scan(after, count)
        except lmdb.Error as error:
            self._note_torn(error)
            return [], b""
        return keys, keys[-1] if found and keys else b""

    @property
    def live_bytes(self) -> int:
        """Bytes of the file that hold something."""
        with self._resizing:
            return live_bytes(self._environment)

    def __len__(self) -> int:
        with self._resizing:
            entries = int(self._environment.stat()["entries"])
        return entries - (1 if self.applied != BEGINNING else 0)

    def write(self, changes: Mapping[bytes, Change], applied: Position | None = None) -> set[bytes]:
        """Commit the changes whose base is stored and (if given) the log position, together.

        Raises:
            StoreBehindError: its pages are damaged, and it is empty now.
            ServingError: the disk is full or failing; nothing was written.
        """
        if self._torn:
            self._begin_anew()
        encoded = {
            key: (change.base_revision, change.record and encode(change.record, self._state_dtype))
            for key, change in changes.items()
        }
        while True:
            refused = set()
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, (base, value) in encoded.items():
                        if not has_revision(transaction.get(key), base):
                            refused.add(key)
                        elif value is None:
                            transaction.delete(key)
                        else:
                            transaction.put(key, value)
                    if applied is not None and not refused:
                        transaction.put(_POSITION_KEY, _POSITION.pack(*applied))
                return refused
            except lmdb.MapFullError:
                self._grow()
            except DAMAGE as error:
                self._note_torn(error)
                self._begin_anew()
            except lmdb.Error as error:
                raise ServingError(
                    f"the record store {self._directory} cannot be written ({error}); free some "
                    "space on that disk"
                ) from error

    def sync(self) -> None:
        """Wait until everything committed is on disk."""
        # A process that was killed while it read would keep pages from being used again.
        self._environment.reader_check()
        self._environment.sync(True)

    def close(self) -> None:
        """Sync and close; a store closed cleanly survives a crash of the machine."""
        if self._read_only or self._lock_descriptor is None:
            self._environment.close()
            return
        self._environment.sync(True)
        self._environment.close()
        self._write_marker(clean=not self._damaged)
        self._unlock()

    def _open(self) -> Any:
        environment = opened(self._records, self._map_bytes, read_only=self._read_only)
        self._inode = file_number(self._records)
        return environment

    def _begin_anew(self) -> NoReturn:
        """Empty the store under those who read it.

        Raises:
            StoreBehindError: always, unless that fails.
            ServingError: the disk is failing; the next write tries again.
        """
        try:
            with self._resizing:
                self._environment.close()
                if self._records.exists():
                    self._empty("its pages are damaged")
                self._environment = self._open()
                self._torn = self._damaged = False
                self._damaged_records.clear()
            self._write_marker(clean=False)
        except (lmdb.Error, OSError) as error:
            raise ServingError(
                f"the record store {self._directory} is damaged, and cannot be begun anew ({error})"
            ) from error
        raise StoreBehindError(f"the record store {self._directory} was damaged and is empty now")

    def _followed(self) -> bool:
        """In a process that only reads: open the file that the writing one has begun anew."""
        if not self._read_only:
            return False
        try:
            if file_number(self._records) == self._inode:
                return False
            with self._resizing:
                self._environment.close()
                self._environment = self._open()
        except (lmdb.Error, OSError) as error:
            _log.warning("%s cannot be read yet (%s)", self._records, error)
            return False
        self._torn = False
        self._damaged_records.clear()
        return True

    def _opened_whole(self) -> Any:
        try:
            environment = opened_and_tried(self._records, self._map_bytes, _POSITION_KEY)
        except DAMAGE as error:
            self._empty(f"it is damaged: {error}")
            self.was_emptied = True
            environment = opened_and_tried(self._records, self._map_bytes, _POSITION_KEY)
        try:
            if not compact_if_mostly_free(environment, self._records):
                return environment
        except DAMAGE as error:
            self._note_torn(error)
            return environment
        return self._open()

    def _read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        while True:
            try:
                with self._environment.begin() as transaction:
                    return [transaction.get(key) for key in keys]
            except lmdb.MapResizedError:
                # The writing process has grown the file; 0 takes its size.
                self._environment.set_mapsize(0)

    def _unlock(self) -> None:
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    def _decoded(self, key: bytes, stored: bytes | None) -> UserRecord | None:
        try:
            record = None if stored is None else decode(stored)
        except CorruptRecordError as error:
            self._damaged_records.add(key)
            _log.error("%s: record %s is damaged: %s", self._directory, key.hex(), error)
            # What this says of the pages beside it is unknown.
            self._distrust()
            return None
        if self._damaged_records:
            self._damaged_records.discard(key)
        return record

    def _note_torn(self, error: lmdb.Error) -> None:
        """Have the next write empty the store; a process that only reads waits for that."""
        _log.error("%s cannot be read: %s", self._directory, error)
        # Others, such as too many readers, say nothing of the pages.
        if isinstance(error, DAMAGE):
            self._torn = True
            self._distrust()

    def _distrust(self) -> None:
        """Have the next start rebuild the store."""
        if not self._damaged and not self._read_only:
            self._damaged = True
            self._write_marker(clean=False)

    def _grow(self) -> None:
        with self._resizing:
            size = int(self._environment.info()["map_size"]) * 2
            self._environment.set_mapsize(size)
        _log.info("the record store %s may now hold %d MiB", self._directory, size >> 20)

    def _empty_if_torn(self) -> bool:
        crash = take_note(self._directory)
        if not self._records.exists() or not self._marker.exists():
            return False
        doubt = f"the process that wrote it crashed:\n{crash}" if crash else self._doubt()
        if doubt:
            self._empty(doubt)
        return bool(doubt)

    def _doubt(self) -> str:
        """Why the store may not hold what was committed; "" if it does."""
        try:
            marker = read_json(self._marker)
            if marker["damaged"]:
                return "it is damaged"
            is_whole = marker["clean"] or marker["boot_id"] == _boot_id()
        except (InputError, KeyError, TypeError) as error:
            return f"{self._marker} is not what this version writes ({error})"
        return "" if is_whole else "it may be torn by a crash"

    def _empty(self, reason: str) -> None:
        _log.warning("rebuilding %s from the event log, because %s", self._records, reason)
        shutil.rmtree(self._records)

    def _write_marker(self, *, clean: bool) -> None:
        write_json(self._marker, {"boot_id": _boot_id(), "clean": clean, "damaged": self._damaged})


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return "unknown"
