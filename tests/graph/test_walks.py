import numpy as np
import pytest

from hiertcn.errors import InputError
from hiertcn.graph.csr import CSR
from hiertcn.graph.walks import (
    Neighborhoods,
    WalkOptions,
    importance_neighborhoods,
    walk_neighborhoods,
    write_neighborhoods,
)


def graph(items, edges):
    """Build the CSR of undirected (one, other, weight)."""
    both = sorted([(a, b, w) for a, b, w in edges] + [(b, a, w) for a, b, w in edges])
    counts = np.bincount([a for a, _, _ in both] or [0], minlength=items)
    if not both:
        counts[:] = 0
    return CSR(
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        indices=np.array([b for _, b, _ in both], np.int32),
        weights=np.array([w for _, _, w in both], np.float32),
    )


def random_graph(items, pairs, seed=0):
    rng = np.random.default_rng(seed)
    ends = {tuple(sorted(rng.choice(items, 2, replace=False).tolist())) for _ in range(pairs)}
    return graph(items, [(a, b, float(rng.integers(1, 9))) for a, b in sorted(ends)])


def exact_visits(csr, home, length, restart):
    transition = np.zeros((csr.items, csr.items))
    for row in range(csr.items):
        part = slice(csr.indptr[row], csr.indptr[row + 1])
        transition[row, csr.indices[part]] = csr.weights[part] / csr.weights[part].sum()
    start = np.eye(csr.items)[home]
    here, visits = start, np.zeros(csr.items)
    for _ in range(length):
        here = (restart * start + (1 - restart) * here) @ transition
        visits += here
    visits[home] = 0
    return visits / visits.sum()


def test_visit_shares_agree_with_exact_probabilities_within_sampling_error():
    csr = random_graph(12, 30)
    walks, length = 20_000, 4
    found = importance_neighborhoods(csr, walks=walks, length=length, restart=0.3, top=11)
    for home in range(csr.items):
        shares = np.zeros(csr.items)
        kept = found.rows[home] >= 0
        shares[found.rows[home][kept]] = found.weights[home][kept]
        expected = exact_visits(csr, home, length, 0.3)
        # Steps of one walk are not independent: at worst they move together.
        error = 5 * np.sqrt(length * expected * (1 - expected) / (walks * length)) + 1e-4
        assert (np.abs(shares - expected) < error).all()


def test_the_seed_alone_decides():
    csr = random_graph(9_000, 20_000)
    one = importance_neighborhoods(csr, seed=3, threads=1)
    many = importance_neighborhoods(csr, seed=3, threads=4)
    other = importance_neighborhoods(csr, seed=4, threads=1)
    assert np.array_equal(one.rows, many.rows) and np.array_equal(one.weights, many.weights)
    assert not np.array_equal(one.rows, other.rows)


def test_walks_never_leave_a_component_and_are_normalized():
    csr = random_graph(20, 60)
    two = CSR(
        indptr=np.concatenate([csr.indptr, csr.indptr[1:] + csr.indptr[-1]]),
        indices=np.concatenate([csr.indices, csr.indices + 20]),
        weights=np.concatenate([csr.weights, csr.weights]),
    )
    found = importance_neighborhoods(two, top=10)
    valid = found.rows >= 0
    assert ((found.rows // 20 == np.arange(40)[:, None] // 20) | ~valid).all()
    assert (found.rows != np.arange(40)[:, None]).all()
    assert (found.weights[~valid] == 0).all()
    assert np.allclose(found.weights.sum(1), 1)
    assert (np.diff(found.weights, axis=1) <= 0).all()


def test_one_item_isolated_items_and_no_edges():
    for csr in (graph(1, []), graph(4, [])):
        found = importance_neighborhoods(csr, top=3)
        assert (found.rows == -1).all() and (found.weights == 0).all()
    found = importance_neighborhoods(graph(3, [(0, 2, 1.0)]), top=3)
    assert found.rows.tolist() == [[2, -1, -1], [-1, -1, -1], [0, -1, -1]]


def test_neighborhoods_round_trip_and_options_are_checked(tmp_path):
    found = importance_neighborhoods(random_graph(10, 20), top=4, seed=7)
    found.write(tmp_path / "n")
    opened = Neighborhoods.open(tmp_path / "n")
    assert np.array_equal(opened.rows, found.rows)
    assert np.array_equal(opened.weights, found.weights)
    assert opened.options == found.options
    (tmp_path / "n" / "rows.npy").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be mapped"):
        Neighborhoods.open(tmp_path / "n")
    with pytest.raises(InputError, match="restart is 1"):
        importance_neighborhoods(random_graph(3, 3), restart=1.0)


def test_written_in_chunks_they_are_the_same(tmp_path):
    csr = random_graph(9_000, 20_000)
    options = WalkOptions(top=6, seed=3)
    kept = walk_neighborhoods(csr, options, threads=1)
    written = write_neighborhoods(csr, options, tmp_path / "n", threads=2)
    assert np.array_equal(kept.rows, written.rows)
    assert np.array_equal(kept.weights, written.weights)
    assert written.options == options


def test_an_edge_is_chosen_by_its_weight_however_uneven():
    weights = np.array([1e-3, 1.0, 30.0, 7.0, 400.0], np.float32)
    csr = CSR(
        indptr=np.array([0, 5, 5, 5, 5, 5, 5], np.int64),
        indices=np.arange(1, 6, dtype=np.int32),
        weights=weights,
    )
    walks = 1 << 20
    found = importance_neighborhoods(csr, walks=walks, length=1, restart=0.0, top=5)
    shares = np.zeros(5)
    kept = found.rows[0] >= 0
    shares[found.rows[0][kept] - 1] = found.weights[0][kept]
    expected = weights / weights.sum()
    error = 5 * np.sqrt(expected * (1 - expected) / walks) + 2**-16
    assert (np.abs(shares - expected) < error).all()


def test_more_neighbors_than_an_entry_can_name_are_refused():
    many = (1 << 16) + 1
    csr = CSR(
        indptr=np.array([0, many], np.int64),
        indices=np.zeros(many, np.int32),
        weights=np.ones(many, np.float32),
    )
    with pytest.raises(InputError, match="row 0 has 65537 neighbors"):
        importance_neighborhoods(csr)
