"""DuckDB scans of one parquet or CSV file: what columns it has, and the SQL that reads them.

Parquet is read with its own types; every CSV column is text unless asked otherwise. A CSV row
that does not have the header's number of fields is set aside by DuckDB and can be fetched with
``malformed_rows``.
"""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from hiertcn.errors import InputError
from hiertcn.events.source import SourceFile, read_head

ROW: str = "source_row"

_HEAD_BYTES = 1 << 20
_DELIMITERS = ",\t;|"


@dataclass(frozen=True)
class Scan:
    """One file as SQL.

    Attributes:
        file: where it came from, for messages.
        relation: a SELECT of all its columns and ``source_row`` (bigint, from 0; for CSV it
            counts the well-formed rows), in parentheses.
        types: column name -> DuckDB type, including values taken from ``key=value`` folders.
    """

    file: SourceFile
    relation: str
    types: dict[str, str]


def connect(scratch: Path, memory_limit: str) -> duckdb.DuckDBPyConnection:
    """Open an in-memory database that spills to ``scratch`` above ``memory_limit``.

    Raises:
        InputError: DuckDB does not understand the memory limit.
    """
    connection = duckdb.connect()
    try:
        connection.execute(f"SET memory_limit = {quoted(memory_limit)}")
    except duckdb.Error:
        raise InputError(
            f"memory_limit is {memory_limit!r}; expected a size such as 4GB or 500MB"
        ) from None
    connection.execute(f"SET temp_directory = {quoted(str(scratch))}")
    # Naive timestamps are UTC, whatever the machine's zone.
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET autoinstall_known_extensions = false")
    connection.execute("SET enable_progress_bar = false")
    return connection


def scan(
    connection: duckdb.DuckDBPyConnection,
    file: SourceFile,
    path: Path,
    *,
    infer_types_except: str | None = None,
) -> Scan:
    """Look at the file at ``path`` and return how to read it.

    ``infer_types_except`` lets DuckDB infer the types of CSV columns, but for the named one.

    Raises:
        InputError: not a complete parquet file, or not a CSV file with a header.
    """
    if file.is_parquet:
        reader = (
            f"read_parquet({quoted(str(path))}, file_row_number = true, binary_as_string = true, "
            "hive_partitioning = false)"
        )
        select = f"SELECT * EXCLUDE (file_row_number), file_row_number AS {ROW} FROM {reader}"
    else:
        reader = _csv_reader(file, path, infer_types_except)
        select = f"SELECT *, row_number() OVER () - 1 AS {ROW} FROM {reader}"
    try:
        described = connection.execute(f"DESCRIBE {select}").fetchall()
    except duckdb.Error as error:
        raise unreadable(file, error) from error
    types = {name: str(kind) for name, kind, *_ in described if name != ROW}
    for name, value in file.path_values.items():
        if name not in types:
            select = f"SELECT *, {quoted(value)} AS {identifier(name)} FROM ({select})"
            types[name] = "VARCHAR"
    return Scan(file, f"({select})", types)


def malformed_rows(connection: duckdb.DuckDBPyConnection) -> list[int]:
    """Return, and forget, the rows (0-based) of the CSV scanned last that had a wrong shape."""
    try:
        lines = connection.execute("SELECT DISTINCT line FROM reject_errors ORDER BY line")
        rows = [int(line) - 2 for (line,) in lines.fetchall()]
        connection.execute("DROP TABLE reject_errors")
        connection.execute("DROP TABLE reject_scans")
    except duckdb.CatalogException:
        return []
    return rows


def require_columns(scan: Scan, columns: dict[str, str]) -> None:
    """Check that the file has the columns; ``columns`` maps each name to its option.

    Raises:
        InputError: naming the file, the missing column, those present, and the option.
    """
    for column, option in columns.items():
        if column not in scan.types:
            raise InputError(
                f"{scan.file.name} has no column {column!r}; it has {', '.join(scan.types)}; "
                f"rename one or set {option}"
            )


def unreadable(file: SourceFile, error: Exception) -> InputError:
    """Return the error for a file that DuckDB cannot read to its end."""
    kind = "parquet" if file.is_parquet else "CSV"
    reason = str(error).split("\n", maxsplit=1)[0].removeprefix("Invalid Input Error: ")
    # The path of a download means nothing to the user.
    reason = re.sub(r"'/[^']*'", "it", reason)
    return InputError(
        f"{file.name} is not a complete {kind} file ({reason}); write it again or remove it"
    )


def identifier(name: str) -> str:
    """Return the name quoted as an SQL identifier."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def quoted(text: str) -> str:
    """Return the text as an SQL string."""
    escaped = text.replace("'", "''")
    return f"'{escaped}'"


def _csv_reader(file: SourceFile, path: Path, infer_types_except: str | None) -> str:
    delimiter, names = _header(file, path)
    common = (
        f"header = true, delim = {quoted(delimiter)}, quote = '\"', escape = '\"', "
        "null_padding = false"
    )
    if infer_types_except is None:
        columns = ", ".join(f"{quoted(name)}: 'VARCHAR'" for name in names)
        return (
            f"read_csv({quoted(str(path))}, auto_detect = false, columns = {{{columns}}}, "
            f"store_rejects = true, {common})"
        )
    names_sql = ", ".join(quoted(name) for name in names)
    return (
        f"read_csv({quoted(str(path))}, auto_detect = true, names = [{names_sql}], "
        f"types = {{{quoted(infer_types_except)}: 'VARCHAR'}}, sample_size = -1, {common})"
    )


def _header(file: SourceFile, path: Path) -> tuple[str, list[str]]:
    try:
        text = read_head(path, _HEAD_BYTES).decode("utf-8-sig", errors="strict")
    except UnicodeDecodeError as error:
        # A multi-byte character cut at the end of the head is no error of the file.
        if error.end < _HEAD_BYTES - 4:
            raise InputError(
                f"{file.name} is not UTF-8 text (byte {error.start}); expected a UTF-8 CSV file"
            ) from None
        text = read_head(path, error.start).decode("utf-8-sig")
    except (OSError, pa.ArrowException) as error:
        raise unreadable(file, error) from error
    if not text.strip():
        raise InputError(f"{file.name} is empty; expected a CSV file with a header line")
    rows: list[tuple[str, list[Any]]] = [
        (delimiter, next(csv.reader(io.StringIO(text), delimiter=delimiter)))
        for delimiter in _DELIMITERS
    ]
    delimiter, names = max(rows, key=lambda row: len(row[1]))
    unique: dict[str, None] = {}
    for position, name in enumerate(names):
        plain = name.strip() or f"column{position}"
        unique[plain if plain not in unique else f"{plain}_{position}"] = None
    return delimiter, list(unique)
