"""The data date of a scheduled run, whichever way the backend gives it."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.scheduled_time import INSTANT, MIDNIGHT, resolve_data_date
from hiertcn.errors import InputError

UNRESOLVED = "{{$.pipeline_job_schedule_time_utc}}"


@pytest.mark.parametrize(
    ("data_date", "scheduled_time", "expected"),
    [
        ("", "2026-01-31T02:00:00Z", ""),
        ("2026-01-31", UNRESOLVED, "2026-01-31"),
        (" 2026-01-31T02:00:00Z ", UNRESOLVED, "2026-01-31T02:00:00Z"),
        ("20260131020304", UNRESOLVED, "2026-01-31T02:03:04Z"),
        (MIDNIGHT, "2026-01-31T02:03:04Z", "2026-01-31T00:00:00Z"),
        (INSTANT, "2026-01-31T02:03:04Z", "2026-01-31T02:03:04Z"),
        (INSTANT, "2026-01-31T02:03:04.250+01:00", "2026-01-31T01:03:04Z"),
        ("[[ScheduledTime]]", "2026-01-31T02:03:04Z", "2026-01-31T02:03:04Z"),
        ("[[ScheduledTime.2006-01-02]]", "2026-01-31T02:03:04Z", "2026-01-31"),
    ],
)
def test_resolves(data_date: str, scheduled_time: str, expected: str) -> None:
    assert resolve_data_date(data_date, scheduled_time) == expected


@pytest.mark.parametrize("scheduled_time", [UNRESOLVED, "", "soon"])
def test_a_date_that_nobody_gave_is_one_sentence(scheduled_time: str) -> None:
    with pytest.raises(InputError, match="neither expanded nor gave a scheduled time") as raised:
        resolve_data_date(MIDNIGHT, scheduled_time)
    assert "--data-date YYYY-MM-DD" in str(raised.value)


@given(st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1)))
def test_an_expanded_macro_and_an_unexpanded_one_agree(moment: datetime) -> None:
    moment = moment.replace(microsecond=0, tzinfo=UTC)
    expanded = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    unexpanded = resolve_data_date(INSTANT, moment.isoformat())
    assert unexpanded == resolve_data_date(expanded, UNRESOLVED)
    assert resolve_data_date(MIDNIGHT, moment.isoformat()) == moment.strftime("%Y-%m-%dT00:00:00Z")
