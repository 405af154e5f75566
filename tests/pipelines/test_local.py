"""The whole pipeline under Kubeflow's local runner, on a small simulated log.

The tests of one log run in order and share a work directory, as the days of a user's week do: a
run that fails, the same run resumed, a release, the next day's release. Each step is a process of
its own and imports torch, so they are few.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hiertcn.errors import InputError
from hiertcn.events.simulate import SimulationOptions, simulate
from hiertcn.release.repository import ReleaseRepository
from pipelines.daily import STEPS
from pipelines.local import StepError, run

ROOT = Path(__file__).parents[2]


@dataclass
class Week:
    """One log, one work directory, one repository."""

    folder: Path
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / "log"

    @property
    def work_dir(self) -> Path:
        return self.folder / "work"

    @property
    def releases(self) -> ReleaseRepository:
        return ReleaseRepository(self.folder / "repository")

    def arguments(self, **changes: str) -> list[str]:
        given = {
            "events": str(self.log / "events"),
            "items": str(self.log / "items.parquet"),
            "oracle": str(self.folder / "oracle"),
            "repository": str(self.folder / "repository"),
            "work-dir": str(self.work_dir),
            "min-item-interactions": "5",
            "min-user-interactions": "5",
            "data-date": "2026-01-09",
            "item-dim": "8",
            "hidden": "16",
            "encoder-epochs": "1",
            "max-steps": "2",
            "max-requests": "300",
        }
        return [f"--{name}={value}" for name, value in {**given, **changes}.items()]

    def run(self, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipelines", "run", *self.arguments(**changes)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    def summary(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.work_dir / "run.json").read_text())
        return values


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory) -> Week:
    week = Week(tmp_path_factory.mktemp("week"))
    simulate(week.log, SimulationOptions(users=150, items=40, days=10, seed=3))
    return week


def test_a_failed_run_ends_in_one_sentence_and_resumes_at_the_failed_step(week: Week) -> None:
    failed = week.run()
    assert failed.returncode == 2
    said = failed.stderr.strip().splitlines()
    assert len(said) == 1
    assert f"the oracle folder {week.folder / 'oracle'} holds no parquet file" in said[0]
    assert "Traceback" not in failed.stdout
    assert not (week.work_dir / "run.json").exists()
    assert week.releases.current() is None

    (week.log / "oracle").rename(week.folder / "oracle")
    resumed = week.run()
    assert resumed.returncode == 0, resumed.stderr
    summary = week.summary()
    assert set(summary["cached"]) == {
        "build_item_graph",
        "train_item_encoder",
        "embed_items",
        "build_sessions",
        "train_hiertcn",
    }
    assert "train_hiertcn: unchanged, using the earlier result" in resumed.stdout
    # Two steps of training cannot beat popularity: the run is green and changes nothing.
    assert summary["gate"]["passed"] is False
    assert summary["release"] is None
    assert week.releases.numbers() == []
    assert set(summary["step_seconds"]) == set(STEPS[:7])
    assert all(summary["step_seconds"][name] == 0 for name in summary["cached"])
    assert "nothing was published, and what serves stays" in resumed.stdout


def test_the_summary_names_what_the_demo_shows(week: Week) -> None:
    summary = week.summary()
    assert summary["graph"]["items"] > 0
    assert {"edges", "isolated_items"} <= set(summary["graph"])
    assert "train_loss" in summary["training"]["HierTCN"]
    assert "train_loss" in summary["training"]["item encoder"]
    assert {"HierTCN", "popularity", "MV", "MaxItem", "oracle"} <= set(summary["offline"]["models"])
    assert set(summary["offline"]["models"]["HierTCN"]) >= {"recall@10", "mrr"}
    assert summary["data"]["statistics"]
    assert Path(summary["report"]).read_text().lstrip().lower().startswith("<!doctype html")


def test_bad_parameters_are_refused_before_any_step_runs(week: Week, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--events is empty"):
        run({}, tmp_path / "work")
    with pytest.raises(InputError, match="keep_runs"):
        run({"events": "x"}, tmp_path / "work", keep_runs=0)
    assert not (tmp_path / "work").exists()


def test_a_log_that_is_not_there_is_the_ingests_own_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StepError, match="nowhere") as raised:
        run({"events": str(tmp_path / "nowhere.csv")}, tmp_path / "work")
    assert raised.value.exit_code == 2
    assert "Traceback" not in capsys.readouterr().out
    assert not (tmp_path / "work" / "run.json").exists()
