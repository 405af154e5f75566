"""Two days' releases under one running sidecar: publish, refuse, publish again, roll back.

Each step of the pipeline is a process of its own and imports what it needs, so all tests here share
the runs: the first day's fails at its seventh step and is resumed.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest

from hiertcn.evaluation.protocol import Requests, build_requests
from hiertcn.events.simulate import SimulationOptions, simulate
from hiertcn.files import read_json
from hiertcn.items.index import IdIndex
from hiertcn.items.table import ItemTable
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.client import Filter, Interaction
from hiertcn.serving.records.snapshot import StateSnapshot
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.request_features import FEATURES
from hiertcn.sessions.store import SessionStore
from hiertcn.sessions.transitions import TransitionTable
from models.hiertcn import load_hiertcn
from models.network_ranker import NetworkRanker
from pipelines.daily import NAME, STEPS
from tests.session_logs import write_events
from tests.waiting import PATIENT_SERVE, WAIT_S, patient_client, until

REPLAYED = 60
ROOT = Path(__file__).parents[2]


class Deployment:
    """A log, a repository and the commands that work on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.oracle = folder / "oracle"
        self.repository = ReleaseRepository(folder / "repository")
        simulate(self.log, SimulationOptions(users=1000, items=100, days=10, seed=1))

    def run(self, data_date: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self._command(
            *("pipelines", "run", f"--events={self.log / 'events'}"),
            *(f"--items={self.log / 'items.parquet'}", f"--oracle={self.oracle}"),
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
            timeout=2 * WAIT_S,
            check=False,
        )


@dataclass(frozen=True)
class FirstDay:
    """The eighth day's run, which failed for want of the oracle, and the same command after it.

    Attributes:
        failed, resumed: how they ended; ``said`` holds what was on disk in between.
        summary: the resumed run's.
    """

    failed: subprocess.CompletedProcess[str]
    resumed: subprocess.CompletedProcess[str]
    said: dict[str, Any]
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return Deployment(tmp_path_factory.mktemp("daily"))


@pytest.fixture(scope="module")
def first_day(made: Deployment) -> FirstDay:
    failed = made.run("2026-01-08")
    said = {
        "finished": (made.folder / "work" / "run.json").exists(),
        "releases": made.repository.numbers(),
    }
    (made.log / "oracle").rename(made.oracle)
    resumed = made.run("2026-01-08")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    return FirstDay(failed, resumed, said, made.last_run())


@pytest.fixture(scope="module")
def deployment(made: Deployment, first_day: FirstDay) -> Deployment:
    """A repository in which the release of the eighth day is current."""
    assert made.repository.current() == 2026010801
    return made


@pytest.fixture(scope="module")
def address(deployment: Deployment) -> Iterator[str]:
    """A running `hiertcn serve` on the repository."""
    state = deployment.folder / "state"
    command = [
        *(sys.executable, "-m", "hiertcn.cli", "serve", "--port=0", "--metrics-port=0"),
        *("--triton-grpc-port=0", "--triton-http-port=0", f"--state-dir={state}"),
        PATIENT_SERVE,
        f"--repository={deployment.repository.root}",
    ]
    with (deployment.folder / "serve.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        until(lambda: (state / "serving.json").exists() or process.poll() is not None)
        assert process.poll() is None, (deployment.folder / "serve.log").read_text()
        yield json.loads((state / "serving.json").read_text())["address"]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WAIT_S) == 0
        assert not (state / "serving.json").exists()


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


def test_a_failed_run_says_why_and_publishes_nothing(made: Deployment, first_day: FirstDay) -> None:
    failed = first_day.failed
    assert failed.returncode == 2, failed.stdout + failed.stderr
    said = failed.stderr.strip().splitlines()
    assert len(said) == 1, failed.stderr
    assert str(made.oracle) in said[0]
    assert "Traceback" not in failed.stdout
    assert "[KFP Executor" not in failed.stdout
    assert first_day.said == {"finished": False, "releases": []}


def test_it_resumes_at_the_failed_step_and_publishes(
    deployment: Deployment, first_day: FirstDay
) -> None:
    resumed, summary = first_day.resumed, first_day.summary
    assert "train_hiertcn: unchanged, using the earlier result" in resumed.stdout
    assert summary["cached"] == [
        "build_sessions",
        "build_item_graph",
        "train_item_encoder",
        "embed_items",
        "train_hiertcn",
    ]
    assert list(summary["step_seconds"]) == list(STEPS)
    for name, seconds in summary["step_seconds"].items():
        assert (seconds == 0) == (name in summary["cached"]), name
    assert summary["gate"]["passed"], summary["gate"]
    assert summary["release"] == 2026010801
    assert summary["repository"] == str(deployment.repository.root)
    deployment.repository.verify(2026010801)
    assert "release 2026010801 is published and active" in resumed.stdout
    release = deployment.repository.path(2026010801)
    assert (release / "scoring_terms.safetensors").is_file()
    assert (release / "user_states" / "transitions").is_dir()


def test_a_run_reports_what_it_measured(deployment: Deployment, first_day: FirstDay) -> None:
    summary = first_day.summary
    assert {"items", "edges", "isolated_items"} <= set(summary["graph"])
    assert all("train_loss" in curves for curves in summary["training"].values())
    models = summary["offline"]["models"]
    alone = "HierTCN without terms"
    assert {"HierTCN", alone, "popularity", "MV", "MaxItem", "oracle"} <= set(models)
    assert models["HierTCN"]["mrr"] > models["popularity"]["mrr"]
    assert models["HierTCN"]["mrr"] != models[alone]["mrr"]
    assert models["oracle"]["mrr"] > models["HierTCN"]["mrr"]
    assert summary["data"]["users"] > 100
    report = Path(summary["report"]).read_text()
    assert report.lstrip().lower().startswith("<!doctype html")
    assert "Scoring terms" in report

    # Metrics that Kubeflow shows, on the step's own artifact.
    work = deployment.folder / "work" / "pipeline"
    output = max(
        work.glob(f"{NAME}-*/evaluate/executor_output.json"), key=lambda one: one.stat().st_mtime
    )
    artifacts = json.loads(output.read_text())["artifacts"]
    shown = artifacts["metrics"]["artifacts"][0]["metadata"]
    assert shown["HierTCN mrr"] == pytest.approx(models["HierTCN"]["mrr"])


def test_replayed_ranks_are_the_offline_ranks_of_the_default_model(
    deployment: Deployment, address: str, tmp_path: Path
) -> None:
    offline = Offline(deployment, 2026010801, "2026-01-09", tmp_path)
    assert offline.model.config.terms == FEATURES
    with patient_client(address) as client:
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
    with patient_client(address) as client:
        shown = client.recommend("visitor", k=3)
        assert shown.release == 2026010801
        clicked = shown.items[0].item_id
        assert client.record([Interaction("visitor", clicked)]).accepted == 1
        # What was clicked is live from the next minute on; the others do not depend on the time.
        before = client.recommend("visitor", k=5, exclude=[clicked])
        costly = Filter(column="price", min=0.01)
        fresh = client.recommend("visitor", k=5, exclude_seen=True, filters=[costly])
        assert len(fresh.items) == 5 and clicked not in {item.item_id for item in fresh.items}

        ended = deployment.run("2026-01-09", "--tolerance=0.9", "--serving-precision=int8")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert deployment.repository.numbers() == [2026010801, 2026010901]
        parity = read_json(deployment.repository.path(2026010901) / "parity.json")
        assert parity["int8"]["is_served"] == (parity["int8"]["agreement"] >= 0.99)
        until(lambda: client.releases().serving == 2026010901)
        flipped = client.recommend("visitor", k=5)
        assert (flipped.release, flipped.fallback) == (2026010901, False)
        assert [entry.item_id for entry in client.get_user("visitor").journal] == [clicked]

        assert deployment.releases("rollback").returncode == 0
        until(lambda: client.releases().serving == 2026010801)
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
