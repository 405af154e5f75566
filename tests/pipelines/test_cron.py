"""Cron expressions as Kubeflow takes them."""

import pytest

from hiertcn.errors import InputError
from pipelines.cron import six_field_cron


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0 2 * * *", "0 0 2 * * *"),
        ("30 0 2 * * *", "30 0 2 * * *"),
        ("*/15  0-6,22 ? JAN-mar MON", "0 */15 0-6,22 ? JAN-mar MON"),
        ("0 0 2 1,15 * 1-5", "0 0 2 1,15 * 1-5"),
        ("10-50/20 * * * *", "0 10-50/20 * * * *"),
    ],
)
def test_five_fields_get_seconds(given: str, expected: str) -> None:
    assert six_field_cron(given) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "has 0 fields"),
        ("daily", "has 1 fields"),
        ("0 0 2 * * * *", "has 7 fields"),
        ("60 2 * * *", "'60' is no minutes; expected 0 to 59"),
        ("0 24 * * *", "'24' is no hours"),
        ("0 2 0 * *", "'0' is no day of the month; expected 1 to 31"),
        ("0 2 * 13 *", "'13' is no month"),
        ("0 2 * * 7", "'7' is no day of the week; expected 0 to 6 or SUN-SAT"),
        ("0 2 * * FUN", "'FUN' is no day of the week"),
        ("5-1 2 * * *", "'5-1' is no minutes"),
        ("*/0 2 * * *", "'\\*/0' is no minutes"),
        ("*-3 2 * * *", "is no minutes"),
    ],
)
def test_wrong_expressions_say_which_part(given: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        six_field_cron(given)
