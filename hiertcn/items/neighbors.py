"""Items with the largest dot product to a query: exact for small tables, inverted lists above.

A neighbour index is a folder, valid for the one table it was built on:

    header.json    kind, the table's checksum, recall and the settings that gave it
    index.faiss    kind "ivf" only: faiss inverted lists with float16 vectors, memory-mapped

Exact search keeps no file: it multiplies with the table itself, which a float16 table must first
be copied to float32 for (100 MB at 200,000 items of 129). One query over 100,000 items takes 7 ms
on one core, with inverted lists 1.2 ms. Above ``exact_below`` items the number of lists probed is
the smallest power of two that finds at least ``min_recall`` of the exact neighbours on one half of
a sample, and the recall reported is that of the other half. Building costs about 5 s per 100,000
items on one core. Inverted lists rather than HNSW because they build five times as fast at the
same recall and speed (300,000 items of 128: 27 s against 132 s).

faiss runs on as many OpenMP threads as it is told for each call, one by default: its own choice,
every core in every calling thread, starves whatever else serves on the machine.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.files import read_json, sha256, whole_directory
from hiertcn.items.inverted_lists import choose_probes, sample_queries, train_and_fill
from hiertcn.items.restricted_search import search_among
from hiertcn.items.table import ItemTable

HEADER_FILE: Final = "header.json"
INDEX_FILE: Final = "index.faiss"

_log = logging.getLogger(__name__)

_FORMAT: Final = 1
_RECALL_AT: Final = 100


@dataclass(frozen=True, kw_only=True)
class NeighborIndexSummary:
    """What was built.

    Attributes:
        kind: "exact" or "ivf".
        items: number of items searched.
        recall: share of the exact ``recall_at`` best items that a search finds; 1 if exact.
        recall_at: number of best items that recall was measured on.
        lists: number of inverted lists; 0 if exact.
        probes: number of lists that a search reads; 0 if exact.
        seconds: time that building and measuring took.
    """

    kind: str
    items: int
    recall: float
    recall_at: int
    lists: int
    probes: int
    seconds: float


def build_neighbor_index(
    table: ItemTable,
    directory: Path,
    *,
    exact_below: int = 200_000,
    min_recall: float = 0.95,
    queries: NDArray[np.float32] | None = None,
    threads: int = 1,
    seed: int = 0,
) -> NeighborIndexSummary:
    """Build the index that suits the table's size, measure its recall, and write it.

    Args:
        table: the vectors to search.
        directory: folder to write, whole or not at all.
        exact_below: tables with fewer items are searched exactly.
        min_recall: the least recall accepted, above 0 and at most 1.
        queries: float32 [n, dim] to measure recall with, n >= 2, such as users' vectors; by
            default a sample of item vectors with noise of half their spread.
        threads: OpenMP threads while building; another number may give another index.
        seed: of the k-means and of the sample.

    Raises:
        InputError: an option is out of range, or ``min_recall`` is not reached while probing at
            most a quarter of the lists.
    """
    directory = Path(directory)
    started = time.monotonic()
    _refuse_bad_options(exact_below, min_recall, threads)
    recall_at = min(_RECALL_AT, len(table))
    lists = probes = 0
    recall = 1.0
    with whole_directory(directory) as aside, _pinned(threads):
        if len(table) < exact_below:
            kind = "exact"
        else:
            kind = "ivf"
            sample = sample_queries(table, seed) if queries is None else queries
            sample = _checked_queries(sample, table.dim)
            if len(sample) < 2:
                raise InputError("queries has one row; recall is measured with at least two")
            index = train_and_fill(table, seed)
            lists = int(index.nlist)
            probes, recall = choose_probes(index, table, sample, recall_at, min_recall)
            faiss.write_index(index, str(aside / INDEX_FILE))
        path = aside / INDEX_FILE
        header = {
            "format": _FORMAT,
            "kind": kind,
            "table_sha256": table.checksum,
            "items": len(table),
            "dim": table.dim,
            "recall": recall,
            "recall_at": recall_at,
            "lists": lists,
            "probes": probes,
            "seed": seed,
            "bytes": path.stat().st_size if path.exists() else 0,
            "sha256": sha256(path) if path.exists() else "",
        }
        (aside / HEADER_FILE).write_text(json.dumps(header, indent=2) + "\n")
    summary = NeighborIndexSummary(
        kind=kind,
        items=len(table),
        recall=recall,
        recall_at=recall_at,
        lists=lists,
        probes=probes,
        seconds=time.monotonic() - started,
    )
    _log.info("wrote the %s neighbour index of %d items to %s", kind, len(table), directory)
    return summary


class NeighborIndex:
    """Search for the items with the largest dot product; safe to share between threads.

    Attributes:
        kind: "exact" or "ivf".
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
        _refuse_bad_options(0, 1.0, threads)
        header = _read_header(directory)
        if header["table_sha256"] != table.checksum:
            raise InputError(
                f"the neighbour index at {directory} was built on another item table than "
                f"{table.directory}; use the two of one release, or build the index again"
            )
        index = None
        if header["kind"] == "ivf":
            index = _read_index(directory / INDEX_FILE, header)
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
        checked = _checked_queries(query[None], self._table.dim)
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
        checked = _checked_queries(queries, self._table.dim)
        if len(checked) == 0:
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        found = min(k, len(self._table) if among is None else int(np.count_nonzero(among)))
        if found == 0:
            return _padded(
                np.empty((len(checked), 0), np.int64), np.empty((len(checked), 0), np.float32), k
            )
        with _pinned(self._threads):
            if among is not None:
                lists, probes = self._index, self._header["probes"]
                rows, scores = search_among(checked, found, among, self._table, lists, probes)
            elif self._vectors is not None:
                scores, rows = faiss.knn(
                    checked, self._vectors, found, metric=faiss.METRIC_INNER_PRODUCT
                )
            else:
                scores, rows = self._index.search(checked, found)
        return _padded(rows, scores, k)

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


def _refuse_bad_options(exact_below: int, min_recall: float, threads: int) -> None:
    if exact_below < 0:
        raise InputError(f"exact_below is {exact_below}; expected a number of items, 0 or more")
    if not 0 < min_recall <= 1:
        raise InputError(f"min_recall is {min_recall}; expected above 0 and at most 1")
    if threads < 1:
        raise InputError(f"threads is {threads}; expected at least 1")


@contextlib.contextmanager
def _pinned(threads: int) -> Iterator[None]:
    # OpenMP's number of threads belongs to the calling thread: setting it once, in the thread that
    # opened the index, would not bind the worker threads that search it.
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _checked_queries(queries: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
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
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise InputError(
            f"{path} does not describe a neighbour index of format {_FORMAT}; build the index "
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
