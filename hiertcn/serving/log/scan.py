"""Reads what live counts need from whole log segments, compiled: a restart must not take minutes.

Item, time and what tells duplicates apart, of every interaction in a segment, in a fraction of the
time of ``event_log.read_segment``. Checksums are not verified here: sealed segments were when they
were exported, and the open one when it was opened.
"""

from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.errors import InputError
from hiertcn.items.hashing import xxh64
from hiertcn.serving.log.event_log import MAGIC

_FRAME: Final = 8
_HEADER: Final = 32
_INTERACTION: Final = 1


class ScannedInteractions(NamedTuple):
    """The interactions of a segment, in the order of the log.

    Attributes:
        item_ids: Arrow large_string ``[n]``.
        timestamps_us: int64 ``[n]``.
        same: uint64 ``[n]``, equal for the same user, item and time.
        keys: uint64 ``[n]``, equal for the same user and idempotency key, 0 without a key.
        users: uint64 ``[n]``, equal for the same user: XXH64 of their ids.
        user_ids: Arrow large_string ``[n]``.
    """

    item_ids: pa.Array
    timestamps_us: NDArray[np.int64]
    same: NDArray[np.uint64]
    keys: NDArray[np.uint64]
    users: NDArray[np.uint64]
    user_ids: pa.Array


def scan(data: NDArray[np.uint8], end: int | None = None) -> ScannedInteractions:
    """Read a segment.

    Args:
        data: uint8 ``[bytes]``, the whole segment.
        end: the byte to stop at, between two entries; None reads all.

    Raises:
        InputError: it is no segment, or an entry does not end where the next begins.
    """
    start, end = len(MAGIC), len(data) if end is None else end
    if data[:start].tobytes() != MAGIC or end > len(data):
        raise InputError("it is not an event log segment")
    count, text_bytes, item_bytes = _measure(data, start, end)
    if count < 0:
        raise InputError("the lengths of its entries do not add up")
    timestamps_us = np.empty(count, np.int64)
    given_keys = np.empty(count, np.uint64)
    offsets = {name: np.zeros(count + 1, np.int64) for name in ("item", "same", "key", "user")}
    items = np.empty(item_bytes, np.uint8)
    users = np.empty(text_bytes - item_bytes, np.uint8)
    # Beside the texts: the user's length and the time, or the key.
    same = np.empty(text_bytes + 10 * count, np.uint8)
    key = np.empty(text_bytes - item_bytes + 8 * count, np.uint8)
    _copy(
        data,
        start,
        end,
        timestamps_us,
        given_keys,
        (offsets["item"], offsets["same"], offsets["key"], offsets["user"]),
        (items, same, key, users),
    )
    keys = xxh64(_strings(offsets["key"], key))
    user_ids = _strings(offsets["user"], users)
    return ScannedInteractions(
        _strings(offsets["item"], items),
        timestamps_us,
        xxh64(_strings(offsets["same"], same)),
        np.where(given_keys == 0, np.uint64(0), keys),
        xxh64(user_ids),
        user_ids,
    )


def entries_of_kind(
    data: NDArray[np.uint8], kind: int, end: int | None = None
) -> NDArray[np.int64]:
    """Where the entries of one kind begin, int64 ``[n]``, ascending.

    Args:
        data: uint8 ``[bytes]``, the whole segment.
        kind: their first byte.
        end: the byte to stop at, between two entries; None reads all.

    Raises:
        InputError: it is no segment, or an entry does not end where the next begins.
    """
    start, end = len(MAGIC), len(data) if end is None else end
    if data[:start].tobytes() != MAGIC or end > len(data):
        raise InputError("it is not an event log segment")
    places = np.empty(0, np.int64)
    count = _find(data, start, end, kind, places)
    if count > 0:
        places = np.empty(count, np.int64)
        _find(data, start, end, kind, places)
    if count < 0:
        raise InputError("the lengths of its entries do not add up")
    return places


def _strings(offsets: NDArray[np.int64], text: NDArray[np.uint8]) -> pa.Array:
    return pa.Array.from_buffers(
        pa.large_string(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(text)]
    )


@compiled
def _number(data: Any, at: int, width: int) -> int:
    value = 0
    for k in range(width):
        value |= int(data[at + k]) << (8 * k)
    return value


@compiled
def _measure(data: Any, start: int, end: int) -> tuple[int, int, int]:
    count = texts = items = 0
    at = start
    while at < end:
        entry = at + _FRAME
        after = entry + _number(data, at, 4) if entry < end else end + 1
        if not entry < after <= end:
            return -1, 0, 0
        if data[entry] == _INTERACTION:
            if after - entry < _HEADER:
                return -1, 0, 0
            text = _number(data, entry + 2, 2) + _number(data, entry + 4, 2)
            if text > after - entry - _HEADER:
                return -1, 0, 0
            count += 1
            items += _number(data, entry + 4, 2)
            texts += text
        at = after
    return count, texts, items


@compiled
def _find(data: Any, start: int, end: int, kind: int, places: Any) -> int:
    """Count the entries of a kind and note as many of their places as fit; -1 for damage."""
    count = 0
    at = start
    while at < end:
        entry = at + _FRAME
        after = entry + _number(data, at, 4) if entry < end else end + 1
        if not entry < after <= end:
            return -1
        if data[entry] == kind:
            if count < len(places):
                places[count] = at
            count += 1
        at = after
    return count


@compiled
def _append(data: Any, first: int, count: int, out: Any, at: int) -> int:
    for k in range(count):
        out[at + k] = data[first + k]
    return at + count


@compiled
def _copy(
    data: Any, start: int, end: int, timestamps_us: Any, keys: Any, offsets: Any, texts: Any
) -> None:
    item_offsets, same_offsets, key_offsets, user_offsets = offsets
    items, same, key, users = texts
    at, n = start, 0
    while at < end:
        entry = at + _FRAME
        if data[entry] == _INTERACTION:
            user_bytes = _number(data, entry + 2, 2)
            item_bytes = _number(data, entry + 4, 2)
            user = entry + _HEADER
            timestamps_us[n] = _number(data, entry + 8, 8)
            keys[n] = np.uint64(_number(data, entry + 24, 8))
            item_offsets[n + 1] = _append(
                data, user + user_bytes, item_bytes, items, item_offsets[n]
            )
            place = _append(data, entry + 2, 2, same, same_offsets[n])
            place = _append(data, entry + 8, 8, same, place)
            same_offsets[n + 1] = _append(data, user, user_bytes + item_bytes, same, place)
            place = _append(data, entry + 24, 8, key, key_offsets[n])
            key_offsets[n + 1] = _append(data, user, user_bytes, key, place)
            user_offsets[n + 1] = _append(data, user, user_bytes, users, user_offsets[n])
            n += 1
        at = entry + _number(data, at, 4)
