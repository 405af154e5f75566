"""Search among some items, exactly and in inverted lists, against plain numpy."""

from pathlib import Path

import numpy as np
import pytest

from hiertcn.items.neighbor_building import build_neighbor_index
from hiertcn.items.neighbors import NeighborIndex
from hiertcn.items.restricted_search import MOST_COMPARED
from hiertcn.items.table import ItemTable

ITEMS, DIM = 20_000, 8


@pytest.fixture(scope="module", params=["exact", "ivf"])
def index(request, tmp_path_factory: pytest.TempPathFactory) -> NeighborIndex:
    folder: Path = tmp_path_factory.mktemp(request.param)
    vectors = np.random.default_rng(0).normal(size=(ITEMS, DIM)).astype(np.float32)
    table = ItemTable.write(folder / "table", vectors)
    below = ITEMS + 1 if request.param == "exact" else 10
    build_neighbor_index(table, folder / "index", exact_below=below, seed=0)
    index = NeighborIndex.open(folder / "index", table)
    assert index.kind == request.param
    return index


def best(index: NeighborIndex, queries: np.ndarray, among: np.ndarray, k: int) -> np.ndarray:
    scores = queries @ np.asarray(index._table.vectors, np.float32).T
    scores[:, ~among] = -np.inf
    return np.argsort(-scores, axis=1)[:, :k]


@pytest.mark.parametrize("count", [1, 7, 500, MOST_COMPARED])
def test_few_items_are_searched_exactly(index: NeighborIndex, count: int) -> None:
    random = np.random.default_rng(count)
    among = np.zeros(ITEMS, np.bool_)
    among[random.choice(ITEMS, count, replace=False)] = True
    queries = random.normal(size=(3, DIM)).astype(np.float32)
    rows, scores = index.search(queries, 10, among=among)
    expected = best(index, queries, among, min(10, count))
    assert np.array_equal(rows[:, : expected.shape[1]], expected)
    assert (rows[:, expected.shape[1] :] == -1).all()
    assert np.isneginf(scores[:, expected.shape[1] :]).all()


def test_among_many_items_the_best_are_found_and_no_other(index: NeighborIndex) -> None:
    random = np.random.default_rng(1)
    among = random.random(ITEMS) < 0.9
    queries = random.normal(size=(20, DIM)).astype(np.float32)
    rows, _ = index.search(queries, 50, among=among)
    assert among[rows].all()
    expected = best(index, queries, among, 50)
    shared = [len(np.intersect1d(*pair)) / 50 for pair in zip(rows, expected, strict=True)]
    assert np.mean(shared) >= 0.95


def test_as_many_are_found_as_there_are(index: NeighborIndex) -> None:
    among = np.arange(ITEMS) % 10 != 0
    count = int(among.sum())
    query = np.random.default_rng(2).normal(size=(1, DIM)).astype(np.float32)
    rows, _ = index.search(query, count + 5, among=among)
    assert np.array_equal(np.sort(rows[0, :count]), np.flatnonzero(among))
    assert (rows[0, count:] == -1).all()
    nothing, _ = index.search(query, 3, among=np.zeros(ITEMS, np.bool_))
    assert nothing.tolist() == [[-1, -1, -1]]
