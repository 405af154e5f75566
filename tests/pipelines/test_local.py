"""The whole pipeline under Kubeflow's local runner, on a small log whose order can be learnt.

Each step is a process of its own and imports what it needs, so there are two runs: one that fails
at its seventh step, and the same one resumed.
"""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from hiertcn.errors import InputError
from hiertcn.release.repository import ReleaseRepository
from pipelines.daily import NAME, STEPS
from pipelines.local import StepError, run

ROOT = Path(__file__).parents[2]
ITEMS = 24
START = datetime(2026, 1, 1, tzinfo=UTC)


def write_log(path: Path) -> pa.Table:
    """Write a CSV of users who each day go on from some item to the three after it, in a circle."""
    rng = np.random.default_rng(0)
    rows = [
        (user, int(first + place) % ITEMS, START + timedelta(days=day, minutes=user + place))
        for user in range(60)
        for day, first in enumerate(rng.integers(0, ITEMS, 9))
        for place in range(4)
    ]
    users, items, times = zip(*rows, strict=True)
    table = pa.table({"visitor": users, "article": items, "at": times})
    pa.csv.write_csv(table, path)
    return table


def write_oracle(folder: Path, log: pa.Table) -> None:
    """Write an oracle that knows every next item."""
    folder.mkdir()
    columns = {
        "user_id": log["visitor"].cast(pa.string()),
        "item_id": log["article"].cast(pa.string()),
        "timestamp": log["at"],
        "rank": pa.array(np.ones(len(log), np.int32)),
        "candidates": pa.array(np.full(len(log), ITEMS, np.int32)),
    }
    pa.parquet.write_table(pa.table(columns), folder / "part-0.parquet")


def run_command(folder: Path) -> subprocess.CompletedProcess[str]:
    options = {
        "events": folder / "log.csv",
        "oracle": folder / "oracle",
        "repository": folder / "repository",
        "work-dir": folder / "work",
        "user-column": "visitor",
        "item-column": "article",
        "timestamp-column": "at",
        "data-date": "2026-01-08",
        "item-dim": 16,
        "hidden": 16,
        "encoder-epochs": 2,
        "max-steps": 60,
        "learning-rate": 0.01,
        "max-requests": 200,
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "pipelines", "run"),
            *[f"--{name}={value}" for name, value in options.items()],
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def summary_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "work" / "run.json").read_text())
    return values


# Imports alone take half a minute where the processors are shared.
@pytest.mark.timeout(900)
def test_a_failed_run_resumes_at_the_failed_step_and_publishes(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv")
    releases = ReleaseRepository(tmp_path / "repository")

    failed = run_command(tmp_path)
    assert failed.returncode == 2, failed.stdout + failed.stderr
    said = failed.stderr.strip().splitlines()
    assert len(said) == 1, failed.stderr
    assert str(tmp_path / "oracle") in said[0]
    assert "Traceback" not in failed.stdout
    assert "[KFP Executor" not in failed.stdout
    assert not (tmp_path / "work" / "run.json").exists()
    assert releases.numbers() == []

    write_oracle(tmp_path / "oracle", log)
    resumed = run_command(tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "train_hiertcn: unchanged, using the earlier result" in resumed.stdout
    summary = summary_of(tmp_path)
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
    assert summary["release"] == releases.current() == 2026010801
    releases.verify(2026010801)
    assert "release 2026010801 is published and active" in resumed.stdout
    assert summary["repository"] == str(releases.root)

    # What the demo shows.
    assert summary["graph"]["items"] == ITEMS
    assert {"edges", "isolated_items"} <= set(summary["graph"])
    assert all("train_loss" in curves for curves in summary["training"].values())
    models = summary["offline"]["models"]
    alone = "HierTCN without terms"
    assert {"HierTCN", alone, "popularity", "MV", "MaxItem", "oracle"} <= set(models)
    assert models["HierTCN"]["mrr"] > models["popularity"]["mrr"]
    assert models["HierTCN"]["mrr"] != models[alone]["mrr"]
    assert models["oracle"]["recall@1"] == 1.0
    assert summary["data"]["users"] == 60
    report = Path(summary["report"]).read_text()
    assert report.lstrip().lower().startswith("<!doctype html")
    assert "Scoring terms" in report
    release = releases.path(2026010801)
    assert (release / "scoring_terms.safetensors").is_file()
    assert (release / "user_states" / "transitions").is_dir()

    # Metrics that Kubeflow shows, on the step's own artifact.
    (output,) = (tmp_path / "work" / "pipeline").glob(f"{NAME}-*/evaluate/executor_output.json")
    artifacts = json.loads(output.read_text())["artifacts"]
    shown = artifacts["metrics"]["artifacts"][0]["metadata"]
    assert shown["HierTCN mrr"] == pytest.approx(models["HierTCN"]["mrr"])


def test_bad_parameters_are_refused_before_any_step_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--events is empty"):
        run({}, tmp_path / "work")
    with pytest.raises(InputError, match="keep_runs"):
        run({"events": "x"}, tmp_path / "work", keep_runs=0)
    assert not (tmp_path / "work").exists()


def test_a_log_that_is_not_there_is_the_ingests_own_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StepError, match=r"nowhere\.csv") as raised:
        run({"events": str(tmp_path / "nowhere.csv")}, tmp_path / "work")
    assert raised.value.exit_code == 2
    assert "Traceback" not in capsys.readouterr().out
    assert not (tmp_path / "work" / "run.json").exists()
