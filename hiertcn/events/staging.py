"""Loading every file of a log into one DuckDB table of plain types, checked column by column.

Files may differ in their types (one numbers its users, another names them), may lack the optional
columns, and may bring any others, which are ignored. Nothing is dropped here but CSV rows of the
wrong shape: whether a row is good is for ``judge.py`` to say, when all rows are in.
"""

from dataclasses import dataclass
from pathlib import Path

import duckdb
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.events.columns import IMPRESSIONS
from hiertcn.events.options import IngestOptions
from hiertcn.events.scan import (
    ROW,
    Scan,
    identifier,
    malformed_rows,
    require_columns,
    scan,
    unreadable,
)
from hiertcn.events.source import SourceFile

_INTEGERS = {
    f"{sign}{size}INT" for sign in ("", "U") for size in ("TINY", "SMALL", "", "BIG", "HUGE")
} | {"INTEGER", "UINTEGER"}
_NAIVE_TIMES = {"TIMESTAMP", "TIMESTAMP_S", "TIMESTAMP_MS", "TIMESTAMP_NS", "DATE"}


@dataclass(frozen=True)
class StagedLog:
    """What the tables ``staged``, ``files`` and ``rejects`` of the connection hold.

    ``staged`` has file_id, source_row, user_id, item_id (text), time_us, time_number, time_text,
    event_type, impressions (list of text) and unreadable_impressions.
    """

    rows: int
    has_event_type: bool
    has_impressions: bool


def stage_log(
    connection: duckdb.DuckDBPyConnection,
    files: list[SourceFile],
    options: IngestOptions,
    scratch: Path,
) -> StagedLog:
    """Read all files into the table ``staged``; ``file_id`` numbers them in the order given.

    Raises:
        InputError: a file is incomplete, lacks a column, or has one of the wrong type.
    """
    connection.execute(
        f"CREATE TABLE staged (file_id INTEGER, {ROW} BIGINT, user_id VARCHAR, item_id VARCHAR, "
        "time_us BIGINT, time_number BIGINT, time_text VARCHAR, event_type VARCHAR, "
        "impressions VARCHAR[], unreadable_impressions BOOLEAN)"
    )
    connection.execute("CREATE TABLE files (file_id INTEGER, name VARCHAR)")
    connection.execute(
        f"CREATE TABLE rejects (file_id INTEGER, {ROW} BIGINT, reason VARCHAR, user_id VARCHAR, "
        "item_id VARCHAR, timestamp VARCHAR)"
    )
    has_event_type = has_impressions = False
    rows = 0
    for file_id, file in enumerate(tqdm(files, desc="read log", unit="file", mininterval=2)):
        connection.execute("INSERT INTO files VALUES (?, ?)", [file_id, file.name])
        with file.local(scratch) as path:
            source = scan(connection, file, path)
            select = _select(source, options)
            try:
                loaded = connection.execute(
                    f"INSERT INTO staged SELECT {file_id}, {select} FROM {source.relation}"
                ).fetchone()
            except duckdb.OutOfMemoryException as error:
                raise out_of_memory(options.memory_limit, error) from error
            except duckdb.Error as error:
                raise unreadable(file, error) from error
        malformed = [] if file.is_parquet else malformed_rows(connection)
        if malformed:
            connection.executemany(
                "INSERT INTO rejects VALUES (?, ?, 'malformed_row', NULL, NULL, NULL)",
                [(file_id, row) for row in malformed],
            )
        rows += int(loaded[0] if loaded else 0) + len(malformed)
        has_event_type |= options.event_type_column in source.types
        has_impressions |= options.impressions_column in source.types
    return StagedLog(rows=rows, has_event_type=has_event_type, has_impressions=has_impressions)


def out_of_memory(memory_limit: str, error: Exception) -> InputError:
    """Return the error for a DuckDB step that did not fit into memory and scratch disk."""
    reason = str(error).split("\n", maxsplit=1)[0]
    return InputError(
        f"the log does not fit into memory_limit={memory_limit} ({reason}); raise memory_limit or "
        "free space on the output's disk"
    )


def text_id(source: Scan, column: str, option: str) -> str:
    """Return SQL of an id column as text, NULL for empty text.

    Raises:
        InputError: its type is neither text nor a whole number.
    """
    kind = source.types[column]
    if kind in _INTEGERS:
        return f"{identifier(column)}::VARCHAR"
    if kind in ("VARCHAR", "UUID") or kind.startswith("ENUM"):
        return f"nullif({identifier(column)}::VARCHAR, '')"
    raise InputError(
        f"column {column!r} of {source.file.name} has type {kind}; expected text or whole numbers "
        f"as ids; write it as one of these or set {option}"
    )


def _select(source: Scan, options: IngestOptions) -> str:
    require_columns(
        source,
        {
            options.user_column: "user_column",
            options.item_column: "item_column",
            options.timestamp_column: "timestamp_column",
        },
    )
    event_type = "NULL::VARCHAR"
    if options.event_type_column in source.types:
        event_type = f"{identifier(options.event_type_column)}::VARCHAR"
    return ", ".join(
        [
            ROW,
            f"{text_id(source, options.user_column, 'user_column')} AS user_id",
            f"{text_id(source, options.item_column, 'item_column')} AS item_id",
            *_times(source, options.timestamp_column),
            f"{event_type} AS event_type",
            *_impressions(source, options.impressions_column),
        ]
    )


def _times(source: Scan, column: str) -> list[str]:
    kind = source.types[column]
    name = identifier(column)
    if kind == "TIMESTAMP WITH TIME ZONE":
        return [f"epoch_us({name})", "NULL", "NULL"]
    if kind in _NAIVE_TIMES:
        return [f"epoch_us({name}::TIMESTAMP)", "NULL", "NULL"]
    if kind in _INTEGERS:
        return ["NULL", f"try_cast({name} AS BIGINT)", f"{name}::VARCHAR"]
    if kind == "VARCHAR":
        number = f"try_cast({name} AS BIGINT)"
        whole = f"regexp_full_match(trim({name}), '[+-]?[0-9]+')"
        instant = f"try_cast({name} AS TIMESTAMPTZ)"
        return [
            f"CASE WHEN NOT {whole} AND isfinite({instant}) THEN epoch_us({instant}) END",
            f"CASE WHEN {whole} THEN {number} END",
            f"nullif({name}, '')",
        ]
    raise InputError(
        f"column {column!r} of {source.file.name} has type {kind}; expected timestamps, whole "
        "numbers or ISO 8601 text; write it as one of these or set timestamp_column"
    )


def _impressions(source: Scan, column: str) -> list[str]:
    if column not in source.types:
        return [f"NULL::VARCHAR[] AS {IMPRESSIONS}", "false"]
    kind = source.types[column]
    name = identifier(column)
    if kind.endswith("]") and (
        kind.partition("[")[0] in _INTEGERS or kind.startswith(("VARCHAR", "UUID", "ENUM"))
    ):
        items = f"{name}::VARCHAR[]"
        is_unreadable = "false"
    elif kind == "VARCHAR":
        items = (
            f"CASE WHEN NOT starts_with(ltrim({name}), '[') THEN string_split({name}, '|') "
            f"WHEN json_valid({name}) THEN from_json({name}, '[\"VARCHAR\"]') "
            f"ELSE try_cast({name} AS VARCHAR[]) END"
        )
        is_unreadable = f"coalesce({name} <> '' AND ({items}) IS NULL, false)"
    elif kind == '"NULL"' or kind.startswith('"NULL"'):
        return [f"NULL::VARCHAR[] AS {IMPRESSIONS}", "false"]
    else:
        raise InputError(
            f"column {column!r} of {source.file.name} has type {kind}; expected a list of item "
            'ids (text or whole numbers), or text such as ["a","b"] or a|b; write it as one of '
            "these or set impressions_column"
        )
    known = f"list_filter({items}, lambda x: x IS NOT NULL AND x <> '')"
    return [
        f"CASE WHEN len({known}) > 0 THEN {known} END AS {IMPRESSIONS}",
        f"{is_unreadable} AS unreadable_impressions",
    ]
