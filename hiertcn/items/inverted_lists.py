"""Train faiss inverted lists on an item table and probe just enough of them for a recall.

Training takes 64 vectors a list; filling reads the table 65,536 rows at a time, so memory is that
of the index. Recall is measured against exact search on queries given or sampled: the number of
lists probed is doubled until one half of the queries and then the other reach it.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any, Final

import faiss
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.items.exact_search import best_items
from hiertcn.items.reranking import VectorKind, flat_int8, is_int8, quantizer_type, search_index
from hiertcn.items.table import ItemTable

_log = logging.getLogger(__name__)

_CHUNK_ROWS: Final = 65_536
_SAMPLED_QUERIES: Final = 512
_QUANTIZATION_QUERIES: Final = 64
_TRAINING_ROWS_PER_LIST: Final = 64
# faiss warns below this many training vectors a centroid.
_MIN_ROWS_PER_LIST: Final = 39
# Probing more than this share of the lists costs more than exact search in batches.
_MAX_PROBED_SHARE: Final = 1 / 4
_TIE_TOLERANCE: Final = 1e-5


def sample_queries(table: ItemTable, seed: int) -> NDArray[np.float32]:
    """Return item vectors with noise of half their spread, float32 [n, dim], n from 2 to 512."""
    random = np.random.default_rng(seed)
    rows = random.choice(len(table), min(_SAMPLED_QUERIES, len(table)), replace=False)
    vectors: NDArray[np.float32] = table.gather(rows)
    if len(vectors) == 1:
        vectors = np.repeat(vectors, 2, axis=0)
    noise = random.standard_normal(vectors.shape, np.float32)
    noisy: NDArray[np.float32] = vectors + 0.5 * vectors.std(axis=0) * noise
    return noisy


def train_and_fill(table: ItemTable, seed: int, vectors: VectorKind = "float16") -> Any:
    """Return a faiss inverted-list index (inner product) of the whole table."""
    items = len(table)
    wanted = 2 ** round(math.log2(4 * math.sqrt(items)))
    lists = max(1, min(wanted, items // _MIN_ROWS_PER_LIST))
    quantizer = faiss.IndexFlatIP(table.dim)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer,
        table.dim,
        lists,
        quantizer_type(vectors),
        faiss.METRIC_INNER_PRODUCT,
        # Whole vectors, not residuals: scores of a float16 table are then exact.
        False,
    )
    index.cp.seed = seed
    index.cp.spherical = True
    training_rows = np.random.default_rng(seed).choice(
        items, min(items, lists * _TRAINING_ROWS_PER_LIST), replace=False
    )
    _log.info("clustering %d of %d item vectors into %d lists", len(training_rows), items, lists)
    index.train(table.gather(np.sort(training_rows)))
    _fill(index, table, "filling inverted lists")
    return index


def fill_flat_int8(table: ItemTable, seed: int) -> Any:
    """Return a faiss index that compares every vector of the table, 8 bits a coordinate."""
    rows = np.random.default_rng(seed).choice(
        len(table), min(len(table), _CHUNK_ROWS), replace=False
    )
    index = flat_int8(table, table.gather(np.sort(rows)))
    _fill(index, table, "filling int8 vectors")
    return index


def _fill(index: Any, table: ItemTable, what: str) -> None:
    items = len(table)
    for start in tqdm(range(0, items, _CHUNK_ROWS), desc=what, unit="chunk", mininterval=2):
        index.add(table.gather(np.arange(start, min(start + _CHUNK_ROWS, items))))


def choose_probes(
    index: Any, table: ItemTable, queries: NDArray[np.float32], k: int, min_recall: float
) -> tuple[int, float]:
    """Return how many lists to probe and the share of the exact ``k`` best items then found.

    Args:
        index: what :func:`train_and_fill` returned for ``table``; its ``nprobe`` is changed.
        table: the vectors.
        queries: float32 [n, dim], n >= 2; the first half chooses, the second is measured.
        k: number of best items.
        min_recall: least share accepted.

    Raises:
        InputError: ``min_recall`` is not reached with a quarter of the lists.
    """
    least_scores = least_exact_scores(table, queries, k)
    half = len(queries) // 2
    most = max(1, int(index.nlist * _MAX_PROBED_SHARE))
    probes = 1
    while True:
        index.nprobe = probes
        recall = recall_of(index, table, queries[:half], least_scores[:half], k)
        if recall >= min_recall:
            held_out = recall_of(index, table, queries[half:], least_scores[half:], k)
            if held_out >= min_recall:
                return probes, held_out
            recall = held_out
        if probes >= most:
            raise InputError(
                f"the neighbour index over {len(table)} items finds {recall:.3f} of the best {k} "
                f"while probing {probes} of {index.nlist} lists, expected min_recall "
                f"{min_recall}; raise exact_below above {len(table)} to search exactly"
            )
        probes = min(2 * probes, most)


def least_exact_scores(
    table: ItemTable, queries: NDArray[np.float32], k: int
) -> NDArray[np.float32]:
    """Return the score of the ``k``-th best item of each query, float32 [n], by exact search."""
    least: NDArray[np.float32] = best_items(table, queries, k)[1].min(axis=1)
    return least


def recall_of(
    index: Any,
    table: ItemTable,
    queries: NDArray[np.float32],
    least_scores: NDArray[np.float32],
    k: int,
    *,
    reranked: bool = True,
) -> float:
    """Return the share of the exact ``k`` best items that a search finds.

    By score, not by row: any of several items that tie for the last place is as right.

    Args:
        index: a faiss index of the table.
        table: the vectors.
        queries: float32 [n, dim].
        least_scores: what :func:`least_exact_scores` returned for them.
        k: number of best items.
        reranked: search as it is served; otherwise keep the ``k`` that an index of 8 bits puts
            first.
    """
    rows, scores = search_index(index, table, queries, k)
    if not reranked and is_int8(index):
        _, rows = index.search(queries, k)
        scores = np.stack(
            [table.gather(found) @ query for found, query in zip(rows, queries, strict=True)]
        )
        scores[rows < 0] = -np.inf
    tolerance = _TIE_TOLERANCE * np.maximum(1, np.abs(least_scores))
    return float((scores >= (least_scores - tolerance)[:, None]).mean())


@dataclass(frozen=True, kw_only=True)
class QuantizationCost:
    """What 8 bits a coordinate cost when every vector is compared.

    Attributes:
        lost: share of the exact best items not found, with exact scores of the candidates.
        lost_without_reranking: the same without them.
    """

    lost: float
    lost_without_reranking: float


def quantization_cost(
    index: Any, table: ItemTable, queries: NDArray[np.float32], k: int
) -> QuantizationCost:
    """Measure an index of 8 bits apart from its lists, on at most 64 of the queries.

    Leaves the index probing all its lists, if it has any.
    """
    asked = queries[-_QUANTIZATION_QUERIES:]
    if hasattr(index, "nlist"):
        index.nprobe = index.nlist
    least_scores = least_exact_scores(table, asked, k)
    return QuantizationCost(
        lost=1.0 - recall_of(index, table, asked, least_scores, k),
        lost_without_reranking=1.0
        - recall_of(index, table, asked, least_scores, k, reranked=False),
    )
