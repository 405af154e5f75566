import numpy as np
import pytest
import torch

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import build_requests
from hiertcn.items.table import ItemTable
from models.baselines import MV, MaxItem
from models.counting import Popularity
from models.hiertcn import HierTCN, HierTCNConfig
from models.network_ranker import NetworkRanker
from tests.session_logs import DAY_US, START_US, random_users, write_store, write_table

ITEMS, DIM = 15, 5


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    users = random_users(np.random.default_rng(5), users=9, items=ITEMS)
    return write_store(directory, users, ITEMS), write_table(directory / "table", ITEMS, DIM)


@pytest.fixture(scope="module")
def rankers(log):
    store, table = log
    torch.manual_seed(0)
    config = HierTCNConfig(item_dim=DIM, hidden=4, gru_layers=1, tcn_blocks=2, filters=6)
    model = HierTCN(config)
    return [
        Popularity(store, ITEMS).fit(store),
        MV(store, table, window=3),
        MaxItem(store, table, window=3),
        NetworkRanker(model, store, table),
    ]


def history(store, requests, i):
    first = store.session_offsets[store.user_offsets[requests.user[i]]]
    return store.item_rows[first : requests.interaction[i]]


def test_candidates_are_columns_of_the_catalogue(log, rankers):
    store, _ = log
    requests = build_requests(store, START_US).take(slice(0, 100))
    rng = np.random.default_rng(0)
    candidates = rng.integers(-1, ITEMS, size=(len(requests), 6)).astype(np.int32)
    for ranker in rankers:
        assert ranker.items == ITEMS
        everything = ranker.score(requests, None)
        some = ranker.score(requests, candidates)
        assert everything.shape == (len(requests), ITEMS) and everything.dtype == np.float32
        assert some.shape == candidates.shape and some.dtype == np.float32
        expected = np.take_along_axis(everything, np.maximum(candidates, 0), 1)
        asked = candidates >= 0
        np.testing.assert_allclose(some[asked], expected[asked], atol=1e-5)
        assert np.isneginf(some[~asked]).all()


def test_scores_do_not_depend_on_the_other_requests(log, rankers):
    store, _ = log
    requests = build_requests(store, START_US)
    shuffled = requests.take(np.random.default_rng(1).permutation(len(requests))[:40])
    for ranker in rankers:
        together = ranker.score(shuffled, None)
        for i in (0, 17, 39):
            alone = ranker.score(shuffled.take(slice(i, i + 1)), None)
            np.testing.assert_allclose(alone[0], together[i], atol=1e-5)


def test_popularity_counts_the_past(log):
    store, _ = log
    limit = START_US + DAY_US
    counts = Popularity(store, ITEMS, before_us=limit).fit(store).counts
    expected = np.zeros(ITEMS)
    for row, time in zip(store.item_rows, store.timestamps_us, strict=True):
        expected[row] += time < limit
    assert counts.tolist() == expected.tolist() and 0 < counts.sum() < len(store.item_rows)


def test_moving_average_and_max_item_by_hand(log, rankers):
    store, table = log
    vectors = np.asarray(table.vectors)[:, :-1]
    requests = build_requests(store, START_US)
    mv, max_item = (ranker.score(requests.take(slice(0, 80)), None) for ranker in rankers[1:3])
    for i in range(80):
        pool = history(store, requests, i)[-3:]
        if len(pool) == 0:
            np.testing.assert_allclose(mv[i], np.asarray(table.vectors)[:, -1])
            np.testing.assert_allclose(max_item[i], np.asarray(table.vectors)[:, -1])
            continue
        np.testing.assert_allclose(mv[i], vectors @ vectors[pool].mean(0), atol=1e-5)
        np.testing.assert_allclose(max_item[i], (vectors @ vectors[pool].T).max(1), atol=1e-5)


def test_bad_windows_and_tables_are_refused(log, tmp_path):
    store, table = log
    with pytest.raises(InputError, match="window"):
        MV(store, table, window=0)
    narrow = ItemTable.write(tmp_path / "narrow", np.ones((ITEMS, 1), np.float32))
    with pytest.raises(InputError, match="popularity prior"):
        MaxItem(store, narrow)
