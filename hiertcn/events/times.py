"""Timestamps: from what logs hold to int64 microseconds since 1970 in UTC.

A number says nothing about its unit. ``auto`` takes the one unit in which the log's numbers read
as dates between 1990 and tomorrow, and refuses when none or several fit; these ranges do not
overlap between s, ms, us and ns.
"""

import datetime
from dataclasses import dataclass
from typing import Final

import duckdb

from hiertcn.errors import InputError

TIMESTAMP_UNITS: Final = ("auto", "s", "ms", "us", "ns")

_EARLIEST_S = 631_152_000
_UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY_US = 86_400_000_000


@dataclass(frozen=True)
class TimeRule:
    """SQL over the columns ``time_us``, ``time_number`` and ``time_text`` of a staged log.

    Attributes:
        time_us: expression of the event time, bigint, microseconds; NULL if there is none.
        reason: expression of why the time is refused, text; NULL if it is good.
    """

    time_us: str
    reason: str


def end_of_data(data_date: str) -> int | None:
    """Return the first instant (microseconds) that is no longer part of the data.

    ``YYYY-MM-DD`` means through the end of that UTC day, an RFC 3339 instant means before it, and
    an empty text means everything (None).

    Raises:
        InputError: neither of these.
    """
    if not data_date:
        return None
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    try:
        if len(data_date) == len("YYYY-MM-DD"):
            day = datetime.date.fromisoformat(data_date)
            return ((day - epoch.date()).days + 1) * _DAY_US
        instant = datetime.datetime.fromisoformat(data_date)
        if instant.tzinfo is None:
            raise ValueError("no zone")
        return (instant - epoch) // datetime.timedelta(microseconds=1)
    except ValueError:
        raise InputError(
            f"data_date is {data_date!r}; expected a date as YYYY-MM-DD or an instant with a zone "
            "such as 2026-01-31T00:00:00Z"
        ) from None


def time_rule(
    connection: duckdb.DuckDBPyConnection, table: str, *, column: str, unit: str, latest_us: int
) -> TimeRule:
    """Decide how the times of the staged ``table`` are read.

    Args:
        connection: holds ``table`` with columns ``time_us`` (bigint, known already),
            ``time_number`` (bigint in an unknown unit) and ``time_text`` (as found).
        table: its name.
        column: the log's column, for messages.
        unit: one of ``TIMESTAMP_UNITS``.
        latest_us: later events are far-future.

    Raises:
        InputError: ``auto``, and the numbers fit no unit or several.
    """
    counts = _plausible_counts(connection, table, latest_us)
    numbers = counts.pop("numbers")
    reasons = [
        ("time_us IS NULL AND time_number IS NULL AND time_text IS NULL", "null_timestamp"),
        ("time_us IS NULL AND time_number IS NULL", "unreadable_timestamp"),
        ("time_us < 0 OR time_number < 0", "negative_timestamp"),
        (f"time_us > {latest_us}", "far_future_timestamp"),
    ]
    time_us = "time_us"
    if numbers:
        inferred = _infer(connection, table, column, counts, latest_us) if unit == "auto" else unit
        low, high = _range(inferred, latest_us)
        others = " OR ".join(
            "time_number BETWEEN {} AND {}".format(*_range(other, latest_us))
            for other in _UNITS_PER_SECOND
            if other != inferred
        )
        # In a log of dates before 1990 a declared unit is taken at its word; in a log of recent
        # dates, a number that only another unit makes recent was written in that unit.
        if counts[inferred] > numbers // 2:
            reasons.append((others, "timestamp_in_other_unit"))
        if unit == "auto":
            reasons.append((f"time_number < {low}", "timestamp_before_1990"))
        reasons.append((f"time_number > {high}", "far_future_timestamp"))
        per_second = _UNITS_PER_SECOND[inferred]
        to_us = (
            f"time_number * {10**6 // per_second}"
            if per_second <= 10**6
            else f"time_number // {per_second // 10**6}"
        )
        time_us = f"coalesce(time_us, CASE WHEN time_number BETWEEN 0 AND {high} THEN {to_us} END)"
    cases = " ".join(f"WHEN {condition} THEN '{reason}'" for condition, reason in reasons)
    return TimeRule(time_us=time_us, reason=f"CASE {cases} END")


def _plausible_counts(
    connection: duckdb.DuckDBPyConnection, table: str, latest_us: int
) -> dict[str, int]:
    ranges = ", ".join(
        "count(*) FILTER (WHERE time_number BETWEEN {} AND {})".format(*_range(unit, latest_us))
        for unit in _UNITS_PER_SECOND
    )
    row = connection.execute(f"SELECT count(time_number), {ranges} FROM {table}").fetchone()
    assert row is not None
    return dict(zip(("numbers", *_UNITS_PER_SECOND), map(int, row), strict=True))


def _infer(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    column: str,
    counts: dict[str, int],
    latest_us: int,
) -> str:
    fitting = [unit for unit, count in counts.items() if count]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        row = connection.execute(f"SELECT min(time_number), max(time_number) FROM {table}")
        low, high = row.fetchone() or (None, None)
        raise InputError(
            f"column {column!r} holds whole numbers from {low} to {high}, which are dates between "
            "1990 and now in none of s, ms, us, ns; set timestamp_unit to the right one"
        )
    examples = []
    for unit in fitting:
        between = "time_number BETWEEN {} AND {}".format(*_range(unit, latest_us))
        row = connection.execute(f"SELECT min(time_number) FROM {table} WHERE {between}")
        (example,) = row.fetchone() or (None,)
        examples.append(f"{unit} ({counts[unit]} rows, e.g. {example})")
    raise InputError(
        f"column {column!r} mixes units: {', '.join(examples)}; set timestamp_unit to one of them "
        "(rows of the others are then rejected) or write the log in one unit"
    )


def _range(unit: str, latest_us: int) -> tuple[int, int]:
    per_second = _UNITS_PER_SECOND[unit]
    return _EARLIEST_S * per_second, latest_us * per_second // 10**6
