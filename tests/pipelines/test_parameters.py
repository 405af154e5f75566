"""The one table of parameters, and the command line made from it."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hiertcn.errors import InputError
from pipelines import daily
from pipelines.daily import STEPS
from pipelines.parameters import BY_NAME, PARAMETERS, complete


def test_every_parameter_is_read_by_a_step_and_defaults_fit_their_owners() -> None:
    read = {name for step in STEPS for name in inspect.signature(getattr(daily, step)).parameters}
    assert set(BY_NAME) <= read


def test_names_and_options_are_unique_and_documented() -> None:
    assert len(BY_NAME) == len(PARAMETERS) == len({item.flag for item in PARAMETERS})
    for item in PARAMETERS:
        assert item.help.endswith("."), item.name
        if isinstance(item.default, int | float) and item.name not in ("seed", "learning_rate"):
            assert item.unit, item.name


def test_complete_adds_defaults_and_takes_floats_for_integers() -> None:
    values = complete({"events": "log", "max_epochs": 3.0, "tolerance": 0})
    assert values["max_epochs"] == 3
    assert isinstance(values["max_epochs"], int)
    assert values["tolerance"] == 0.0
    assert values["session_gap_s"] == 1800.0
    assert list(values) == [item.name for item in PARAMETERS]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "--events is empty"),
        ({"events": "log", "epochs": 3}, "no parameter 'epochs'"),
        ({"events": "log", "max_epochs": 3.5}, "--max-epochs is 3.5; expected int"),
        ({"events": "log", "max_epochs": True}, "--max-epochs is True"),
        ({"events": 1}, "--events is 1; expected str"),
        ({"events": "log", "event_types": "click"}, "--event-type is 'click'; expected list"),
        (
            {"events": "log", "configuration": "worst"},
            "--configuration is 'worst'; expected best or paper",
        ),
    ],
)
def test_wrong_parameters_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        complete(given)


def test_help_explains_every_option_with_unit_and_default() -> None:
    # Wide enough that no line is broken.
    result = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", "--help"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "COLUMNS": "400", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    )
    for item in PARAMETERS:
        (line,) = [line for line in result.stdout.splitlines() if f" {item.flag} " in line]
        assert item.help in line
        assert f"[{item.unit}]" in line or not item.unit
        assert all(choice in line for choice in item.choices)
        assert "[default:" in line
