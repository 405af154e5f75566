import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiertcn.errors import InputError
from hiertcn.evaluation.evaluate import evaluate
from hiertcn.evaluation.oracle import join_oracle
from hiertcn.evaluation.protocol import build_requests
from hiertcn.evaluation.results import EvaluationResult
from hiertcn.events.simulate import SimulationOptions, simulate
from hiertcn.items.index import IdIndex
from tests.evaluation.stores import ArrayRanker, store_of


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """A simulated log as a session store with one session per user, its index, and its oracle."""
    folder = tmp_path_factory.mktemp("simulated")
    simulate(folder, SimulationOptions(users=60, items=50, days=3, seed=5))
    events = pq.read_table(folder / "events").to_pylist()
    events.sort(key=lambda event: (str(event["user_id"]), event["timestamp"]))
    items = IdIndex.build(sorted({str(event["item_id"]) for event in events}), folder / "index")
    sessions = {}
    for event in events:
        shown = items.rows([str(item) for item in event["impressions"]])
        target = int(items.rows([str(event["item_id"])])[0])
        sessions.setdefault(str(event["user_id"]), []).append(
            (target, microseconds(event["timestamp"]), shown[shown >= 0].tolist())
        )
    IdIndex.build(list(sessions), folder / "store" / "users")
    users = [[session] for session in sessions.values()]
    store = store_of(users, items=len(items), directory=folder / "store")
    return store, items, folder / "oracle"


def microseconds(time):
    return (time - EPOCH) // datetime.timedelta(microseconds=1)


EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


def test_every_simulated_interaction_finds_its_rank(simulated):
    store, items, folder = simulated
    requests = build_requests(store, 0)
    ranks = join_oracle(folder, store, requests, items)
    written = pq.read_table(folder).to_pylist()
    expected = {
        (str(row["user_id"]), str(row["item_id"]), microseconds(row["timestamp"])): row["rank"]
        for row in written
    }
    users, targets = store.users.ids(requests.user), items.ids(requests.target_row)
    times = store.timestamps_us[requests.interaction]
    found = [expected[key] for key in zip(users, targets, times.tolist(), strict=True)]
    assert len(found) == len(written)
    assert ranks.rank.tolist() == found
    assert (ranks.rank <= ranks.candidates).all()


def test_oracle_row_and_share_compare_equal_pools(simulated):
    store, items, folder = simulated
    requests = build_requests(store, 0)
    ranks = join_oracle(folder, store, requests, items)
    rng = np.random.default_rng(0)
    ranker = ArrayRanker("random", rng.random((len(store.item_rows), len(items))))
    result = evaluate([ranker], store, requests, items=len(items), oracle=ranks, resamples=50)
    assert result.oracle is not None
    assert result.oracle.metrics["ALL"].mrr == pytest.approx(np.mean(1 / ranks.rank))
    assert result.oracle.compared_requests > 0
    assert result.oracle.compared_mrr > result.oracle.ranker_mrr["random"]
    assert 0 < result.oracle.share("random") < 1
    assert np.isnan(result.oracle.share("someone else"))
    assert EvaluationResult.from_dict(result.to_dict()).to_dict() == result.to_dict()
    catalogue = evaluate(
        [ranker], store, requests, items=len(items), candidates="catalogue", oracle=ranks
    )
    assert catalogue.oracle is not None
    assert np.isnan(catalogue.oracle.share("random"))


def test_requests_it_does_not_know_are_left_out(simulated, tmp_path):
    store, items, folder = simulated
    requests = build_requests(store, 0)
    table = pq.read_table(folder)
    keep = np.zeros(len(table), dtype=bool)
    keep[:10] = True
    twice = pa.concat_tables([table.filter(pa.array(keep)), table.slice(0, 1)])
    worse = twice.set_column(
        twice.column_names.index("rank"), "rank", pa.array(np.arange(1, 12), pa.int32())
    )
    (tmp_path / "part").mkdir()
    pq.write_table(
        worse.drop_columns([c for c in ("date",) if c in worse.column_names]),
        tmp_path / "part" / "few.parquet",
    )
    ranks = join_oracle(tmp_path / "part", store, requests, items)
    assert np.count_nonzero(ranks.rank) == 10
    # The first row stands there twice, with the ranks 1 and 11: the worse one counts.
    assert sorted(ranks.rank[ranks.rank > 0].tolist()) == list(range(2, 12))

    ranker = ArrayRanker("any", np.zeros((len(store.item_rows), len(items))))
    result = evaluate([ranker], store, requests, items=len(items), oracle=ranks)
    assert result.oracle is not None
    assert result.oracle.metrics["ALL"].requests == 10
    unknown = requests.take(ranks.rank == 0)
    nothing = join_oracle(tmp_path / "part", store, unknown, items)
    assert evaluate([ranker], store, unknown, items=len(items), oracle=nothing).oracle is None


def test_bad_folders_are_named(simulated, tmp_path):
    store, items, _ = simulated
    requests = build_requests(store, 0)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="empty holds no parquet file"):
        join_oracle(empty, store, requests, items)
    pq.write_table(pa.table({"user_id": ["a"]}), empty / "part.parquet")
    with pytest.raises(InputError, match="has no column 'item_id'"):
        join_oracle(empty, store, requests, items)
    (empty / "part.parquet").write_bytes(b"PAR1 half a file")
    with pytest.raises(InputError, match="could not be read"):
        join_oracle(empty, store, requests, items)
