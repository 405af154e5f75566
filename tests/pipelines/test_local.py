"""What the local runner refuses; `tests/end_to_end/test_daily_cycle.py` runs the whole pipeline."""

from pathlib import Path

import pytest

from hiertcn.errors import InputError
from pipelines.local import StepError, run


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
