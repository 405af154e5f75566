"""Deciding the fate of every staged row: kept, filtered (counted) or rejected with a reason.

Works by deleting from the table ``events``, largest cuts first, so each step says how many rows
it took and the last one to empty the table can be named. Costs one pass over the log per step and
a hash aggregate for duplicates and for each limit, all of which spill to disk.
"""

import time

import duckdb

from hiertcn.errors import InputError
from hiertcn.events.options import IngestOptions
from hiertcn.events.scan import ROW, quoted
from hiertcn.events.staging import StagedLog
from hiertcn.events.times import end_of_data, time_rule

_LISTED_TYPES = 20


def reject_bad_rows(
    connection: duckdb.DuckDBPyConnection, log: StagedLog, options: IngestOptions
) -> dict[str, int]:
    """Turn ``staged`` into ``events`` (good rows) and ``rejects``; return counts of filtered rows.

    Rows of other event types and rows after the data date are filtered before anything about
    them can be wrong: a log of many event types is not full of errors because searches have no
    item. Of rows with the same user, item and time the first in the log is kept.

    Raises:
        InputError: unknown event types, ambiguous timestamps, or no row is left.
    """
    filtered = {"event_type": _drop_other_types(connection, log, options)}
    latest_us = int((time.time() + options.max_future_s) * 1e6)
    rule = time_rule(
        connection,
        "staged",
        column=options.timestamp_column,
        unit=options.timestamp_unit,
        latest_us=latest_us,
    )
    connection.execute(
        f"CREATE VIEW judged AS SELECT * REPLACE ({rule.time_us} AS time_us), "
        "CASE WHEN user_id IS NULL THEN 'null_user_id' WHEN item_id IS NULL THEN 'null_item_id' "
        f"ELSE coalesce({rule.reason}, "
        "CASE WHEN unreadable_impressions THEN 'unreadable_impressions' END) END AS reason, "
        "coalesce(time_text, strftime(make_timestamp(time_us), '%Y-%m-%dT%H:%M:%S.%fZ')) "
        "AS timestamp FROM staged"
    )
    connection.execute(
        f"INSERT INTO rejects SELECT file_id, {ROW}, reason, user_id, item_id, timestamp "
        "FROM judged WHERE reason IS NOT NULL"
    )
    end_us = end_of_data(options.data_date)
    in_time = "true" if end_us is None else f"time_us < {end_us}"
    connection.execute(
        f"CREATE TABLE events AS SELECT file_id, {ROW}, user_id, item_id, time_us, event_type, "
        f"impressions FROM judged WHERE reason IS NULL AND {in_time}"
    )
    staged, kept, rejected = (
        _count(connection, "staged"),
        _count(connection, "events"),
        _count(connection, "rejects WHERE reason <> 'malformed_row'"),
    )
    filtered["after_data_date"] = staged - kept - rejected
    connection.execute("DROP VIEW judged")
    connection.execute("DROP TABLE staged")
    _reject_duplicates(connection)
    if not kept:
        raise InputError(_nothing_left_before_limits(connection, log, options, filtered))
    return filtered


def filter_items(connection: duckdb.DuckDBPyConnection, options: IngestOptions) -> dict[str, int]:
    """Keep of ``events`` those of the items in the table ``wanted_items``; return counts dropped.

    Raises:
        InputError: nothing is left.
    """
    dropped = _delete(connection, "item_id NOT IN (SELECT item_id FROM wanted_items)")
    if not _count(connection, "events"):
        raise InputError(
            f"item_filter={options.item_filter!r} leaves none of the {dropped} events: no item of "
            "the log fulfils it; check the column, the value and that both files use the same "
            "item ids"
        )
    return {"item_filter": dropped}


def apply_limits(connection: duckdb.DuckDBPyConnection, options: IngestOptions) -> dict[str, int]:
    """Apply the limits on interactions to ``events``; return counts dropped.

    Raises:
        InputError: a limit left nothing; it is named with the value that would leave something.
    """
    limits = [
        ("min_item_interactions", "item_id", "<", options.min_item_interactions),
        ("min_user_interactions", "user_id", "<", options.min_user_interactions),
        ("max_user_interactions", "user_id", ">", options.max_user_interactions),
    ]
    dropped = {name: 0 for name, *_ in limits}
    while True:
        gone = 0
        for name, key, comparison, limit in limits:
            counts = f"SELECT {key} FROM events GROUP BY {key} HAVING count(*) {comparison} {limit}"
            extreme = _extreme_count(connection, key, largest=comparison == "<")
            gone_here = _delete(connection, f"{key} IN ({counts})")
            dropped[name] += gone_here
            gone += gone_here
            if not _count(connection, "events"):
                most = "most" if comparison == "<" else "least"
                change = "lower" if comparison == "<" else "raise"
                raise InputError(
                    f"{name}={limit} leaves none of the remaining {gone_here} events (the {most} "
                    f"interactions of one {key.removesuffix('_id')} are {extreme}); {change} "
                    f"{name} or give a larger log"
                )
        if not gone or not options.repeat_filters:
            return dropped


def _drop_other_types(
    connection: duckdb.DuckDBPyConnection, log: StagedLog, options: IngestOptions
) -> int:
    if not options.event_types:
        return 0
    if not log.has_event_type:
        raise InputError(
            f"event_types asks for {', '.join(options.event_types)}, but the log has no column "
            f"{options.event_type_column!r}; set event_type_column or leave event_types empty"
        )
    rows = connection.execute(
        "SELECT event_type FROM staged WHERE event_type IS NOT NULL GROUP BY event_type "
        "ORDER BY count(*) DESC, event_type"
    ).fetchall()
    present = [str(name) for (name,) in rows]
    unknown = [name for name in options.event_types if name not in present]
    if unknown:
        listed = ", ".join(present[:_LISTED_TYPES]) or "none"
        raise InputError(
            f"event_types names {', '.join(map(repr, unknown))}, which the log does not have "
            f"(it has {listed}); name some of these or leave event_types empty"
        )
    wanted = ", ".join(map(quoted, options.event_types))
    return _delete(
        connection, f"event_type IS NULL OR event_type NOT IN ({wanted})", table="staged"
    )


def _reject_duplicates(connection: duckdb.DuckDBPyConnection) -> None:
    # Only keys that repeat are materialised: they are few, the log is not.
    connection.execute(
        f"CREATE TABLE repeated AS SELECT user_id, item_id, time_us, "
        f"min(struct_pack(file_id := file_id, source_row := {ROW})) AS first "
        "FROM events GROUP BY user_id, item_id, time_us HAVING count(*) > 1"
    )
    same = (
        "events.user_id = repeated.user_id AND events.item_id = repeated.item_id "
        "AND events.time_us = repeated.time_us AND (events.file_id <> repeated.first.file_id "
        f"OR events.{ROW} <> repeated.first.source_row)"
    )
    connection.execute(
        f"INSERT INTO rejects SELECT events.file_id, events.{ROW}, 'duplicate', events.user_id, "
        "events.item_id, strftime(make_timestamp(events.time_us), '%Y-%m-%dT%H:%M:%S.%fZ') "
        f"FROM events JOIN repeated ON {same}"
    )
    connection.execute(f"DELETE FROM events USING repeated WHERE {same}")
    connection.execute("DROP TABLE repeated")


def _nothing_left_before_limits(
    connection: duckdb.DuckDBPyConnection,
    log: StagedLog,
    options: IngestOptions,
    filtered: dict[str, int],
) -> str:
    if not log.rows:
        return "the log has no rows; expected events with a user, an item and a time each"
    rejected = connection.execute(
        "SELECT reason, count(*) FROM rejects GROUP BY reason ORDER BY 2 DESC"
    ).fetchall()
    rejected_text = ", ".join(f"{reason}: {count}" for reason, count in rejected) or "none"
    return (
        f"none of the log's {log.rows} rows is left: {filtered['event_type']} of other event "
        f"types, {filtered['after_data_date']} after data_date {options.data_date!r}, rejected "
        f"{rejected_text}; correct the log or these options"
    )


def _extreme_count(connection: duckdb.DuckDBPyConnection, key: str, *, largest: bool) -> int:
    function = "max" if largest else "min"
    row = connection.execute(
        f"SELECT {function}(n) FROM (SELECT count(*) AS n FROM events GROUP BY {key})"
    ).fetchone()
    return int(row[0]) if row and row[0] is not None else 0


def _delete(connection: duckdb.DuckDBPyConnection, condition: str, *, table: str = "events") -> int:
    row = connection.execute(f"DELETE FROM {table} WHERE {condition}").fetchone()
    return int(row[0]) if row else 0


def _count(connection: duckdb.DuckDBPyConnection, source: str) -> int:
    row = connection.execute(f"SELECT count(*) FROM {source}").fetchone()
    return int(row[0]) if row else 0
