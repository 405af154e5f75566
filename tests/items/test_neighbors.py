"""Neighbour search against plain numpy, its recall gate, and its refusals."""

import json
import os
import threading
from pathlib import Path

import faiss
import numpy as np
import pytest

from hiertcn.errors import InputError
from hiertcn.items.neighbor_building import build_neighbor_index
from hiertcn.items.neighbors import NeighborIndex
from hiertcn.items.table import ItemTable, TableDtype


def clustered(items: int, dim: int = 24, clusters: int = 60) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.normal(size=(clusters, dim))
    vectors = centres[random.integers(0, clusters, items)] + 0.5 * random.normal(size=(items, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def user_vectors(count: int, dim: int = 24) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, dim)).astype(np.float32)


def reference(table: ItemTable, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = queries @ np.asarray(table.vectors, np.float32).T
    rows = np.argsort(-scores, axis=1)[:, :k]
    return rows, np.take_along_axis(scores, rows, axis=1)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("batch", "k"), [(1, 1), (3, 10), (40, 7)])
def test_exact_search_agrees_with_numpy(
    tmp_path: Path, dtype: TableDtype, batch: int, k: int
) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(300), dtype)
    summary = build_neighbor_index(table, tmp_path / "index", seed=0)
    index = NeighborIndex.open(tmp_path / "index", table)
    rows, scores = index.search(user_vectors(batch), k)
    expected_rows, expected_scores = reference(table, user_vectors(batch), k)
    assert (summary.kind, summary.recall, index.kind) == ("exact", 1.0, "exact")
    assert (rows.dtype, scores.dtype) == (np.int64, np.float32)
    assert np.array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    index.verify()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_inverted_lists_reach_their_recall(tmp_path: Path, dtype: TableDtype) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(8000), dtype)
    summary = build_neighbor_index(table, tmp_path / "index", exact_below=5000, seed=0)
    index = NeighborIndex.open(tmp_path / "index", table)
    queries = table.gather(np.arange(0, 8000, 40))
    rows, scores = index.search(queries, 100)
    expected_rows, _ = reference(table, queries, 100)
    found = np.mean(
        [len(np.intersect1d(*pair)) / 100 for pair in zip(rows, expected_rows, strict=True)]
    )
    assert summary.kind == "ivf"
    assert summary.probes < summary.lists
    assert summary.recall >= 0.95
    assert found >= 0.93
    true_scores = np.einsum("qd,qkd->qk", queries, table.gather(rows))
    np.testing.assert_allclose(scores, true_scores, atol=2e-6 if dtype == "float16" else 2e-3)
    index.verify()


@pytest.mark.parametrize(("exact_below", "kind"), [(5000, "ivf"), (10_000, "flat")])
def test_int8_vectors_reach_their_recall_with_exact_scores(
    tmp_path: Path, exact_below: int, kind: str
) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(8000))
    summary = build_neighbor_index(
        table, tmp_path / "int8", exact_below=exact_below, vectors="int8", seed=0
    )
    whole = build_neighbor_index(table, tmp_path / "whole", exact_below=0, seed=0)
    index = NeighborIndex.open(tmp_path / "int8", table)
    queries = table.gather(np.arange(0, 8000, 40))
    rows, scores = index.search(queries, 100)
    expected_rows, _ = reference(table, queries, 100)
    found = np.mean(
        [len(np.intersect1d(*pair)) / 100 for pair in zip(rows, expected_rows, strict=True)]
    )
    assert (summary.kind, index.kind) == (kind, kind)
    assert summary.recall >= 0.95
    assert found >= 0.93
    assert summary.bytes < 0.75 * whole.bytes
    assert summary.quantization is not None
    assert 0 <= summary.quantization.lost <= summary.quantization.lost_without_reranking < 0.2
    header = json.loads((tmp_path / "int8" / "header.json").read_text())
    assert (header["vectors"], header["recall"]) == ("int8", summary.recall)
    assert header["quantization"]["lost"] == summary.quantization.lost
    np.testing.assert_allclose(
        scores, np.einsum("qd,qkd->qk", queries, table.gather(rows)), atol=2e-6
    )
    assert (np.diff(scores, axis=1) <= 0).all()
    index.verify()


@pytest.mark.parametrize("exact_below", [0, 10_000])
def test_int8_vectors_search_among_some_items(tmp_path: Path, exact_below: int) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(3000))
    build_neighbor_index(table, tmp_path / "index", exact_below=exact_below, vectors="int8", seed=0)
    index = NeighborIndex.open(tmp_path / "index", table)
    among = np.arange(3000) % 3 == 1
    rows, scores = index.search(user_vectors(5), 20, among=among)
    assert among[rows].all()
    true_scores = np.einsum("qd,qkd->qk", user_vectors(5), table.gather(rows))
    np.testing.assert_allclose(scores, true_scores, atol=1e-5)


@pytest.mark.parametrize("items", [1, 2, 50])
@pytest.mark.parametrize("exact_below", [0, 1000])
def test_int8_vectors_pad_what_is_missing(tmp_path: Path, items: int, exact_below: int) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(items))
    build_neighbor_index(table, tmp_path / "index", exact_below=exact_below, vectors="int8", seed=0)
    rows, scores = NeighborIndex.open(tmp_path / "index", table).search(user_vectors(2), 60)
    assert [sorted(r) for r in rows[:, :items].tolist()] == [list(range(items))] * 2
    assert (rows[:, items:] == -1).all()
    assert (scores[:, items:] == -np.inf).all()


def test_int8_vectors_that_lose_too_much_are_refused(tmp_path: Path) -> None:
    # One value in a thousand spreads its coordinate's scale over nothing else.
    vectors = clustered(4000)
    vectors[::1000] *= 3000
    table = ItemTable.write(tmp_path / "table", vectors, "float32")
    with pytest.raises(InputError, match=r"int8 .* expected min_recall 0\.95; store .* float16"):
        build_neighbor_index(table, tmp_path / "index", vectors="int8", queries=user_vectors(50))
    assert not (tmp_path / "index").exists()
    with pytest.raises(InputError, match="vectors is 'int4'; expected one of float16, int8"):
        build_neighbor_index(table, tmp_path / "index", vectors="int4")  # type: ignore[arg-type]


def test_the_same_seed_builds_the_same_index(tmp_path: Path) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(3000))
    for name in ("one", "two"):
        build_neighbor_index(table, tmp_path / name, exact_below=0, seed=5)
    one, two = ((tmp_path / name / "index.faiss").read_bytes() for name in ("one", "two"))
    assert one == two


def test_recall_is_measured_on_the_queries_given_and_gated(tmp_path: Path) -> None:
    table = ItemTable.write(
        tmp_path / "table", np.random.default_rng(0).normal(size=(4000, 24)).astype(np.float32)
    )
    queries = user_vectors(100)
    with pytest.raises(InputError, match=r"expected min_recall 1\.0; raise exact_below above 4000"):
        build_neighbor_index(
            table, tmp_path / "index", exact_below=0, min_recall=1.0, queries=queries, seed=0
        )
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("items", [1, 2, 50])
@pytest.mark.parametrize("exact_below", [0, 1000])
def test_fewer_items_than_asked_for_are_padded(
    tmp_path: Path, items: int, exact_below: int
) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(items))
    build_neighbor_index(table, tmp_path / "index", exact_below=exact_below, seed=0)
    rows, scores = NeighborIndex.open(tmp_path / "index", table).search(user_vectors(2), 60)
    assert [sorted(r) for r in rows[:, :items].tolist()] == [list(range(items))] * 2
    assert (rows[:, items:] == -1).all()
    assert (scores[:, items:] == -np.inf).all()
    assert np.isfinite(scores[:, :items]).all()


def test_bad_queries_are_refused(tmp_path: Path) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(10))
    build_neighbor_index(table, tmp_path / "index", seed=0)
    index = NeighborIndex.open(tmp_path / "index", table)
    bad = user_vectors(3)
    bad[1, 2] = np.nan
    for queries, k, message in [
        (bad, 1, "query 1 has NaN"),
        (user_vectors(1, dim=5), 1, r"expected \[batch, 24\]"),
        (user_vectors(1)[0], 1, r"expected \[batch, 24\]"),
        (user_vectors(1), 0, "k is 0"),
    ]:
        with pytest.raises(InputError, match=message):
            index.search(queries, k)
    assert index.search(np.empty((0, 24), np.float32), 3)[0].shape == (0, 3)


@pytest.mark.parametrize(
    "option", [{"exact_below": -1}, {"min_recall": 0.0}, {"min_recall": 1.5}, {"threads": 0}]
)
def test_options_out_of_range_are_refused(tmp_path: Path, option: dict[str, int]) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(10))
    with pytest.raises(InputError, match=f"{next(iter(option))} is"):
        build_neighbor_index(table, tmp_path / "index", **option)  # type: ignore[arg-type]


def test_an_index_of_another_table_is_refused(tmp_path: Path) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(10))
    other = ItemTable.write(tmp_path / "other", -clustered(10))
    build_neighbor_index(table, tmp_path / "index", seed=0)
    with pytest.raises(InputError, match="built on another item table"):
        NeighborIndex.open(tmp_path / "index", other)


def test_damage_is_found(tmp_path: Path) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(3000))
    build_neighbor_index(table, tmp_path / "index", exact_below=0, seed=0)
    file = tmp_path / "index" / "index.faiss"
    contents = bytearray(file.read_bytes())
    contents[-100] ^= 1
    file.write_bytes(contents)
    with pytest.raises(InputError, match=r"index\.faiss is corrupt"):
        NeighborIndex.open(tmp_path / "index", table).verify()
    file.write_bytes(b"x" * len(contents))
    with pytest.raises(InputError, match="cannot be read as a faiss index"):
        NeighborIndex.open(tmp_path / "index", table)
    os.truncate(file, 10)
    with pytest.raises(InputError, match="has 10 bytes"):
        NeighborIndex.open(tmp_path / "index", table)
    (tmp_path / "index" / "header.json").write_text("{}")
    with pytest.raises(InputError, match="does not describe a neighbour index"):
        NeighborIndex.open(tmp_path / "index", table)


def test_worker_threads_search_alike_and_keep_their_own_thread_count(tmp_path: Path) -> None:
    table = ItemTable.write(tmp_path / "table", clustered(3000))
    build_neighbor_index(table, tmp_path / "index", exact_below=0, seed=0)
    index = NeighborIndex.open(tmp_path / "index", table)
    expected = index.search(user_vectors(20), 10)[0]
    seen: list[tuple[bool, int]] = []

    def search() -> None:
        faiss.omp_set_num_threads(2)
        same = np.array_equal(index.search(user_vectors(20), 10)[0], expected)
        seen.append((same, faiss.omp_get_max_threads()))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(True, 2)] * 3
