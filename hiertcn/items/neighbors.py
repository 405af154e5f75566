"""Items with the largest dot product to a query: exact for small tables, inverted lists above.

A neighbour index is a folder, valid for the one table it was built on:

    header.json    kind, the table's checksum, recall and the settings that gave it
    index.faiss    kind "ivf": faiss inverted lists; kind "flat": all vectors, 8 bits a coordinate;
                   memory-mapped

Exact search keeps no file: it multiplies with the table itself, which a float16 table must first
be copied to float32 for (100 MB at 200,000 items of 129). One query over 100,000 items takes 7 ms
on one core, with inverted lists 1.2 ms. Above ``exact_below`` items the number of lists probed is
the smallest power of two that finds at least ``min_recall`` of the exact neighbours on one half of
a sample, and the recall reported is that of the other half. Building costs about 5 s per 100,000
items on one core. Inverted lists rather than HNSW because they build five times as fast at the
same recall and speed (300,000 items of 128: 27 s against 132 s).

``vectors="int8"`` stores 8 bits a coordinate, and orders twice as many candidates as are asked for
by the table's own vectors (``reranking.py``). What the 8 bits alone cost in recall is measured with
every vector compared, and stands in the header beside the recall served. A small table then has an
index of kind "flat" with a quarter of the memory of exact search.

faiss runs on as many OpenMP threads as it is told for each call, one by default: its own choice,
every core in every calling thread, starves whatever else serves on the machine.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.files import read_json, sha256
from hiertcn.items.reranking import CANDIDATES_PER_RESULT, rescored, search_index
from hiertcn.items.restricted_search import search_among
from hiertcn.items.table import ItemTable

HEADER_FILE: Final = "header.json"
INDEX_FILE: Final = "index.faiss"

FORMAT: Final = 1
"""Of the header."""


class NeighborIndex:
    """Search for the items with the largest dot product; safe to share between threads.

    Attributes:
        kind: "exact", "ivf" or "flat".
        recall: as measured when it was built.
    """

    def __init__(
        self, directory: Path, table: ItemTable, header: dict[str, Any], index: Any, threads: int
    ) -> None:
        """Use :meth:`open`; this only holds the parts."""
        self.kind: str = header["kind"]
        self.recall: float = header["recall"]
        self._directory = directory
        self._header = header
        self._table = table
        self._index = index
        self._threads = threads
        self._is_int8 = header.get("vectors") == "int8"
        self._vectors = np.asarray(table.vectors, np.float32) if index is None else None

    @classmethod
    def open(cls, directory: Path, table: ItemTable, *, threads: int = 1) -> "NeighborIndex":
        """Attach an index to the table it was built on.

        Args:
            directory: the index's folder.
            table: the table; its checksum must be the one the index was built on.
            threads: OpenMP threads of each search.

        Raises:
            InputError: a file is missing, truncated or of another format, or the table is another.
        """
        directory = Path(directory)
        refuse_bad_threads(threads)
        header = _read_header(directory)
        if header["table_sha256"] != table.checksum:
            raise InputError(
                f"the neighbour index at {directory} was built on another item table than "
                f"{table.directory}; use the two of one release, or build the index again"
            )
        index: Any = None
        if header["kind"] != "exact":
            index = _read_index(directory / INDEX_FILE, header)
        if header["kind"] == "ivf":
            index.nprobe = header["probes"]
        return cls(directory, table, header, index, threads)

    def scores(self, query: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Return every item's dot product with one query, where search is exact; None above.

        Takes as long as a search: 1 ms for 20,000 items of 129 on one core.

        Args:
            query: float32 [dim].

        Returns:
            float32 [items], or None.

        Raises:
            InputError: the query has another shape or is not finite.
        """
        if self._vectors is None:
            return None
        checked = checked_queries(query[None], self._table.dim)
        products = np.empty(len(self._vectors), np.float32)
        # A third faster than numpy's product of a matrix and a vector.
        faiss.fvec_inner_products_ny(  # type: ignore[attr-defined]
            faiss.swig_ptr(products),
            faiss.swig_ptr(checked),
            faiss.swig_ptr(self._vectors),
            self._table.dim,
            len(products),
        )
        return products

    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        *,
        among: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the ``k`` items with the largest dot product to each query, best first.

        Args:
            queries: float32 [batch, dim].
            k: number of items, at least 1; may exceed the number of items.
            among: bool [items], the items to search among; None for all.

        Returns:
            rows int64 [batch, k], -1 where there are fewer than ``k`` items (to be found), and
            their scores float32 [batch, k], -inf there.

        Raises:
            InputError: the queries have another shape or are not finite, or ``k`` is below 1.
        """
        if k < 1:
            raise InputError(f"k is {k}; expected at least 1 item to look for")
        checked = checked_queries(queries, self._table.dim)
        if len(checked) == 0:
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        found = min(k, len(self._table) if among is None else int(np.count_nonzero(among)))
        if found == 0:
            return _padded(
                np.empty((len(checked), 0), np.int64), np.empty((len(checked), 0), np.float32), k
            )
        with pinned(self._threads):
            if among is not None:
                rows, scores = self._search_among(checked, found, among)
            elif self._vectors is not None:
                scores, rows = faiss.knn(
                    checked, self._vectors, found, metric=faiss.METRIC_INNER_PRODUCT
                )
            else:
                rows, scores = search_index(self._index, self._table, checked, found)
        return _padded(rows, scores, k)

    def _search_among(
        self, queries: NDArray[np.float32], k: int, among: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        lists = self._index if self.kind == "ivf" else None
        probes = self._header["probes"]
        if lists is None or not self._is_int8:
            return search_among(queries, k, among, self._table, lists, probes)
        wider = min(CANDIDATES_PER_RESULT * k, int(np.count_nonzero(among)))
        rows, _ = search_among(queries, wider, among, self._table, lists, probes)
        return rescored(self._table, queries, rows, k)

    def verify(self) -> None:
        """Read the index file once, if there is one, and compare it with the header's SHA-256.

        Raises:
            InputError: the contents changed.
        """
        if self.kind == "exact":
            return
        path = self._directory / INDEX_FILE
        found = sha256(path)
        if found != self._header["sha256"]:
            raise InputError(
                f"{path} is corrupt: its SHA-256 is {found}, expected {self._header['sha256']}; "
                "restore it or build the index again"
            )


def refuse_bad_threads(threads: int) -> None:
    """Raise InputError if ``threads`` is no number of threads."""
    if threads < 1:
        raise InputError(f"threads is {threads}; expected at least 1")


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Let faiss use so many OpenMP threads in this thread, for a while."""
    # OpenMP's number of threads belongs to the calling thread: setting it once, in the thread that
    # opened the index, would not bind the worker threads that search it.
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def checked_queries(queries: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Return queries [batch, dim] as contiguous float32.

    Raises:
        InputError: they have another shape or are not finite.
    """
    checked = np.ascontiguousarray(queries, np.float32)
    if checked.ndim != 2 or checked.shape[1] != dim:
        raise InputError(
            f"queries have the shape {list(checked.shape)}; expected [batch, {dim}] like the table"
        )
    finite = np.isfinite(checked).all(axis=1)
    if not finite.all():
        raise InputError(
            f"query {int((~finite).argmax())} has NaN or infinite values; expected finite floats"
        )
    return checked


def _padded(
    rows: NDArray[np.int64], scores: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    missing = ((0, 0), (0, k - rows.shape[1]))
    rows = np.pad(rows, missing, constant_values=-1)
    scores = np.pad(scores, missing, constant_values=-np.inf)
    scores[rows < 0] = -np.inf
    return rows, scores


def _read_header(directory: Path) -> dict[str, Any]:
    path = directory / HEADER_FILE
    header = read_json(path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(
            f"{path} does not describe a neighbour index of format {FORMAT}; build the index "
            "again with this version"
        )
    return header


def _read_index(path: Path, header: dict[str, Any]) -> Any:
    found = path.stat().st_size if path.is_file() else None
    if found != header["bytes"]:
        raise InputError(
            f"{path} has {'no' if found is None else found} bytes, expected {header['bytes']}; "
            "restore it or build the index again"
        )
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY)
    except RuntimeError as error:
        raise InputError(
            f"{path} cannot be read as a faiss index; restore it or build the index again"
        ) from error
