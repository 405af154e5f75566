"""Build the neighbour index that suits a table's size, measure its recall, and gate it.

``neighbors.py`` says what the folder holds and what it costs.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.files import sha256, whole_directory
from hiertcn.items.inverted_lists import (
    QuantizationCost,
    choose_probes,
    fill_flat_int8,
    least_exact_scores,
    quantization_cost,
    recall_of,
    sample_queries,
    train_and_fill,
)
from hiertcn.items.neighbors import (
    FORMAT,
    HEADER_FILE,
    INDEX_FILE,
    checked_queries,
    pinned,
    refuse_bad_threads,
)
from hiertcn.items.reranking import VECTOR_KINDS, VectorKind
from hiertcn.items.table import ItemTable

_log = logging.getLogger(__name__)

_RECALL_AT: Final = 100


@dataclass(frozen=True, kw_only=True)
class NeighborIndexSummary:
    """What was built.

    Attributes:
        kind: "exact", "ivf" or "flat".
        vectors: how an index that is no exact one stores vectors, "float16" or "int8".
        items: number of items searched.
        recall: share of the exact ``recall_at`` best items that a search finds; 1 if exact.
        recall_at: number of best items that recall was measured on.
        lists: number of inverted lists; 0 if exact.
        probes: number of lists that a search reads; 0 if exact.
        quantization: recall that 8 bits cost; None with float16.
        bytes: size of the index file; 0 if exact.
        seconds: time that building and measuring took.
    """

    kind: str
    vectors: VectorKind
    items: int
    recall: float
    recall_at: int
    lists: int
    probes: int
    quantization: QuantizationCost | None
    bytes: int
    seconds: float


def build_neighbor_index(
    table: ItemTable,
    directory: Path,
    *,
    exact_below: int = 200_000,
    min_recall: float = 0.95,
    vectors: VectorKind = "float16",
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
        vectors: how the index stores them: "float16", exact for a float16 table, or "int8".
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
    _refuse_bad_options(exact_below, min_recall, threads, vectors)
    recall_at = min(_RECALL_AT, len(table))
    lists = probes = 0
    recall = 1.0
    quantization = None
    with whole_directory(directory) as aside, pinned(threads):
        kind = "ivf" if len(table) >= exact_below else "flat" if vectors == "int8" else "exact"
        if kind != "exact":
            sample = sample_queries(table, seed) if queries is None else queries
            sample = checked_queries(sample, table.dim)
            if len(sample) < 2:
                raise InputError("queries has one row; recall is measured with at least two")
            if kind == "ivf":
                index = train_and_fill(table, seed, vectors)
                lists = int(index.nlist)
                probes, recall = choose_probes(index, table, sample, recall_at, min_recall)
            else:
                index = fill_flat_int8(table, seed)
                recall = _flat_recall(index, table, sample, recall_at, min_recall)
            faiss.write_index(index, str(aside / INDEX_FILE))
            if vectors == "int8":
                quantization = quantization_cost(index, table, sample, recall_at)
        path = aside / INDEX_FILE
        size = path.stat().st_size if path.exists() else 0
        header = {
            "format": FORMAT,
            "kind": kind,
            "vectors": vectors,
            "table_sha256": table.checksum,
            "items": len(table),
            "dim": table.dim,
            "recall": recall,
            "recall_at": recall_at,
            "lists": lists,
            "probes": probes,
            "quantization": None if quantization is None else asdict(quantization),
            "seed": seed,
            "bytes": size,
            "sha256": sha256(path) if path.exists() else "",
        }
        (aside / HEADER_FILE).write_text(json.dumps(header, indent=2) + "\n")
    summary = NeighborIndexSummary(
        kind=kind,
        vectors=vectors,
        items=len(table),
        recall=recall,
        recall_at=recall_at,
        lists=lists,
        probes=probes,
        quantization=quantization,
        bytes=size,
        seconds=time.monotonic() - started,
    )
    _log.info(
        "wrote the %s neighbour index of %d items to %s: recall@%d %.4f, %d of %d lists probed, "
        "vectors %s%s",
        kind,
        len(table),
        directory,
        recall_at,
        recall,
        probes,
        lists,
        vectors,
        "" if quantization is None else f" (which cost {quantization.lost:.4f} of it)",
    )
    return summary


def int8_cost(table: ItemTable, *, threads: int = 1, seed: int = 0) -> QuantizationCost:
    """Return what 8 bits a coordinate would cost the search for a table's 100 best items.

    Measured on 64 sampled queries with every vector compared: 0.1 s and 13 MB for 100,000 items of
    129 on one core.
    """
    with pinned(threads):
        index = fill_flat_int8(table, seed)
        queries = sample_queries(table, seed)
        return quantization_cost(index, table, queries, min(_RECALL_AT, len(table)))


def _flat_recall(
    index: Any, table: ItemTable, queries: NDArray[np.float32], k: int, min_recall: float
) -> float:
    recall = recall_of(index, table, queries, least_exact_scores(table, queries, k), k)
    if recall < min_recall:
        raise InputError(
            f"the int8 neighbour index over {len(table)} items finds {recall:.3f} of the best {k}, "
            f"expected min_recall {min_recall}; store the vectors as float16"
        )
    return recall


def _refuse_bad_options(
    exact_below: int, min_recall: float, threads: int, vectors: VectorKind
) -> None:
    if vectors not in VECTOR_KINDS:
        raise InputError(f"vectors is {vectors!r}; expected one of {', '.join(VECTOR_KINDS)}")
    if exact_below < 0:
        raise InputError(f"exact_below is {exact_below}; expected a number of items, 0 or more")
    if not 0 < min_recall <= 1:
        raise InputError(f"min_recall is {min_recall}; expected above 0 and at most 1")
    refuse_bad_threads(threads)
