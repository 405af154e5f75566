"""Two days' releases under one running sidecar: publish, refuse, publish again, roll back."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest

from hiertcn.evaluation.protocol import Requests, build_requests
from hiertcn.events.simulate import SimulationOptions, simulate
from hiertcn.items.index import IdIndex
from hiertcn.items.table import ItemTable
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.client import Filter, Interaction, RecommenderClient
from hiertcn.serving.records.snapshot import StateSnapshot
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.request_features import FEATURES
from hiertcn.sessions.store import SessionStore
from hiertcn.sessions.transitions import TransitionTable
from models.hiertcn import load_hiertcn
from models.network_ranker import NetworkRanker
from tests.session_logs import write_events

REPLAYED = 60
ROOT = Path(__file__).parents[2]
READY_TIMEOUT_S = 120.0


class Deployment:
    """A log, a repository and the commands that work on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.repository = ReleaseRepository(folder / "repository")
        simulate(self.log, SimulationOptions(users=1000, items=100, days=10, seed=1))

    def run(self, data_date: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self._command(
            *("pipelines", "run", f"--events={self.log / 'events'}"),
            f"--items={self.log / 'items.parquet'}",
            *(f"--repository={self.repository.root}", f"--work-dir={self.folder / 'work'}"),
            *(f"--data-date={data_date}", "--min-user-interactions=4"),
            *("--min-item-interactions=10", "--max-epochs=2", "--encoder-epochs=2"),
            *("--hidden=32", "--item-dim=16", *options),
        )

    def releases(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        root = f"--repository={self.repository.root}"
        return self._command("hiertcn.cli", "releases", *arguments, root)

    def last_run(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "work" / "run.json").read_text())
        return found

    def _command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """A repository in which the release of the eighth day is current."""
    made = Deployment(tmp_path_factory.mktemp("daily"))
    ended = made.run("2026-01-08")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert made.repository.current() == 2026010801
    return made


@pytest.fixture(scope="module")
def address(deployment: Deployment) -> Iterator[str]:
    """A running `hiertcn serve` on the repository."""
    state = deployment.folder / "state"
    command = [
        *(sys.executable, "-m", "hiertcn.cli", "serve", "--port=0", "--metrics-port=0"),
        *("--triton-grpc-port=0", "--triton-http-port=0", f"--state-dir={state}"),
        f"--repository={deployment.repository.root}",
    ]
    with (deployment.folder / "serve.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        _until(lambda: (state / "serving.json").exists() or process.poll() is not None)
        assert process.poll() is None, (deployment.folder / "serve.log").read_text()
        yield json.loads((state / "serving.json").read_text())["address"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert not (state / "serving.json").exists()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


class Offline:
    """The offline ranker of a release, on the log that its sidecar will have seen by some day."""

    def __init__(self, deployment: Deployment, number: int, until: str, scratch: Path) -> None:
        release = deployment.repository.path(number)
        self.model = load_hiertcn(release / "model")
        index = IdIndex.open(release / "item_index")
        self.items: list[str] = index.id_array.to_pylist()
        snapshot = StateSnapshot.open(release / "user_states")
        columns = ["user_id", "item_id", "timestamp"]
        log = ds.dataset(deployment.log / "events", partitioning="hive").to_table(
            columns=columns, filter=ds.field("date") <= until
        )
        log = log.set_column(2, "timestamp", log["timestamp"].cast("int64"))
        kept = (snapshot.rows(log["user_id"].to_pylist()) >= 0) & (index.rows(log["item_id"]) >= 0)
        self.log = log.filter(kept).to_pylist()
        write_events(scratch / "events", self.log)
        build_sessions(scratch / "events", index, scratch / "store")
        self.store = SessionStore.open(scratch / "store")
        self._requests = build_requests(self.store, 0)
        self._ranker = NetworkRanker(
            self.model,
            self.store,
            ItemTable.open(release / "item_table"),
            transitions=TransitionTable.open(release / "user_states" / "transitions"),
        )
        self.newer = sorted(
            (one for one in self.log if one["timestamp"] > snapshot.watermark_us),
            key=lambda one: one["timestamp"],
        )

    def scores(self, user_id: str, timestamp_us: int) -> dict[str, float]:
        """Return every item's score just before the user's first interaction at that time."""
        requests: Requests = self._requests
        user = self.store.users.rows([user_id])[0]
        times = self.store.timestamps_us[requests.interaction]
        asked = np.flatnonzero((requests.user == user) & (times == timestamp_us))[:1]
        found = self._ranker.score(requests.take(asked), None)[0]
        return dict(zip(self.items, found.tolist(), strict=True))


def test_replayed_ranks_are_the_offline_ranks_of_the_default_model(
    deployment: Deployment, address: str, tmp_path: Path
) -> None:
    offline = Offline(deployment, 2026010801, "2026-01-09", tmp_path)
    assert offline.model.config.terms == FEATURES
    with RecommenderClient(address) as client:
        for one in offline.newer[:REPLAYED]:
            user, item, at_us = one["user_id"], one["item_id"], one["timestamp"]
            scores = offline.scores(user, at_us)
            served = client.recommend(user, k=len(scores), timestamp_us=at_us)
            assert (served.release, served.fallback) == (2026010801, False)
            for found in served.items:
                assert found.score == pytest.approx(scores[found.item_id], abs=1e-3)
            ranks = [scores[found.item_id] for found in served.items]
            assert len(ranks) == len(offline.items)
            assert (np.diff(ranks) < 2e-3).all()
            assert client.record([Interaction(user, item, timestamp_us=at_us)]).accepted == 1


def test_refused_release_changes_nothing(deployment: Deployment) -> None:
    # An untrained network of another shape, so that no weights are taken over, and without the
    # terms, which rank well by themselves.
    untrained = ("--hidden=16", "--max-steps=1", "--learning-rate=1e-9")
    ended = deployment.run("2026-01-09", "--configuration=paper", *untrained)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "nothing was published" in ended.stdout
    assert deployment.last_run()["release"] is None
    assert deployment.repository.numbers() == [2026010801]
    assert deployment.repository.current() == 2026010801


def test_next_day_is_served_and_rolled_back_without_losing_a_user(
    deployment: Deployment, address: str
) -> None:
    with RecommenderClient(address) as client:
        shown = client.recommend("visitor", k=3)
        assert shown.release == 2026010801
        clicked = shown.items[0].item_id
        assert client.record([Interaction("visitor", clicked)]).accepted == 1
        # What was clicked is live from the next minute on; the others do not depend on the time.
        before = client.recommend("visitor", k=5, exclude=[clicked])
        costly = Filter(column="price", min=0.01)
        fresh = client.recommend("visitor", k=5, exclude_seen=True, filters=[costly])
        assert len(fresh.items) == 5 and clicked not in {item.item_id for item in fresh.items}

        ended = deployment.run("2026-01-09", "--tolerance=0.9")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert deployment.repository.numbers() == [2026010801, 2026010901]
        _until(lambda: client.releases().serving == 2026010901)
        flipped = client.recommend("visitor", k=5)
        assert (flipped.release, flipped.fallback) == (2026010901, False)
        assert [entry.item_id for entry in client.get_user("visitor").journal] == [clicked]

        assert deployment.releases("rollback").returncode == 0
        _until(lambda: client.releases().serving == 2026010801)
        back = client.recommend("visitor", k=5, exclude=[clicked])
    assert back.release == 2026010801
    assert [item.item_id for item in back.items] == [item.item_id for item in before.items]


def test_damaged_release_is_refused_by_name(deployment: Deployment) -> None:
    current = deployment.repository.current()
    other = next(n for n in deployment.repository.numbers() if n != current)
    model = deployment.repository.model_path("tcn", other)
    healthy = model.read_bytes()
    model.write_bytes(healthy[:-1] + bytes([healthy[-1] ^ 1]))
    try:
        ended = deployment.releases("activate", str(other))
        assert ended.returncode == 2
        assert str(model) in ended.stderr or "tcn" in ended.stderr
        assert deployment.repository.current() == current
    finally:
        model.write_bytes(healthy)
