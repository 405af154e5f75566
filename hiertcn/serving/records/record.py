"""The binary record of one user: what the store holds under the user's key.

A record is a cache (hidden state, under the release that computed it) and a truth (the journal:
the user's interactions since the oldest live snapshot), so any release's state can be recomputed
from it and that release's snapshot. Little-endian, self-checked by CRC-32, one `bytes` per user:
64 bytes, 4 bytes a state coordinate (2 KB at 4 layers of 128) or 2 as float16, 12 an interaction
of the snapshot's recent history (2.4 KB at 200), 23 plus its id's text a journal entry. Decoding
copies nothing but what is asked for. It holds no user id: keys are digests, so an erased user
leaves no name behind.

A record with a float32 state has format 2, one with a float16 state format 3, so that programs
that do not know the latter refuse it. Records of format 1 held of the history only the session
that was open at the watermark. They are read with their journal and without their state, so the
next touch rebuilds them.
"""

import hashlib
import struct
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import HiertcnError

NEVER_US: Final = int(np.iinfo(np.int64).min)
"""A time before every time: nothing folded, nothing erased, nothing trimmed."""

NO_RELEASE: Final = 0
"""``UserRecord.release`` of a record whose state must be rebuilt before it is used."""

DAMAGED: Final = -1
"""Stands for the revision of a stored record that fails its checksum."""

_FORMAT: Final = 2
_HALF_STATE: Final = 3
_WITHOUT_HISTORY: Final = 1
_HEADER: Final = struct.Struct("<IBxHHHqqqqqIIII")
_CRC_BYTES: Final = 4
_FORMAT_AT: Final = 4
_REVISION: Final = struct.Struct("<I")
REVISION_AT: Final = 52
"""Where a record's bytes hold its revision, uint32, for stores that compare it themselves."""
_LATE: Final = 1
_STORED: Final = "_stored"
_F2, _F4, _I4, _I8 = (np.dtype(name) for name in ("<f2", "<f4", "<i4", "<i8"))


class CorruptRecordError(HiertcnError):
    """A stored record fails its checksum or has another format."""


@dataclass(frozen=True, kw_only=True)
class Journal:
    """A user's interactions, by time and, within one time, in the order of arrival.

    Attributes:
        timestamps_us: int64 ``[n]``, ascending.
        item_rows: int32 ``[n]``, rows of the record's release, -1 where it lacks the item.
        late: bool ``[n]``: arrived after the state had passed their time, so never folded.
        keys: uint64 ``[n]``: hash of the caller's idempotency key, 0 where none was given.
        id_offsets: int64 ``[n + 1]`` into ``id_text``.
        id_text: the item ids in UTF-8, concatenated.
    """

    timestamps_us: NDArray[np.int64]
    item_rows: NDArray[np.int32]
    late: NDArray[np.bool_]
    keys: NDArray[np.uint64]
    id_offsets: NDArray[np.int64]
    id_text: bytes

    def __len__(self) -> int:
        stored = self.__dict__.get(_STORED)
        return stored[2] if stored is not None else len(self.timestamps_us)

    def __getattr__(self, name: str) -> Any:
        # A stored journal is decoded when first looked into: most reads of a record need none.
        stored = self.__dict__.get(_STORED)
        if stored is not None:
            self.__dict__.update(_decoded_journal(*stored))
            self.__dict__.pop(_STORED, None)
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(name) from None

    @cached_property
    def item_ids(self) -> list[str]:
        """The item ids ``[n]``."""
        return [self._id_at(index).decode() for index in range(len(self))]

    def contains(self, item_id: str, timestamp_us: int, key: int) -> bool:
        """Whether the journal holds this item at this time, or (unless 0) this key."""
        if not len(self):
            return False
        if key and key in self.keys:
            return True
        times_us = self.timestamps_us
        if timestamp_us > times_us[-1]:
            return False
        first = int(times_us.searchsorted(timestamp_us))
        last = int(times_us.searchsorted(timestamp_us, side="right"))
        wanted = item_id.encode()
        return any(self._id_at(index) == wanted for index in range(first, last))

    def inserted(
        self, item_id: str, item_row: int, timestamp_us: int, *, late: bool, key: int
    ) -> "Journal":
        """The journal with one more entry, after those of the same time."""
        at = int(self.timestamps_us.searchsorted(timestamp_us, side="right"))
        text = item_id.encode()
        place = int(self.id_offsets[at])
        offsets = _with_value(self.id_offsets, at, place)
        offsets[at + 1 :] += len(text)
        return Journal(
            timestamps_us=_with_value(self.timestamps_us, at, timestamp_us),
            item_rows=_with_value(self.item_rows, at, item_row),
            late=_with_value(self.late, at, late),
            keys=_with_value(self.keys, at, key),
            id_offsets=offsets,
            id_text=self.id_text[:place] + text + self.id_text[place:],
        )

    def without_first(self, count: int) -> "Journal":
        """The journal without its ``count`` oldest entries."""
        return Journal(
            timestamps_us=self.timestamps_us[count:],
            item_rows=self.item_rows[count:],
            late=self.late[count:],
            keys=self.keys[count:],
            id_offsets=self.id_offsets[count:] - self.id_offsets[count],
            id_text=self.id_text[int(self.id_offsets[count]) :],
        )

    def with_rows(self, item_rows: NDArray[np.int32]) -> "Journal":
        """The journal with its items' rows ``[n]`` in another release."""
        return replace(self, item_rows=item_rows)

    def _id_at(self, index: int) -> bytes:
        return self.id_text[int(self.id_offsets[index]) : int(self.id_offsets[index + 1])]


EMPTY_JOURNAL: Final = Journal(
    timestamps_us=np.empty(0, np.int64),
    item_rows=np.empty(0, np.int32),
    late=np.empty(0, np.bool_),
    keys=np.empty(0, np.uint64),
    id_offsets=np.zeros(1, np.int64),
    id_text=b"",
)


@dataclass(frozen=True, kw_only=True)
class UserRecord:
    """Everything the sidecar keeps of one user. Times are int64 microseconds since the epoch.

    Attributes:
        release: the release that ``state`` and all item rows belong to, or ``NO_RELEASE``.
        revision: grows with every write; a fold is kept only if nothing was written meanwhile.
        watermark_us: the event time up to which the release's snapshot has seen the log.
        folded_until_us: time of the last interaction folded into ``state``, or ``NEVER_US``.
        trimmed_until_us: newest time among entries that the journal's bound pushed out.
        erased_us: when the user was deleted; snapshots up to then are not read, or ``NEVER_US``.
        state: float32 ``[layers, hidden]``.
        history_item_rows: int32 ``[m]``, the user's newest interactions up to the snapshot's
            watermark, oldest first; those after its folded point are the session open there.
        history_timestamps_us: int64 ``[m]``, ascending.
        journal: the interactions recorded since the oldest live snapshot.
    """

    release: int
    revision: int
    watermark_us: int
    folded_until_us: int
    trimmed_until_us: int
    erased_us: int
    state: NDArray[np.float32]
    history_item_rows: NDArray[np.int32]
    history_timestamps_us: NDArray[np.int64]
    journal: Journal


def user_key(user_id: str) -> bytes:
    """The store's key of a user: a 16-byte BLAKE2b digest, so ids of any length fit."""
    return hashlib.blake2b(user_id.encode(), digest_size=16).digest()


def idempotency_hash(key: str) -> int:
    """A caller's idempotency key as a non-zero 64-bit number; 0 for the empty key."""
    if not key:
        return 0
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") or 1


def new_record(state: NDArray[np.float32]) -> UserRecord:
    """The record of a user of whom nothing is known, to be rebuilt before use."""
    return UserRecord(
        release=NO_RELEASE,
        revision=0,
        watermark_us=NEVER_US,
        folded_until_us=NEVER_US,
        trimmed_until_us=NEVER_US,
        erased_us=NEVER_US,
        state=state,
        history_item_rows=np.empty(0, np.int32),
        history_timestamps_us=np.empty(0, np.int64),
        journal=EMPTY_JOURNAL,
    )


def encode(record: UserRecord, state_dtype: str = "float32") -> bytes:
    """The record as bytes, its state as float32 or (within 0.05%) float16."""
    is_half = state_dtype == "float16"
    stored: bytes | None = record.__dict__.get(_STORED)
    if stored is not None and stored[_FORMAT_AT] == (_HALF_STATE if is_half else _FORMAT):
        return stored
    journal = record.journal
    layers, hidden = record.state.shape
    header = _HEADER.pack(
        0,
        _HALF_STATE if is_half else _FORMAT,
        layers,
        hidden,
        0,
        record.release,
        record.watermark_us,
        record.folded_until_us,
        record.trimmed_until_us,
        record.erased_us,
        record.revision & 0xFFFFFFFF,
        len(record.history_item_rows),
        len(journal),
        len(journal.id_text),
    )
    body = b"".join(
        (
            header[_CRC_BYTES:],
            record.state.astype("<f2" if is_half else "<f4", copy=False).tobytes(),
            record.history_timestamps_us.astype("<i8", copy=False).tobytes(),
            record.history_item_rows.astype("<i4", copy=False).tobytes(),
            journal.timestamps_us.astype("<i8", copy=False).tobytes(),
            journal.keys.astype("<u8", copy=False).tobytes(),
            journal.item_rows.astype("<i4", copy=False).tobytes(),
            np.diff(journal.id_offsets).astype("<u2").tobytes(),
            (journal.late * np.uint8(_LATE)).astype(np.uint8).tobytes(),
            journal.id_text,
        )
    )
    return struct.pack("<I", zlib.crc32(body)) + body


def decode(stored: bytes) -> UserRecord:
    """The record of :func:`encode`'s bytes; its arrays are read-only views into them.

    Raises:
        CorruptRecordError: the bytes fail their checksum or are of another format.
    """
    if len(stored) < _HEADER.size:
        raise CorruptRecordError(f"a user record of {len(stored)} bytes is cut off")
    (
        crc,
        version,
        layers,
        hidden,
        _,
        release,
        watermark_us,
        folded_until_us,
        trimmed_until_us,
        erased_us,
        revision,
        remembered,
        entries,
        text_bytes,
    ) = _HEADER.unpack_from(stored)
    if zlib.crc32(memoryview(stored)[_CRC_BYTES:]) != crc:
        raise CorruptRecordError(f"a user record of {len(stored)} bytes fails its checksum")
    if version not in (_FORMAT, _HALF_STATE, _WITHOUT_HISTORY):
        raise CorruptRecordError(
            f"a user record has format {version}; expected {_FORMAT} or {_HALF_STATE}"
        )
    at = _HEADER.size
    kept = np.frombuffer(stored, _F2 if version == _HALF_STATE else _F4, layers * hidden, at)
    at += kept.nbytes
    state = (kept if kept.dtype == np.float32 else kept.astype(np.float32)).reshape(layers, hidden)
    history_timestamps_us = np.frombuffer(stored, _I8, remembered, at)
    at += history_timestamps_us.nbytes
    history_item_rows = np.frombuffer(stored, _I4, remembered, at)
    at += history_item_rows.nbytes
    journal = EMPTY_JOURNAL
    if entries:
        journal = object.__new__(Journal)
        journal.__dict__[_STORED] = stored, at, entries, text_bytes
    # Past the frozen class's own setter, which would take longer than all of the above.
    record = object.__new__(UserRecord)
    record.__dict__[_STORED] = stored
    record.__dict__.update(
        release=NO_RELEASE if version == _WITHOUT_HISTORY else release,
        revision=revision,
        watermark_us=watermark_us,
        folded_until_us=folded_until_us,
        trimmed_until_us=trimmed_until_us,
        erased_us=erased_us,
        state=state,
        history_item_rows=history_item_rows,
        history_timestamps_us=history_timestamps_us,
        journal=journal,
    )
    return record


def has_revision(stored: bytes | None, revision: int | None) -> bool:
    """Whether :func:`encode`'s bytes are of a revision; absent ones are of None."""
    if stored is None or revision is None:
        return stored is None and revision is None
    # What is found is nearly always what was read before; only then is no checksum needed.
    whole = len(stored) >= _HEADER.size
    if whole and _REVISION.unpack_from(stored, REVISION_AT)[0] == revision:
        return True
    return stored_revision(stored) == revision


def stored_revision(stored: bytes) -> int:
    """The revision of :func:`encode`'s bytes, ``DAMAGED`` if they are."""
    if len(stored) < _HEADER.size:
        return DAMAGED
    if zlib.crc32(memoryview(stored)[_CRC_BYTES:]) != _REVISION.unpack_from(stored)[0]:
        return DAMAGED
    revision: int = _REVISION.unpack_from(stored, REVISION_AT)[0]
    return revision


def _with_value(values: NDArray[Any], at: int, value: int) -> NDArray[Any]:
    """``numpy.insert`` of one value in one dimension, at a twentieth of its cost."""
    longer = np.empty(len(values) + 1, values.dtype)
    longer[:at] = values[:at]
    longer[at] = value
    longer[at + 1 :] = values[at:]
    return longer


def _decoded_journal(stored: bytes, at: int, entries: int, text_bytes: int) -> dict[str, Any]:
    timestamps_us = np.frombuffer(stored, "<i8", entries, at)
    at += timestamps_us.nbytes
    keys = np.frombuffer(stored, "<u8", entries, at)
    at += keys.nbytes
    item_rows = np.frombuffer(stored, "<i4", entries, at)
    at += item_rows.nbytes
    lengths = np.frombuffer(stored, "<u2", entries, at)
    at += lengths.nbytes
    flags = np.frombuffer(stored, np.uint8, entries, at)
    at += flags.nbytes
    id_offsets = np.zeros(entries + 1, np.int64)
    np.cumsum(lengths, out=id_offsets[1:])
    return {
        "timestamps_us": timestamps_us,
        "item_rows": item_rows,
        "late": (flags & _LATE).astype(np.bool_),
        "keys": keys,
        "id_offsets": id_offsets,
        "id_text": stored[at : at + text_bytes],
    }
