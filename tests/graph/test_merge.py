import datetime
import json
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiertcn.errors import InputError
from hiertcn.graph.csr import CSR
from hiertcn.graph.edges import partition_path
from hiertcn.graph.interactions import decayed_interaction_counts
from hiertcn.graph.merge import merge_edges
from hiertcn.graph.options import GraphOptions
from hiertcn.items.index import IdIndex
from hiertcn.items.prior import PRIOR_SCALE, popularity_prior

IDS = ["a", "b", "c", "d", "lonely"]


def write_partition(store, date, rows):
    path = partition_path(store, date)
    path.parent.mkdir(parents=True, exist_ok=True)
    source, target, count = zip(*rows, strict=True) if rows else ((), (), ())
    schema = pa.schema({"source": pa.string(), "target": pa.string(), "count": pa.int64()})
    pq.write_table(pa.table([source, target, count], schema=schema), path)


@pytest.fixture
def index(tmp_path):
    return IdIndex.build(IDS, tmp_path / "index")


@pytest.fixture
def store(tmp_path):
    write_partition(tmp_path / "store", "2026-01-01", [("a", "b", 4), ("c", "d", 9)])
    write_partition(tmp_path / "store", "2026-01-02", [("a", "b", 1), ("b", "c", 2)])
    write_partition(
        tmp_path / "store", "2026-01-03", [("a", "b", 1), ("a", "c", 2), ("a", "unknown", 5)]
    )
    return tmp_path / "store"


def as_lists(csr):
    return [
        list(
            zip(
                csr.indices[csr.indptr[row] : csr.indptr[row + 1]].tolist(),
                csr.weights[csr.indptr[row] : csr.indptr[row + 1]].tolist(),
                strict=True,
            )
        )
        for row in range(csr.items)
    ]


def test_weights_decay_by_age_and_only_the_heaviest_neighbors_stay(tmp_path, index, store):
    options = GraphOptions(half_life_days=1, window_days=2, top_n=1, threads=1)
    csr = merge_edges(store, index, tmp_path / "graph", options)
    # a-b: 1 + 1/2; a-c: 2; b-c: 2/2; c-d lies outside the window.
    assert as_lists(csr) == [[(2, 2.0)], [(0, 1.5)], [(0, 2.0)], [], []]
    statistics = json.loads((tmp_path / "graph" / "statistics.json").read_text())
    assert statistics["isolated_items"] == 2
    assert (statistics["pairs"], statistics["pairs_unknown_items"]) == (4, 1)
    assert statistics["overlap"] == {
        "date": "2026-01-03",
        "previous_date": "2026-01-02",
        "jaccard": 0.25,
        "seen_before": pytest.approx(1 / 3, abs=1e-6),
    }


@pytest.mark.parametrize("memory_limit", ["40B", "4GB"])
def test_merge_equals_a_slow_reference_on_random_partitions(tmp_path, memory_limit):
    rng = np.random.default_rng(0)
    ids = [f"i{k}" for k in range(12)]
    index = IdIndex.build(ids, tmp_path / "index")
    weights = defaultdict(float)
    for day in range(5):
        date = datetime.date(2026, 2, 1 + day).isoformat()
        pairs = {tuple(sorted(rng.choice(ids, 2, replace=False).tolist())) for _ in range(15)}
        rows = [(*pair, int(rng.integers(1, 5))) for pair in sorted(pairs)]
        write_partition(tmp_path / "store", date, rows)
        for source, target, count in rows:
            for one, other in ((source, target), (target, source)):
                weights[ids.index(one), ids.index(other)] += count * 0.5 ** ((4 - day) / 2)
    # So little memory that each row is worked on by itself, and then all at once.
    options = GraphOptions(half_life_days=2, top_n=4, threads=2, memory_limit=memory_limit)
    csr = merge_edges(tmp_path / "store", index, tmp_path / "graph", options)
    for row, found in enumerate(as_lists(csr)):
        units = {n: round(w * 2**20) for (r, n), w in weights.items() if r == row}
        expected = sorted(units, key=lambda n: (-units[n], n))[:4]
        assert [neighbor for neighbor, _ in found] == expected
        for neighbor, weight in found:
            assert weight == pytest.approx(weights[row, neighbor], rel=1e-6)


def test_as_of_chooses_the_window_and_an_empty_window_is_refused(tmp_path, index, store):
    options = GraphOptions(as_of="2026-01-01", half_life_days=0, threads=1)
    assert as_lists(merge_edges(store, index, tmp_path / "g", options))[2] == [(3, 9.0)]
    with pytest.raises(InputError, match="no edge partition from 2025"):
        merge_edges(store, index, tmp_path / "g2", GraphOptions(as_of="2025-06-01"))
    assert not (tmp_path / "g2").exists()
    with pytest.raises(InputError, match="memory_limit is 'lots'; expected a number and a unit"):
        merge_edges(store, index, tmp_path / "g2", GraphOptions(memory_limit="lots"))
    assert not (tmp_path / "g2").exists()
    with pytest.raises(InputError, match="holds no edge partition"):
        merge_edges(tmp_path / "none", index, tmp_path / "g2")


def test_no_edges_at_all_is_a_graph_of_isolated_items(tmp_path, index):
    write_partition(tmp_path / "store", "2026-01-01", [])
    csr = merge_edges(tmp_path / "store", index, tmp_path / "graph")
    assert (csr.items, len(csr.indices)) == (5, 0)


def test_an_index_without_items_gives_an_empty_graph(tmp_path, store):
    csr = merge_edges(store, IdIndex.build([], tmp_path / "none"), tmp_path / "graph")
    assert (csr.items, len(csr.indices)) == (0, 0)
    statistics = json.loads((tmp_path / "graph" / "statistics.json").read_text())
    assert statistics["pairs"] == statistics["pairs_unknown_items"] == 5


def test_a_truncated_graph_is_refused(tmp_path, index, store):
    merge_edges(store, index, tmp_path / "graph")
    path = tmp_path / "graph" / "indices.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"indices\.npy cannot be mapped"):
        CSR.open(tmp_path / "graph")


def test_decayed_counts_and_prior(tmp_path, index):
    for date, items in (("2026-01-01", ["a", "a", "b"]), ("2026-01-03", ["b", "zzz"])):
        folder = tmp_path / "events" / f"date={date}"
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"item_id": items}), folder / "part-0.parquet")
    options = GraphOptions(half_life_days=2, threads=1)
    counts = decayed_interaction_counts(tmp_path / "events", index, options)
    assert counts.tolist() == [1.0, 1.5, 0.0, 0.0, 0.0]
    prior = popularity_prior(counts)
    assert prior.dtype == np.float32
    assert prior.mean() == pytest.approx(0, abs=1e-6)
    assert prior.std() == pytest.approx(PRIOR_SCALE, rel=1e-5)
    assert prior[1] > prior[0] > prior[2]
    assert popularity_prior([3, 3]).tolist() == [0.0, 0.0]
    with pytest.raises(InputError, match="row 1 is -2"):
        popularity_prior([0, -2])


def test_more_neighbors_than_are_kept_by_insertion_come_in_the_same_order(tmp_path):
    rng = np.random.default_rng(1)
    ids = [f"i{k}" for k in range(400)]
    index = IdIndex.build(ids, tmp_path / "index")
    counts = rng.integers(1, 20, 399).tolist()
    pairs = [("i0", other, count) for other, count in zip(ids[1:], counts, strict=True)]
    write_partition(tmp_path / "store", "2026-01-01", pairs)
    expected = sorted(range(1, 400), key=lambda row: (-counts[row - 1], row))
    for top_n in (100, 300):
        csr = merge_edges(tmp_path / "store", index, tmp_path / "g", GraphOptions(top_n=top_n))
        assert [neighbor for neighbor, _ in as_lists(csr)[0]] == expected[:top_n]
