"""The items file: one row per item, all given columns kept, and which items an option selects.

CSV columns get inferred types, except the id, which stays text; a CSV column of ``[0.1, 0.2]``
texts becomes a list of floats. Feature values are not checked here.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import duckdb

from hiertcn.errors import InputError
from hiertcn.events.columns import ITEM_ID
from hiertcn.events.options import IngestOptions
from hiertcn.events.scan import ROW, Scan, identifier, quoted, require_columns, scan, unreadable
from hiertcn.events.source import SourceFile
from hiertcn.events.staging import out_of_memory, text_id


@dataclass(frozen=True)
class CatalogueSummary:
    """What became of the items file's rows."""

    rows: int
    items: int
    duplicates: int
    null_ids: int


def write_catalogue(
    connection: duckdb.DuckDBPyConnection,
    files: list[SourceFile],
    options: IngestOptions,
    output: Path,
    scratch: Path,
) -> CatalogueSummary:
    """Write ``output`` (parquet, sorted as given) and the table ``wanted_items`` (item_id).

    The first row of an item is kept. The id column is ``options.item_column``, or ``item_id`` if
    there is none of that name; it is written as ``item_id``.

    Raises:
        InputError: a file is incomplete, has no id column, or the item filter names a column that
            is missing or not boolean.
    """
    with contextlib.ExitStack() as stack:
        selects = []
        for file_id, file in enumerate(files):
            folder = scratch / f"items-{file_id}"
            folder.mkdir()
            path = stack.enter_context(file.local(folder))
            selects.append(_select(connection, file, path, file_id, options))
        union = " UNION ALL BY NAME ".join(selects)
        try:
            connection.execute(
                f"CREATE TABLE item_rows AS SELECT {ITEM_ID}, file_id, {ROW} FROM ({union})"
            )
            connection.execute(
                f"CREATE TABLE first_rows AS SELECT {ITEM_ID}, min(struct_pack(file_id := file_id,"
                f" source_row := {ROW})) AS first FROM item_rows WHERE {ITEM_ID} IS NOT NULL "
                f"GROUP BY {ITEM_ID}"
            )
            connection.execute(
                f"COPY (SELECT given.* EXCLUDE (file_id, {ROW}) FROM ({union}) AS given "
                f"JOIN first_rows ON given.{ITEM_ID} = first_rows.{ITEM_ID} "
                f"AND given.file_id = first.file_id AND given.{ROW} = first.source_row "
                f"ORDER BY given.file_id, given.{ROW}) "
                f"TO {quoted(str(output))} (FORMAT parquet, COMPRESSION zstd)"
            )
        except duckdb.OutOfMemoryException as error:
            raise out_of_memory(options.memory_limit, error) from error
        except duckdb.Error as error:
            raise unreadable(files[0], error) from error
    summary = connection.execute(
        f"SELECT count(*), count({ITEM_ID}), count(DISTINCT {ITEM_ID}) FROM item_rows"
    ).fetchone()
    assert summary is not None
    rows, named, items = map(int, summary)
    if not items:
        raise InputError(
            f"{files[0].name} has no item with an id; expected one row per item, or give no items "
            "file"
        )
    if options.item_filter:
        _select_wanted(connection, output, options.item_filter, files[0].name)
    return CatalogueSummary(rows=rows, items=items, duplicates=named - items, null_ids=rows - named)


def _select(
    connection: duckdb.DuckDBPyConnection,
    file: SourceFile,
    path: Path,
    file_id: int,
    options: IngestOptions,
) -> str:
    source = scan(connection, file, path)
    column = options.item_column if options.item_column in source.types else ITEM_ID
    require_columns(source, {column: "item_column"})
    if not file.is_parquet:
        source = scan(connection, file, path, infer_types_except=column)
    replacements = [
        f"{identifier(name)}::FLOAT[] AS {identifier(name)}"
        for name in _float_list_columns(connection, source, column)
    ]
    others = f"* EXCLUDE ({identifier(column)})"
    if replacements:
        others += f" REPLACE ({', '.join(replacements)})"
    return (
        f"SELECT {text_id(source, column, 'item_column')} AS {ITEM_ID}, {others}, "
        f"{file_id} AS file_id FROM {source.relation}"
    )


def _float_list_columns(
    connection: duckdb.DuckDBPyConnection, source: Scan, id_column: str
) -> list[str]:
    texts = (
        []
        if source.file.is_parquet
        else [
            name for name, kind in source.types.items() if kind == "VARCHAR" and name != id_column
        ]
    )
    if not texts:
        return []
    tests = ", ".join(
        f"coalesce(bool_and(try_cast({identifier(name)} AS FLOAT[]) IS NOT NULL) "
        f"FILTER ({identifier(name)} IS NOT NULL), false)"
        for name in texts
    )
    try:
        row = connection.execute(f"SELECT {tests} FROM {source.relation}").fetchone()
    except duckdb.Error as error:
        raise unreadable(source.file, error) from error
    assert row is not None
    return [name for name, is_list in zip(texts, row, strict=True) if is_list]


def _select_wanted(
    connection: duckdb.DuckDBPyConnection, catalogue: Path, item_filter: str, given: str
) -> None:
    column, separator, value = item_filter.partition("=")
    reader = f"read_parquet({quoted(str(catalogue))})"
    described = connection.execute(f"DESCRIBE SELECT * FROM {reader}").fetchall()
    types = {str(name): str(kind) for name, kind, *_ in described}
    if column not in types:
        raise InputError(
            f"item_filter names {column!r}, which {given} does not have (it has "
            f"{', '.join(types)}); name one of these"
        )
    if separator:
        condition = f"{identifier(column)}::VARCHAR = {quoted(value)}"
    elif types[column] == "BOOLEAN":
        condition = identifier(column)
    else:
        raise InputError(
            f"item_filter names {column!r}, which is {types[column]} in {given}; expected a "
            "boolean column, or column=value"
        )
    connection.execute(
        f"CREATE TABLE wanted_items AS SELECT {ITEM_ID} FROM {reader} WHERE {condition}"
    )
