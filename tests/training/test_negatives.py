import numpy as np
import pytest

from hiertcn.errors import InputError
from hiertcn.items.index import IdIndex
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.store import SessionStore
from hiertcn.training.negatives import PoolSampler, shown_negatives
from tests.session_logs import START_US, write_events

COUNTS = np.array([0, 1, 3, 16])


def test_expected_counts_are_what_is_drawn():
    sampler = PoolSampler(COUNTS, random=2, in_batch=1)
    rng = np.random.default_rng(0)
    share = COUNTS / COUNTS.sum()
    seen, expected = np.zeros(4), np.zeros(4)
    rounds = 20_000
    for _ in range(rounds):
        pool = sampler.draw(rng.choice(4, size=3, p=share), rng)
        assert len(pool.rows) == 3
        np.add.at(seen, pool.rows, 1)
        expected[pool.rows] = np.exp(pool.log_expected)
    # Item 0 was never a target, and is still drawn.
    assert expected[0] == pytest.approx(2 * 0.5 / 4)
    np.testing.assert_allclose(seen / rounds, expected, rtol=0.05)


def test_a_small_catalogue_is_used_whole():
    pool = PoolSampler(COUNTS, random=3, in_batch=1).draw(np.array([3]), np.random.default_rng(0))
    assert pool.rows.tolist() == [0, 1, 2, 3] and pool.log_expected.tolist() == [0.0] * 4


def test_draws_are_fixed_by_the_generator():
    sampler = PoolSampler(np.arange(1, 500), random=50, in_batch=10)
    targets = np.arange(100)
    pools = [sampler.draw(targets, np.random.default_rng(7)) for _ in range(2)]
    assert np.array_equal(pools[0].rows, pools[1].rows)
    assert set(pools[0].rows[:10]) <= set(targets)


def test_bad_input():
    with pytest.raises(InputError, match="no item has an interaction"):
        PoolSampler(np.zeros(4, np.int64), random=1, in_batch=1)
    with pytest.raises(InputError, match="-1"):
        PoolSampler(COUNTS, random=-1, in_batch=1)


def test_shown_items_are_negatives_but_for_the_target(tmp_path):
    shown = [["b", "c", "a"], [], ["a"], ["c", "c", "b", "d"]]
    rows = [
        {"user_id": "u", "item_id": "a", "timestamp": START_US + i, "impressions": items}
        for i, items in enumerate(shown)
    ]
    items = IdIndex.build(["a", "b", "c", "d"], tmp_path / "index")
    build_sessions(write_events(tmp_path / "events", rows), items, tmp_path / "store")
    store = SessionStore.open(tmp_path / "store")
    found = shown_negatives(store, np.array([3, 0, 1, 2]))
    assert found.rows.tolist() == [2, 2, 1, 3, 1, 2]
    assert found.owner.tolist() == [0, 0, 0, 0, 1, 1]
    assert found.place.tolist() == [0, 1, 2, 3, 0, 1]
    assert (found.interactions, found.width) == (4, 4)
    fewer = shown_negatives(store, np.array([3, 0]), most=1)
    assert fewer.rows.tolist() == [2, 1] and fewer.width == 1
