"""`make demo` on a small simulated log: the real pipeline, the real Triton, real gRPC."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hiertcn.serving.client import Interaction
from tests.waiting import WAIT_S, patient_client

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--users=1200", "--catalogue=120", "--days=10", "--replay-interactions=60"),
    *("--run-option=--min-user-interactions=5", "--run-option=--min-item-interactions=10"),
    *("--run-option=--max-epochs=2", "--run-option=--encoder-epochs=2"),
    *("--run-option=--hidden=32", "--run-option=--item-dim=16"),
]


def _demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.demo", "--folder", str(folder), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * WAIT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a demo that was left serving (KEEP=1)."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    ended = _demo(folder, *SMALL, "--keep")
    serving = folder / "state" / "serving.json"
    try:
        assert ended.returncode == 0, ended.stdout + ended.stderr
        yield folder
    finally:
        if serving.exists():
            os.kill(json.loads(serving.read_text())["pid"], signal.SIGTERM)


@pytest.fixture(scope="module")
def summary(kept: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((kept / "summary.json").read_text())
    return found


def test_summary_holds_every_figure(summary: dict[str, Any], kept: Path) -> None:
    assert summary["graph"]["items"] > 50
    assert summary["graph"]["edges"] > 0
    for model in ("HierTCN", "popularity", "MV", "oracle"):
        assert 0 < summary["offline"]["models"][model]["mrr"] <= 1
    assert summary["online"]["requests"] == 60
    assert summary["online"]["fallbacks"] == 0
    assert 0 < summary["online"]["recall_at_10"] <= 1
    assert 0 < summary["latency_ms"]["recommend_p50"] <= summary["latency_ms"]["recommend_p99"]
    first, last = summary["training"]["HierTCN"]["train_loss"]
    assert last < first
    assert Path(summary["report"]).read_text().startswith("<!DOCTYPE html>")
    release = str(summary["release"])
    assert (Path(summary["triton_repository"]) / "tcn" / release / "model.onnx").is_file()
    assert (Path(summary["repository"]) / "releases" / release / "manifest.json").is_file()
    for step in ("simulate", "ingest_events", "train_hiertcn", "publish_release", "replay"):
        assert summary["step_seconds"][step] > 0


def test_kept_demo_answers_and_learns_from_a_click(summary: dict[str, Any], kept: Path) -> None:
    serving = json.loads((kept / "state" / "serving.json").read_text())
    with patient_client(serving["address"]) as client:
        before = client.recommend("somebody new", k=20)
        assert before.release == summary["release"]
        assert len({item.item_id for item in before.items}) == 20
        clicked = before.items[-1].item_id
        assert client.record([Interaction("somebody new", clicked)]).accepted == 1
        after = client.recommend("somebody new", k=20)
    assert [item.score for item in after.items] != [item.score for item in before.items]


def test_kept_demo_serves_metrics(kept: Path) -> None:
    serving = json.loads((kept / "state" / "serving.json").read_text())
    with urllib.request.urlopen(serving["metrics"], timeout=WAIT_S) as reply:
        assert b"hiertcn_" in reply.read()


def test_a_second_demo_does_not_disturb_a_kept_one(kept: Path) -> None:
    ended = _demo(kept, *SMALL)
    assert ended.returncode == 2
    assert "still serving" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--events=/no/such/log.parquet"], "/no/such/log.parquet"),
        (["--items=/no/such/items.parquet"], "--events"),
        (["--events=memory://nothing/here.csv"], "memory://nothing/here.csv"),
    ],
)
def test_wrong_inputs_end_with_one_sentence(
    tmp_path: Path, arguments: list[str], named: str
) -> None:
    ended = _demo(tmp_path / "demo", *arguments)
    assert ended.returncode == 2
    assert named in ended.stderr.strip().splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "demo" / "summary.json").exists()
