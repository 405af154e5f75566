"""An overlay behaves as if the release had known its items: held against a catalogue that does."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.items.attribute_filters import AttributeFilter
from hiertcn.items.index import IdIndex
from hiertcn.items.neighbor_building import build_neighbor_index
from hiertcn.items.neighbors import NeighborIndex
from hiertcn.items.table import ItemTable
from hiertcn.serving.log.logged_items import LoggedItem
from hiertcn.serving.new_items.item_overlay import (
    CatalogueItems,
    CatalogueNeighbors,
    CatalogueTable,
    ItemOverlay,
)

ITEMS, DIM = 12, 4
BATCHES = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True), min_size=1, max_size=5
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    rng = np.random.default_rng(0)
    index = IdIndex.build([f"item-{n}" for n in range(ITEMS)], folder / "index")
    vectors = rng.normal(size=(ITEMS, DIM)).astype(np.float32)
    table = ItemTable.write(folder / "table", vectors, "float32")
    build_neighbor_index(table, folder / "neighbors")
    return index, table, NeighborIndex.open(folder / "neighbors", table), vectors


def _filled(parts, batches, rng) -> tuple[ItemOverlay, list[str], np.ndarray]:
    """An overlay, and the whole catalogue as plain lists."""
    index, table, _, released = parts
    overlay = ItemOverlay(len(index), table.dim)
    ids = [f"item-{n}" for n in range(ITEMS)]
    vectors = list(released)
    version = 0
    for batch in batches:
        new = rng.normal(size=(len(batch), DIM)).astype(np.float32)
        items = []
        for n in batch:
            version += 1
            items.append(LoggedItem(item_id=f"new-{n}", version=version, received_us=0))
        overlay.add(items, new)
        for item, vector in zip(items, new, strict=True):
            if item.item_id in ids:
                vectors[ids.index(item.item_id)] = vector
            else:
                ids.append(item.item_id)
                vectors.append(vector)
        assert overlay.version == version
    return overlay, ids, np.array(vectors)


@settings(max_examples=40)
@given(batches=BATCHES, seed=st.integers(0, 2**16), k=st.integers(1, 30))
def test_it_equals_a_catalogue_that_knows_the_items(parts, batches, seed, k):
    rng = np.random.default_rng(seed)
    index, table, neighbors, _ = parts
    overlay, ids, vectors = _filled(parts, batches, rng)
    items = CatalogueItems(index, overlay)
    assert len(items) == len(ids) == len(CatalogueTable(table, overlay))
    asked = [*rng.permutation(ids).tolist(), "nobody"]
    expected = [ids.index(one) if one in ids else -1 for one in asked]
    assert items.rows(asked).tolist() == expected
    assert items.rows(pa.array(asked, pa.large_string())).tolist() == expected
    rows = rng.integers(0, len(ids), 9)
    assert items.ids(rows) == [ids[row] for row in rows]
    with pytest.raises(InputError, match=r"has no id"):
        items.ids([len(ids)])

    gathered = CatalogueTable(table, overlay).gather(np.append(rows, -1).reshape(2, 5))
    np.testing.assert_array_equal(gathered.reshape(10, DIM)[:9], vectors[rows])
    assert not gathered[1, 4].any()
    out = np.empty((9, DIM), np.float32)
    assert CatalogueTable(table, overlay).gather(rows, out=out) is out
    np.testing.assert_array_equal(out, vectors[rows])

    asked_rows = np.append(rows, [-1, -1, len(ids)]).reshape(3, 4)
    mine = rng.normal(size=(3, DIM)).astype(np.float32)
    dots = np.append(vectors, np.zeros((2, DIM)), axis=0)[asked_rows] * mine[:, None]
    np.testing.assert_allclose(
        CatalogueTable(table, overlay).dots(np.where(asked_rows < len(ids), asked_rows, -1), mine),
        np.where((asked_rows >= 0) & (asked_rows < len(ids)), dots.sum(axis=2), 0),
        rtol=1e-4,
        atol=1e-5,
    )

    search = CatalogueNeighbors(neighbors, overlay)
    queries = rng.normal(size=(3, DIM)).astype(np.float32)
    exact = queries @ vectors.T
    np.testing.assert_allclose(search.scores(queries[0]), exact[0], rtol=1e-5, atol=1e-5)
    for among in (None, rng.random(len(ids)) < 0.5, np.zeros(len(ids), np.bool_)):
        found, scores = search.search(queries, k, among=among)
        allowed = np.ones(len(ids), np.bool_) if among is None else among
        best = np.sort(np.where(allowed, exact, -np.inf), axis=1)[:, ::-1]
        best = np.pad(best, ((0, 0), (0, k)), constant_values=-np.inf)[:, :k]
        np.testing.assert_allclose(scores, best, rtol=1e-5, atol=1e-5)
        for row, score, query in zip(found, scores, queries, strict=True):
            real = row >= 0
            assert (real == ~np.isneginf(score)).all()
            assert len(set(row[real])) == real.sum()
            assert allowed[row[real]].all()
            np.testing.assert_allclose(
                vectors[row[real]] @ query, score[real], rtol=1e-5, atol=1e-5
            )


def test_an_older_mask_leaves_the_newest_items_out(parts):
    overlay, _, _ = _filled(parts, [[0, 1]], np.random.default_rng(0))
    search = CatalogueNeighbors(parts[2], overlay)
    rows, _ = search.search(np.ones((1, DIM), np.float32), 20, among=np.ones(ITEMS, np.bool_))
    assert set(rows[0][rows[0] >= 0]) == set(range(ITEMS))


def test_attributes_of_new_items_pass_filters_as_those_of_the_release_do():
    overlay = ItemOverlay(ITEMS, DIM)
    attributes = [
        {
            "color": "red",
            "price": 3.0,
            "tags": ("a", "b"),
            "new": 1.0,
            "at": "2026-01-02T03:00:00Z",
        },
        {"color": "blue", "price": 4.5, "tags": ("b",), "new": 0.0, "at": "2026-01-03"},
        {"color": 3.0, "price": "cheap", "tags": "a", "new": 7.0, "at": "yesterday"},
        {},
    ]
    items = [
        LoggedItem(item_id=f"new-{n}", version=n + 1, received_us=0, attributes=one)
        for n, one in enumerate(attributes)
    ]
    overlay.add(items, np.zeros((4, DIM), np.float32))
    kinds = {"color": "text", "price": "number", "tags": "tags", "new": "boolean", "at": "time"}
    kinds["stock"] = "integer"

    assert overlay.title(ITEMS) is None

    def passing(**condition) -> list[bool]:
        return overlay.passing([AttributeFilter(**condition)], kinds).tolist()

    assert passing(column="color", any_of=("red", "green")) == [True, False, False, False]
    assert passing(column="color", none_of=("red",)) == [False, True, True, True]
    assert passing(column="price", min="4") == [False, True, False, False]
    assert passing(column="tags", any_of=("a",)) == [True, False, False, False]
    assert passing(column="new", any_of=("true",)) == [True, False, False, False]
    assert passing(column="at", min="2026-01-03") == [False, True, False, False]
    assert passing(column="stock", any_of=("3",)) == [False] * 4
