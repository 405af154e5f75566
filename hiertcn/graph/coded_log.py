"""Some days of the log as numbers on disk, read, fingerprinted and numbered in one pass.

Pairs are found and counted by number (``coded_pairs``). An id is hashed once for everything.
"""

import threading
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.graph.log_fingerprints import RunningFingerprint, hashed_events
from hiertcn.items.hashing import string_buffers

USER: Final = "user"
NUMBER: Final = "number"
AT: Final = "at"

_SCHEMA: Final = pa.schema({USER: pa.int64(), NUMBER: pa.int32(), AT: pa.int64()})


class NumberedIds:
    """Numbers texts from 0 in the order they are first seen; exact, whatever their hashes."""

    def __init__(self) -> None:
        self._count = 0
        self._slots = np.full(1 << 16, -1, np.int32)
        self._hashes = np.empty(0, np.uint64)
        self._offsets = np.zeros(1, np.int64)
        self._text = np.empty(0, np.uint8)

    def number(self, ids: pa.Array, hashes: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Return each id's number, int32 [n].

        Args:
            ids: large_string [n].
            hashes: uint64 [n], of the ids.
        """
        offsets, text = string_buffers(ids)
        self._reserve(len(ids), int(offsets[-1] - offsets[0]))
        numbers = np.empty(len(ids), np.int32)
        known = self._hashes, self._offsets, self._text
        self._count = _number(hashes, offsets, text, self._slots, *known, self._count, numbers)
        return numbers

    def in_text_order(self) -> tuple[pa.Array, NDArray[np.int32], NDArray[np.uint64]]:
        """Return the ids ascending, large_string [ids], and each one's number and hash."""
        offsets = self._offsets[: self._count + 1]
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(self._text[: offsets[-1]])]
        ids = pa.Array.from_buffers(pa.large_string(), self._count, buffers)
        order = pc.sort_indices(ids)
        numbers = np.asarray(order).astype(np.int32)
        return ids.take(order), numbers, self._hashes[numbers]

    def _reserve(self, ids: int, text_bytes: int) -> None:
        """Make room for so many new ids, so that compiled code need not grow anything."""
        wanted = self._count + ids
        if wanted > len(self._hashes):
            self._hashes = np.resize(self._hashes, 2 * wanted)
            self._offsets = np.resize(self._offsets, 2 * wanted + 1)
        used = int(self._offsets[self._count])
        if used + text_bytes > len(self._text):
            self._text = np.resize(self._text, 2 * (used + text_bytes))
        if 2 * wanted > len(self._slots):
            self._slots = np.full(1 << (4 * wanted).bit_length(), -1, np.int32)
            _fill_slots(self._hashes[: self._count], self._slots)


class CodedLog:
    """Events of several days in parquet files of user, item number and time; threads may share it.

    ``user`` is XXH64 of the id, as int64: of 10 M users two have the same with probability 3e-6,
    and would count as one user.

    Args:
        folder: existing folder for the files.
    """

    def __init__(self, folder: Path) -> None:
        self.items = NumberedIds()
        self.files: list[Path] = []
        self._folder = folder
        self._lock = threading.Lock()

    def add(
        self,
        file: Path,
        row_group: int,
        fingerprint: RunningFingerprint | None = None,
        since_us: int | None = None,
    ) -> None:
        """Read a row group of a day's file, from ``since_us`` on, and count it into a fingerprint.

        Raises:
            InputError: the file cannot be read, lacks a column, or a column has another type.
        """
        with self._lock:
            path = self._folder / f"coded-{len(self.files)}.parquet"
            self.files.append(path)
        plain: dict[str, Any] = {
            "compression": "none",
            "use_dictionary": False,
            "write_statistics": False,
        }
        with pq.ParquetWriter(path, _SCHEMA, **plain) as out:
            for events in hashed_events(file, [row_group], since_us):
                with self._lock:
                    numbers = self.items.number(events.items, events.item_hashes)
                    if fingerprint:
                        fingerprint.add(events)
                columns = [events.user_hashes.view(np.int64), numbers, events.at_us]
                out.write_batch(pa.record_batch(columns, schema=_SCHEMA))


@compiled
def _number(
    hashes: Any,
    offsets: Any,
    text: Any,
    slots: Any,
    known_hashes: Any,
    known_offsets: Any,
    known_text: Any,
    known: int,
    numbers: Any,
) -> int:
    mask = np.uint64(len(slots) - 1)
    for k in range(len(hashes)):
        start, length = offsets[k], offsets[k + 1] - offsets[k]
        slot = hashes[k] & mask
        while True:
            number = slots[slot]
            if number < 0:
                slots[slot] = number = known
                known += 1
                known_hashes[number] = hashes[k]
                first = known_offsets[number]
                known_offsets[number + 1] = first + length
                for place in range(length):
                    known_text[first + place] = text[start + place]
                break
            first = known_offsets[number]
            same = known_hashes[number] == hashes[k]
            same = same and known_offsets[number + 1] - first == length
            place = 0
            while same and place < length:
                same = known_text[first + place] == text[start + place]
                place += 1
            if same:
                break
            slot = (slot + np.uint64(1)) & mask
        numbers[k] = number
    return known


@compiled
def _fill_slots(hashes: Any, slots: Any) -> None:
    mask = np.uint64(len(slots) - 1)
    for number in range(len(hashes)):
        slot = hashes[number] & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = number
