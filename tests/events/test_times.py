"""Timestamps: units are inferred only where one is possible, and the data date is exact."""

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from hiertcn.events.times import end_of_data, time_rule

_NOW_S = 1_790_000_000
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _read(numbers, unit):
    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE log (time_us BIGINT, time_number BIGINT, time_text VARCHAR, place INT)"
    )
    connection.executemany(
        "INSERT INTO log VALUES (NULL, ?, ?, ?)",
        [(number, str(number), place) for place, number in enumerate(numbers)],
    )
    rule = time_rule(connection, "log", column="when", unit=unit, latest_us=_NOW_S * 10**6)
    query = f"SELECT {rule.time_us}, {rule.reason} FROM log ORDER BY place"
    return connection.execute(query).fetchall()


@settings(max_examples=20)
@given(
    unit=st.sampled_from(sorted(_PER_SECOND)),
    seconds=st.lists(st.integers(631_152_000, _NOW_S), min_size=1, max_size=5),
)
def test_auto_finds_the_unit_of_any_recent_time(unit, seconds):
    numbers = [second * _PER_SECOND[unit] for second in seconds]
    assert _read(numbers, "auto") == [(second * 10**6, None) for second in seconds]


def test_auto_refuses_numbers_that_are_recent_in_no_unit():
    with pytest.raises(InputError, match=r"12 to 500.*set timestamp_unit"):
        _read([12, 500], "auto")


def test_auto_refuses_two_units_and_names_both():
    with pytest.raises(InputError, match=r"mixes units: s \(2 rows.*ms \(1 rows"):
        _read([1_700_000_000, 1_700_000_001, 1_700_000_000_000], "auto")


def test_declared_unit_takes_early_times_at_their_word():
    assert _read([0, 12], "s") == [(0, None), (12_000_000, None)]


@pytest.mark.parametrize(("unit", "good"), [("s", 1_700_000_000), ("ms", 1_700_000_000_000)])
def test_declared_unit_rejects_stray_numbers_of_another(unit, good):
    stray = 1_700_000_000 if unit == "ms" else 1_700_000_000_000
    rows = _read([good, good + 1, stray], unit)
    assert [reason for _, reason in rows] == [None, None, "timestamp_in_other_unit"]


def test_refused_times_say_why():
    rows = _read([1_700_000_000, -1, _NOW_S + 1, 5 * 10**18, 5], "auto")
    assert [reason for _, reason in rows] == [
        None,
        "negative_timestamp",
        "far_future_timestamp",
        "far_future_timestamp",
        "timestamp_before_1990",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("1970-01-01", 86_400_000_000),
        ("1970-01-01T00:00:01Z", 1_000_000),
        ("1970-01-01T02:00:00.5+02:00", 500_000),
    ],
)
def test_data_date_is_the_end_of_the_day_or_the_instant(text, expected):
    assert end_of_data(text) == expected


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "2026-01-01T00:00:00", "20260101"])
def test_other_data_dates_are_refused(text):
    with pytest.raises(InputError, match="data_date is"):
        end_of_data(text)
