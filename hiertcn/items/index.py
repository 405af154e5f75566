"""Map ids to rows and back: the one place where a text id becomes a number.

Rows are append-only. An index built on a previous one gives every earlier id its earlier row and
new ids the next rows in first-seen order, so a row keeps its meaning for ever, also when its item
disappears from the log. The previous index's files are only read.

An index is a folder:

    header.json       number of ids, name and seed of the hash, size and SHA-256 of each file
    ids.arrow         Arrow IPC file, one record batch, column ``id`` large_string, in row order
    hashes.npy        uint64 [ids], the ids' hashes, ascending
    rows.npy          int32 [ids], the row of the id at the same place of ``hashes``
    buckets.npy       int64 [2**b + 1], where in ``hashes`` each value of the top b bits begins

Everything is memory-mapped: opening costs the same at 74 M ids as at ten, and processes share the
pages. A look-up hashes the text, finds the hash through its bucket, and compares the text itself,
so a foreign id whose hash happens to match is still unknown. Cost: 21 bytes plus the text an id on
disk; on one core 10,000 Python strings are looked up among 50,000 ids in 1.3 ms and among a million
in 2.9 ms (half a millisecond of which turns them into Arrow; pass Arrow where there is a choice), a
single id in 24 us. Building sorts, in memory: about 60 bytes plus twice the text an id.

Two different ids of one catalogue with one 64-bit hash (probability 1.5e-4 at 74 M ids) are
refused at build with both named; another ``hash_seed`` separates them.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from hiertcn.errors import InputError
from hiertcn.files import read_json, sha256, whole_directory
from hiertcn.items.hash_search import bucket_starts, mark_repeats, search
from hiertcn.items.hashing import string_buffers, xxh64
from hiertcn.items.texts import Texts

IdHash = Callable[[pa.Array, int], NDArray[np.uint64]]
"""A hash of ids: (large_string array [n], seed) -> uint64 [n]."""

HEADER_FILE: Final = "header.json"
IDS_FILE: Final = "ids.arrow"
HASHES_FILE: Final = "hashes.npy"
ROWS_FILE: Final = "rows.npy"
BUCKETS_FILE: Final = "buckets.npy"

_FORMAT: Final = 1
_ID_COLUMN: Final = "id"
_MAX_IDS: Final = 2**31 - 1


class IdIndex:
    """Memory-mapped, append-only map between text ids and rows; safe to share between threads.

    Made by :meth:`build` or :meth:`open`; used for items and for users alike.
    """

    def __init__(
        self,
        directory: Path,
        header: dict[str, Any],
        ids: pa.Array,
        hashes: NDArray[np.uint64],
        rows: NDArray[np.int32],
        buckets: NDArray[np.int64],
        hash_ids: IdHash,
    ) -> None:
        """Use :meth:`open`; this only holds the mapped parts."""
        self.directory = directory
        self._header = header
        self._ids = ids
        self._offsets, self._text = string_buffers(ids)
        self._hashes = hashes
        self._rows = rows
        self._buckets = buckets
        self._hash_ids = hash_ids
        self._hash_seed = int(header["hash_seed"])

    @classmethod
    def build(
        cls,
        ids: Sequence[str] | pa.Array | pa.ChunkedArray,
        directory: Path,
        previous: "IdIndex | None" = None,
        *,
        hash_seed: int = 0,
        hash_ids: IdHash = xxh64,
    ) -> "IdIndex":
        """Write the index of ``previous``'s ids followed by the new ones among ``ids``; open it.

        Args:
            ids: text ids; repeats are allowed and only the first counts.
            directory: folder to write, whole or not at all.
            previous: index whose ids keep their rows; its folder must be another one.
            hash_seed: seed of the hash; change it only to separate two colliding ids.
            hash_ids: the hash itself; give the same one to :meth:`open`.

        Raises:
            InputError: an id is null or no text, two ids collide, or ``directory`` is the
                previous index's own folder.
        """
        directory = Path(directory)
        if previous is not None and directory.resolve() == previous.directory.resolve():
            raise InputError(
                f"the new index would replace the previous one at {directory}; an index is never "
                "modified, so give the new one a folder of its own"
            )
        new_ids = _as_large_strings(ids, nulls_allowed=False)
        all_ids = new_ids if previous is None else pa.concat_arrays([previous.id_array, new_ids])
        kept_ids, hashes, rows = _sort_and_deduplicate(all_ids, hash_ids(all_ids, hash_seed))
        with whole_directory(directory) as aside:
            _write_ids(aside / IDS_FILE, kept_ids)
            np.save(aside / HASHES_FILE, hashes)
            np.save(aside / ROWS_FILE, rows)
            np.save(aside / BUCKETS_FILE, bucket_starts(hashes))
            header = {
                "format": _FORMAT,
                "ids": len(kept_ids),
                "hash": _hash_name(hash_ids),
                "hash_seed": hash_seed,
                "files": {
                    name: {"bytes": (aside / name).stat().st_size, "sha256": sha256(aside / name)}
                    for name in (IDS_FILE, HASHES_FILE, ROWS_FILE, BUCKETS_FILE)
                },
            }
            (aside / HEADER_FILE).write_text(json.dumps(header, indent=2) + "\n")
        return cls.open(directory, hash_ids=hash_ids)

    @classmethod
    def open(cls, directory: Path, *, hash_ids: IdHash = xxh64) -> "IdIndex":
        """Map an index; constant time at any size.

        File sizes are checked against the header, contents only by :meth:`verify`.

        Raises:
            InputError: a file is missing, truncated, or of another format or hash.
        """
        directory = Path(directory)
        header = _read_header(directory, hash_ids)
        try:
            with pa.memory_map(str(directory / IDS_FILE)) as source:
                ids = pa.ipc.open_file(source).get_batch(0).column(0)
            # Plain views: numba takes 30 us a call to recognise an np.memmap.
            hashes, rows, buckets = (
                np.asarray(np.load(directory / name, mmap_mode="r", allow_pickle=False))
                for name in (HASHES_FILE, ROWS_FILE, BUCKETS_FILE)
            )
        except (OSError, ValueError, pa.ArrowException) as error:
            raise InputError(
                f"the id index at {directory} cannot be mapped ({error}); rebuild it"
            ) from error
        if not len(ids) == len(hashes) == len(rows) == header["ids"]:
            raise InputError(
                f"the id index at {directory} holds {len(ids)} ids, {len(hashes)} hashes and "
                f"{len(rows)} rows but its {HEADER_FILE} says {header['ids']}; rebuild it"
            )
        return cls(directory, header, ids, hashes, rows, buckets, hash_ids)

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def id_array(self) -> pa.Array:
        """All ids as a large_string array [ids] in row order, mapped, uncopied."""
        return self._ids

    def rows(self, ids: Sequence[str] | pa.Array | pa.ChunkedArray | Texts) -> NDArray[np.int64]:
        """Return the row of each id, int64 [n]; -1 where an id is unknown or null.

        Raises:
            InputError: an id is not text.
        """
        queries = _as_large_strings(ids, nulls_allowed=True)
        offsets, text = string_buffers(queries)
        rows = np.empty(len(queries), np.int64)
        search(
            self._hash_ids(queries, self._hash_seed),
            offsets,
            text,
            self._hashes,
            self._rows,
            self._buckets,
            self._offsets,
            self._text,
            rows,
        )
        if queries.null_count:
            rows[np.asarray(queries.is_null())] = -1
        return rows

    def ids(self, rows: ArrayLike) -> list[str]:
        """Return the id of each row.

        Args:
            rows: integers [n], each from 0 to ``len(self) - 1``.

        Raises:
            InputError: a row is outside the index; -1 (unknown) has no id either.
        """
        wanted = np.asarray(rows, np.int64).reshape(-1)
        outside = (wanted < 0) | (wanted >= len(self))
        if outside.any():
            raise InputError(
                f"row {wanted[outside.argmax()]} has no id: the index at {self.directory} has rows "
                f"0 to {len(self) - 1}; drop unknown rows (-1) before asking for their ids"
            )
        return self._ids.take(pa.array(wanted)).to_pylist()  # type: ignore[no-any-return]

    def verify(self) -> None:
        """Read every file once and compare it with the header's SHA-256.

        Raises:
            InputError: a file's contents changed; it is named.
        """
        for name, expected in self._header["files"].items():
            found = sha256(self.directory / name)
            if found != expected["sha256"]:
                raise InputError(
                    f"{self.directory / name} is corrupt: its SHA-256 is {found}, expected "
                    f"{expected['sha256']}; restore it or rebuild the index"
                )


def _as_large_strings(
    ids: Sequence[str] | pa.Array | pa.ChunkedArray | Texts, *, nulls_allowed: bool
) -> pa.Array:
    if isinstance(ids, list | tuple):
        # Half of Arrow's time for a few strings; what is no text is for Arrow to say.
        with contextlib.suppress(AttributeError, UnicodeEncodeError):
            ids = Texts.of(ids)
    if isinstance(ids, Texts):
        return ids.arrow()
    try:
        if isinstance(ids, pa.ChunkedArray | pa.Array):
            array = ids
        else:
            array = pa.array(ids, pa.large_string())
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        if not (_is_text(array.type) or pa.types.is_null(array.type)):
            raise InputError(
                f"ids have the type {array.type}; ids are text here, so render them first "
                "(integers in decimal)"
            )
        # Casting chunks one by one keeps 32-bit offsets from overflowing when they are joined.
        if array.type != pa.large_string():
            array = array.cast(pa.large_string())
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
        raise InputError(
            f"ids are not all valid UTF-8 text ({error}); expected one string per id"
        ) from error
    if array.null_count and not nulls_allowed:
        where = int(np.asarray(array.is_null()).argmax())
        raise InputError(f"the id at position {where} is null; drop rows without an id first")
    return array


def _is_text(type_: pa.DataType) -> bool:
    return type_ in (pa.string(), pa.large_string(), pa.string_view())


def _sort_and_deduplicate(
    ids: pa.Array, hashes: NDArray[np.uint64]
) -> tuple[pa.Array, NDArray[np.uint64], NDArray[np.int32]]:
    order = np.argsort(hashes, kind="stable")
    sorted_hashes = hashes[order]
    is_first = np.ones(len(ids), np.bool_)
    offsets, text = string_buffers(ids)
    one_row, other_row = mark_repeats(order, sorted_hashes, offsets, text, is_first)
    if one_row >= 0:
        one, other = ids[one_row].as_py(), ids[other_row].as_py()
        raise InputError(
            f"the ids {one!r} and {other!r} have the same 64-bit hash; build the index with "
            "another hash_seed to separate them"
        )
    kept = int(is_first.sum())
    if kept > _MAX_IDS:
        raise InputError(f"{kept} distinct ids do not fit an index; the most is {_MAX_IDS}")
    new_rows = (np.cumsum(is_first) - 1).astype(np.int32)
    if kept < len(ids):
        ids = ids.filter(pa.array(is_first))
        stays = is_first[order]
        order, sorted_hashes = order[stays], sorted_hashes[stays]
    return ids, sorted_hashes, new_rows[order]


def _write_ids(path: Path, ids: pa.Array) -> None:
    if ids.offset:
        ids = pa.concat_arrays([ids])
    batch = pa.record_batch([ids], names=[_ID_COLUMN])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _read_header(directory: Path, hash_ids: IdHash) -> dict[str, Any]:
    header = read_json(directory / HEADER_FILE)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise InputError(
            f"{directory / HEADER_FILE} does not describe an id index of format {_FORMAT}; "
            "rebuild the index with this version"
        )
    if header["hash"] != _hash_name(hash_ids):
        raise InputError(
            f"the id index at {directory} was built with the hash {header['hash']!r} and opened "
            f"with {_hash_name(hash_ids)!r}; open it with the hash it was built with"
        )
    for name, expected in header["files"].items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != expected["bytes"]:
            raise InputError(
                f"{path} has {'no' if found is None else found} bytes, expected "
                f"{expected['bytes']}; restore it or rebuild the index"
            )
    return header


def _hash_name(hash_ids: IdHash) -> str:
    return getattr(hash_ids, "__name__", type(hash_ids).__name__)
