"""What the offline ranker scores, the sidecar serves: with every term, through restarts and flips.

A simulated log is replayed through the real sidecar on the real Triton: before each interaction the
catalogue and some candidates are ranked, and every score is held against ``NetworkRanker`` on the
session store of the whole log. Half-way the sidecar restarts and a second release takes over, which
numbers the items anew, has another model, and has seen more of the log.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hiertcn.evaluation.protocol import Requests, build_requests
from hiertcn.export.scoring_terms import export_terms
from hiertcn.items.index import IdIndex
from hiertcn.items.neighbor_building import build_neighbor_index
from hiertcn.items.table import ItemTable
from hiertcn.release.publish import ReleaseInput, publish
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.client import Interaction
from hiertcn.serving.ranking import answers
from hiertcn.serving.records.backfill import backfill_states
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.request_features import FEATURES
from hiertcn.sessions.store import SessionStore
from hiertcn.sessions.transitions import TransitionTable
from models.hiertcn import HierTCN
from models.network_ranker import NetworkRanker
from pipelines.serving_process import ServingProcess
from tests.session_logs import START_US, write_events
from tests.waiting import patient_client

MINUTE_US = 60_000_000
USERS, ITEMS, UNKNOWN, DIM = 12, 40, 3, 6
FIRST, SECOND = 2026010101, 2026010201


@dataclass(frozen=True)
class Served:
    """A published release beside the offline ranker on the whole log."""

    number: int
    item_ids: list[str]
    ranker: NetworkRanker
    store: SessionStore
    requests: Requests

    def scores(self, user_id: str, timestamp_us: int) -> dict[str, float]:
        """Every item's offline score just before the user's interaction at that time."""
        user = int(self.store.users.rows([user_id])[0])
        times = self.store.timestamps_us[self.requests.interaction]
        asked = np.flatnonzero((self.requests.user == user) & (times == timestamp_us))
        assert len(asked) == 1
        found = self.ranker.score(self.requests.take(asked), None)[0]
        return dict(zip(self.item_ids, found.tolist(), strict=True))


def _log(rng) -> list[tuple[str, str, int]]:
    """Users with sessions of different lengths over a day, at distinct times; in time order."""
    found = []
    for user in range(USERS):
        at, item = START_US + int(rng.integers(0, 60)) * MINUTE_US, int(rng.integers(ITEMS))
        for _ in range(int(rng.integers(3, 7))):
            for _ in range(int(rng.integers(1, 9))):
                item = (item + 1) % ITEMS if rng.random() < 0.6 else int(rng.integers(ITEMS))
                found.append((f"user-{user}", f"item-{item}", at))
                at += int(rng.integers(1, 8 * MINUTE_US))
            at += int(rng.integers(31, 180)) * MINUTE_US
    return sorted(found, key=lambda one: one[2])


def _store(folder: Path, log, index: IdIndex) -> SessionStore:
    rows = [{"user_id": user, "item_id": item, "timestamp": us} for user, item, us in log]
    build_sessions(write_events(folder / "events", rows), index, folder / "store")
    return SessionStore.open(folder / "store")


def _publish(root: Path, folder: Path, number: int, log, seen: int, exported, item_ids) -> Served:
    index = IdIndex.build(item_ids, folder / "item_index")
    before, whole = _store(folder / "seen", log[:seen], index), _store(folder / "all", log, index)
    rng = np.random.default_rng(number)
    vectors = rng.normal(size=(len(item_ids), DIM)).astype(np.float32)
    table = ItemTable.write(folder / "item_table", vectors, "float16")
    build_neighbor_index(table, folder / "neighbor_index")
    torch.manual_seed(number)
    model = HierTCN(replace(exported.model.config, terms=FEATURES))
    model.load_state_dict(exported.model.state_dict(), strict=False)
    torch.nn.init.normal_(model.terms.gate.weight, std=0.3)
    torch.nn.init.normal_(model.terms.gate.bias[:-2], mean=2.0)
    export_terms(model.terms, folder / "scoring_terms.safetensors")
    start_state = np.load(exported.directory / "start_state.npy", allow_pickle=False)
    backfill_states(
        before,
        table,
        exported.files["gru_step"],
        start_state,
        folder / "user_states",
        with_transitions=True,
    )
    np.save(folder / "popularity.npy", rng.random(len(item_ids), np.float32))
    names = ("item_index", "item_table", "neighbor_index", "user_states", "popularity.npy")
    day = str(number)
    published = publish(
        ReleaseRepository(root),
        {
            **{name: folder / name for name in (*names, "scoring_terms.safetensors")},
            "start_state.npy": exported.directory / "start_state.npy",
        },
        exported.files,
        ReleaseInput(data_date=f"{day[:4]}-{day[4:6]}-{day[6:8]}"),
    )
    assert published == number
    transitions = TransitionTable.open(folder / "user_states" / "transitions")
    ranker = NetworkRanker(model, whole, table, transitions=transitions)
    return Served(number, item_ids, ranker, whole, build_requests(whole, 0))


@pytest.fixture
def log():
    return _log(np.random.default_rng(7))


@pytest.fixture
def releases(toy_repository, exported_model, tmp_path, log) -> tuple[Served, Served]:
    known = [f"item-{item}" for item in range(ITEMS - UNKNOWN)]
    shuffled = [known[place] for place in np.random.default_rng(1).permutation(len(known))]
    return (
        _publish(
            toy_repository.root, tmp_path / "1", FIRST, log, len(log) // 3, exported_model(0), known
        ),
        _publish(
            toy_repository.root,
            tmp_path / "2",
            SECOND,
            log,
            len(log) // 2,
            exported_model(1),
            shuffled,
        ),
    )


def _assert_ranked_like(found, scores: dict[str, float], count: int) -> None:
    assert not found.fallback
    assert len(found.items) == count
    for item in found.items:
        assert item.score == pytest.approx(scores[item.item_id], abs=2e-4)
    offline = [scores[item.item_id] for item in found.items]
    assert (np.diff(offline) < 2e-4).all()


def _replay(client, served: Served, interactions, rng) -> int:
    compared = 0
    for user, item, us in interactions:
        if item in served.item_ids:
            scores = served.scores(user, us)
            everything = client.recommend(user, k=1000, timestamp_us=us)
            assert everything.release == served.number
            _assert_ranked_like(everything, scores, len(scores))
            excluded = [one.item_id for one in everything.items[:2]]
            best = client.recommend(user, k=5, exclude=excluded, timestamp_us=us)
            assert [one.item_id for one in best.items] == [
                one.item_id for one in everything.items[2:7]
            ]
            pool = rng.permutation(served.item_ids)[:12].tolist()
            chosen = client.recommend(user, k=100, candidates=pool, timestamp_us=us)
            _assert_ranked_like(chosen, scores, len(pool))
            compared += 1
        client.record([Interaction(user, item, us)])
    return compared


def test_ranks_equal_the_offline_rankers(toy_repository, releases, log, triton, start_sidecar):
    first, second = releases
    toy_repository.repository.activate(FIRST)
    rng = np.random.default_rng(0)
    start = len(log) // 3
    middle, later = len(log) // 2 + 10, len(log) // 2 + 60
    running = start_sidecar(toy_repository, triton.grpc_url)
    compared = _replay(running.client, first, log[start : middle - 20], rng)
    running.stop()
    running = start_sidecar(toy_repository, triton.grpc_url)
    compared += _replay(running.client, first, log[middle - 20 : middle], rng)
    # The second release has seen part of what was recorded here.
    assert running.client.activate(SECOND) == SECOND
    compared += _replay(running.client, second, log[middle:later], rng)
    assert running.client.roll_back() == FIRST
    compared += _replay(running.client, first, log[later : later + 10], rng)
    running.client.activate(SECOND)
    running.stop()
    running = start_sidecar(toy_repository, triton.grpc_url)
    compared += _replay(running.client, second, log[later + 10 :], rng)
    assert compared > 100
    assert running.value("hiertcn_live_interactions") > 0


def test_a_large_catalogue_is_searched_for_the_same_ranks(
    toy_repository, releases, log, triton, start_sidecar, monkeypatch
):
    monkeypatch.setattr(answers, "SMALL_CATALOGUE", 1)
    toy_repository.repository.activate(FIRST)
    running = start_sidecar(toy_repository, triton.grpc_url)
    start = len(log) // 3
    rng = np.random.default_rng(0)
    assert _replay(running.client, releases[0], log[start : start + 20], rng) > 10


def test_an_interaction_counts_as_live_from_the_next_minute_on(
    toy_repository, releases, log, triton, start_sidecar, tmp_path
):
    """Seen through the ranking without the model: Triton does not know the release's models."""
    toy_repository.repository.activate(FIRST)
    running = start_sidecar(toy_repository, triton.grpc_url)
    triton.stop()
    now_us = log[-1][2] // MINUTE_US * MINUTE_US + 400 * MINUTE_US
    popularity = np.load(tmp_path / "1" / "popularity.npy")
    popular = [releases[0].item_ids[row] for row in np.argsort(-popularity)]
    client = running.client

    def ranked(timestamp_us, **options):
        found = client.recommend("nobody", timestamp_us=timestamp_us, **options)
        assert found.fallback
        return [item.item_id for item in found.items]

    assert ranked(now_us, k=5) == popular[:5]
    client.record([Interaction("a", popular[9], now_us), Interaction("b", popular[20], now_us)])
    client.record([Interaction("c", popular[20], now_us - 30 * MINUTE_US)])
    assert ranked(now_us, k=3) == [popular[20], *popular[:2]]
    after_us = now_us + MINUTE_US
    assert ranked(after_us, k=4) == [popular[20], popular[9], *popular[:2]]
    assert ranked(after_us, k=3, exclude=[popular[20]]) == [popular[9], *popular[:2]]
    assert ranked(after_us, candidates=[popular[3], popular[9], popular[1]]) == [
        popular[9],
        popular[1],
        popular[3],
    ]
    assert ranked(now_us + 500 * MINUTE_US, k=2) == popular[:2]


def test_a_ready_sidecar_has_compiled_what_requests_need(
    toy_repository, releases, tmp_path, monkeypatch
):
    toy_repository.repository.activate(FIRST)
    cache = tmp_path / "compiled"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(cache))
    serving = ServingProcess(
        toy_repository.root, tmp_path / "state", tmp_path / "log", options=["--models=in-process"]
    )
    try:
        before = _compiled_in(cache)
        with patient_client(serving.address) as client:
            known = releases[0].item_ids
            assert client.recommend("user-1", k=5, candidates=known[:9]).items
            assert client.recommend("user-1", k=5, exclude=known[:3]).items
            now_us = releases[0].store.meta.watermark_us
            client.record([Interaction("user-1", item, now_us) for item in known[:3]])
            assert client.recommend("user-1", k=5, candidates=known[:9]).items
            assert client.recommend("user-1", k=5).items
        assert before
        assert _compiled_in(cache) == before
    finally:
        serving.stop()


def _compiled_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*.nbc"))
