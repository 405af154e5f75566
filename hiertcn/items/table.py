"""The item table: every item's vector, memory-mapped and shared by all processes.

A table is a folder:

    vectors.bin    float16 or float32 [items, dim], row-major, little-endian, no header, padded
                   with zeros to a multiple of 2 MiB so that huge pages can back all of it
    header.json    dtype, shape, and the SHA-256 of vectors.bin

Row r is the vector of the item at row r of the item index. Attaching takes about a millisecond at
any size; the first touch of each page then waits for the disk unless ``prefault`` read it in.
Gathering 512 rows of 129 float16 takes 40 us warm. The checksum is not computed on opening (5 s a
gigabyte on a busy core); :meth:`ItemTable.verify` does it when asked, once a process for as long as
the file stays as it is.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from hiertcn.errors import InputError
from hiertcn.files import read_json, sha256, whole_directory
from hiertcn.items.gathering import dot_rows, gather_rows
from hiertcn.items.mapping import HUGE_PAGE_BYTES, copy_to_huge_pages, map_file

VECTORS_FILE: Final = "vectors.bin"
HEADER_FILE: Final = "header.json"

TableDtype = Literal["float16", "float32"]

_FORMAT: Final = 1
_DTYPES: Final[dict[str, DTypeLike]] = {"float16": "<f2", "float32": "<f4"}
_CHUNK_BYTES: Final = 16 << 20
_ROWS_NAMED: Final = 5

_verified: dict[tuple[int, int, int, int], str] = {}
"""Checksums computed in this process, by device, inode, size and time of change."""


class ItemTable:
    """Read-only vectors of all items; safe to share between threads. See :meth:`open`.

    Attributes:
        directory: the folder it was opened from.
        vectors: float16 or float32 [items, dim], mapped and read-only.
        checksum: SHA-256 of the vectors as the header gives it; identifies the table.
    """

    def __init__(
        self,
        directory: Path,
        vectors: NDArray[np.float16] | NDArray[np.float32],
        checksum: str,
    ) -> None:
        """Use :meth:`open`; this only holds the mapped parts."""
        self.directory = directory
        self.vectors = vectors
        self.checksum = checksum

    @classmethod
    def write(
        cls,
        directory: Path,
        vectors: NDArray[np.floating[Any]],
        dtype: TableDtype = "float16",
    ) -> "ItemTable":
        """Write a table, whole or not at all, and open it.

        Args:
            directory: folder to write.
            vectors: any floats [items, dim]; may be memory-mapped, read 16 MiB at a time.
            dtype: how to store them; float16 keeps 3 significant digits and at most 65504.

        Raises:
            InputError: the shape or dtype is wrong, or a vector is not finite in ``dtype``; the
                rows are named.
        """
        directory = Path(directory)
        stored = _stored_dtype(dtype, "dtype")
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise InputError(
                f"item vectors have the shape {list(vectors.shape)}; expected [items, dim] with "
                "at least one item and one dimension"
            )
        with whole_directory(directory) as aside:
            checksum = _write_vectors(aside / VECTORS_FILE, vectors, stored)
            header = {
                "format": _FORMAT,
                "dtype": dtype,
                "shape": list(vectors.shape),
                "sha256": checksum,
            }
            (aside / HEADER_FILE).write_text(json.dumps(header, indent=2) + "\n")
        return cls.open(directory)

    @classmethod
    def open(
        cls, directory: Path, *, prefault: bool = False, anonymous_huge_pages: bool = False
    ) -> "ItemTable":
        """Attach a table in constant time, unless an option asks to read it all.

        Args:
            directory: the table's folder.
            prefault: read every page in now; without it the first gather of cold rows waits for
                the disk (tens of milliseconds for 512 rows).
            anonymous_huge_pages: copy the table into this process's own memory backed by huge
                pages where the kernel grants them, instead of sharing the file's pages.

        Raises:
            InputError: a file is missing, truncated, or of another format.
        """
        directory = Path(directory)
        dtype, shape, checksum = _read_header(directory)
        path = directory / VECTORS_FILE
        used = shape[0] * shape[1] * dtype.itemsize
        expected = _padded(used)
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            raise InputError(
                f"{path} has {'no' if found is None else found} bytes, expected {expected} for "
                f"{shape[0]} vectors of {shape[1]} {dtype.name}; restore it or embed the items "
                "again"
            )
        contents = (
            copy_to_huge_pages(path) if anonymous_huge_pages else map_file(path, prefault=prefault)
        )
        return cls(directory, contents[:used].view(dtype).reshape(shape), checksum)

    def __len__(self) -> int:
        return int(self.vectors.shape[0])

    @property
    def dim(self) -> int:
        """Length of one vector."""
        return int(self.vectors.shape[1])

    def gather(
        self, rows: ArrayLike, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Return the vectors of ``rows`` as float32 [..., dim].

        Args:
            rows: integers [...]; a negative row (unknown, padding) gives a vector of zeros.
            out: float32 [..., dim], C-contiguous, to fill and return instead of a new array.

        Raises:
            InputError: a row lies past the table, or ``out`` has another shape, dtype or layout.
        """
        wanted = np.asarray(rows)
        if wanted.size and wanted.dtype.kind not in "iu":
            raise InputError(f"item rows are {wanted.dtype}; expected integers")
        shape = (*wanted.shape, self.dim)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise InputError(
                f"out is {out.dtype} {list(out.shape)}; expected a C-contiguous float32 "
                f"{list(shape)}"
            )
        flat = wanted.astype(np.int64, copy=False).reshape(-1)
        bad = gather_rows(self.vectors, flat, out.reshape(-1, self.dim))
        if bad >= 0:
            raise InputError(
                f"row {flat[bad]} lies past the item table at {self.directory}, which has rows 0 "
                f"to {len(self) - 1}; use the index and the table of one release"
            )
        return out

    def dots(self, rows: NDArray[np.int64], queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the dot products of each query with the vectors of its rows, float32 [n, count].

        Args:
            rows: int64 [n, count]; rows negative or past the table give 0.
            queries: float32 [n, dim], C-contiguous.
        """
        found = np.empty(rows.shape, np.float32)
        dot_rows(self.vectors, rows, queries, found)
        return found

    def verify(self) -> None:
        """Compare the vectors with the header's SHA-256, reading them once a process.

        Raises:
            InputError: the contents changed.
        """
        path = self.directory / VECTORS_FILE
        status = path.stat()
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        found = _verified.get(key) or sha256(path)
        _verified[key] = found
        if found != self.checksum:
            raise InputError(
                f"{path} is corrupt: its SHA-256 is {found}, expected {self.checksum}; restore it "
                "or embed the items again"
            )


def _stored_dtype(name: object, field: str) -> "np.dtype[Any]":
    if name not in _DTYPES:
        raise InputError(f"{field} is {name!r}; expected one of {', '.join(_DTYPES)}")
    return np.dtype(_DTYPES[str(name)])


def _padded(size: int) -> int:
    return -(-size // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


def _write_vectors(path: Path, vectors: NDArray[np.floating[Any]], dtype: "np.dtype[Any]") -> str:
    digest = hashlib.sha256()
    rows_per_chunk = max(1, _CHUNK_BYTES // (vectors.shape[1] * 4))
    written = 0
    with path.open("wb") as file:
        for start in range(0, len(vectors), rows_per_chunk):
            with np.errstate(over="ignore"):
                chunk = np.ascontiguousarray(vectors[start : start + rows_per_chunk], dtype)
            _refuse_non_finite(vectors, chunk, start, dtype)
            data = chunk.tobytes()
            digest.update(data)
            written += file.write(data)
        padding = bytes(_padded(written) - written)
        digest.update(padding)
        file.write(padding)
    return digest.hexdigest()


def _refuse_non_finite(
    vectors: NDArray[np.floating[Any]],
    chunk: NDArray[np.floating[Any]],
    start: int,
    dtype: "np.dtype[Any]",
) -> None:
    bad = np.flatnonzero(~np.isfinite(chunk).all(axis=1)) + start
    if not len(bad):
        return
    named = ", ".join(str(row) for row in bad[:_ROWS_NAMED])
    if np.isfinite(vectors[bad[0]]).all():
        raise InputError(
            f"item vectors overflow {dtype.name} in row(s) {named}; store the table as float32 or "
            "normalise the vectors"
        )
    raise InputError(
        f"item vectors are NaN or infinite in row(s) {named}; every value must be finite, so look "
        "for the step that produced them"
    )


def _read_header(directory: Path) -> tuple["np.dtype[Any]", tuple[int, int], str]:
    path = directory / HEADER_FILE
    header = read_json(path)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise InputError(
            f"{path} does not describe an item table of format {_FORMAT}; embed the items again "
            "with this version"
        )
    if sys.byteorder != "little":
        raise InputError(f"{directory} is little-endian and this machine is not; it cannot map it")
    shape, checksum = header.get("shape"), header.get("sha256")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(size, int) and size > 0 for size in shape)
        and isinstance(checksum, str)
    ):
        raise InputError(
            f"{path} gives the shape {shape!r} and sha256 {checksum!r}; expected two positive "
            "integers and a text, so restore it or embed the items again"
        )
    return _stored_dtype(header.get("dtype"), f"{path}: dtype"), (shape[0], shape[1]), checksum
