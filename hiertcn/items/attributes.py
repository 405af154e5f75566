"""What an items file says of the items in plain values: what filters and titles are read from.

A folder:

    attributes.arrow    Arrow IPC file, memory-mapped: one row per item row, null where the items
                        file has no value or not the item; text is dictionary-encoded
    header.json         the columns and their kinds, why others were not taken, the title's column

By default every column of text, tags (a list of texts), numbers, booleans, dates and times is
taken, but texts that are long on average: nobody filters a description by equality. The encoded
features of an item (:mod:`hiertcn.items.features`) cannot serve for this: they are hashed.

Finding the items that pass a filter reads the column once: milliseconds for 200,000 items.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.events.columns import ITEM_ID
from hiertcn.files import read_json, sha256, whole_directory
from hiertcn.items.attribute_filters import AttributeFilter, Kind, passing
from hiertcn.items.column_choice import VALUES_EXAMINED, is_text
from hiertcn.items.hashed_encodings import not_blank, plain_texts
from hiertcn.items.index import IdIndex
from hiertcn.items.items_file import ItemsFile

TITLE_COLUMNS: Final = ("title", "name")
"""Columns of an items file that are read as a title, the first that is there."""

ITEM_ATTRIBUTES: Final = "item_attributes"
"""The name of a release's part; a release may lack it."""

ATTRIBUTES_FILE: Final = "attributes.arrow"
HEADER_FILE: Final = "header.json"

_FORMAT: Final = 1
_LONG_TEXT_BYTES: Final = 256
_ROW: Final = ""
_TEXT: Final = pa.dictionary(pa.int32(), pa.large_string())
_PLAIN: Final[dict[Kind, pa.DataType]] = {
    "text": pa.large_string(),
    "tags": pa.large_list(pa.large_string()),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
    "time": pa.timestamp("us", tz="UTC"),
}


class ItemAttributes:
    """The attributes of all items, by row; see :meth:`open`.

    Attributes:
        kinds: the kind of each column, in the order of the items file.
        skipped: the columns that were not taken, and why.
    """

    def __init__(
        self, table: pa.Table, kinds: dict[str, Kind], skipped: dict[str, str], title: str | None
    ) -> None:
        """Use :meth:`open`; this only holds the parts."""
        self.kinds = kinds
        self.skipped = skipped
        self._table = table
        self._title = title

    @classmethod
    def write(
        cls,
        directory: Path,
        index: IdIndex,
        items_file: Path | None,
        *,
        columns: Sequence[str] = (),
    ) -> Self:
        """Write the attributes of the indexed items, whole or not at all, and open them.

        Holds the columns taken in memory, twice.

        Args:
            directory: folder to write.
            index: id <-> row.
            items_file: parquet with an ``item_id``; None or a missing file for no attributes.
            columns: what filters may name; empty takes every usable column. The title is taken
                in any case.

        Raises:
            InputError: the file is damaged, or a column named does not exist or holds neither
                text, tags, numbers, booleans nor times.
        """
        file = None
        if items_file is not None and items_file.exists():
            file = ItemsFile(items_file, index)
        elif columns:
            raise InputError(
                f"filter columns are named ({', '.join(columns)}) but there are no items to take "
                "them from; give an items file, or name no columns"
            )
        kinds: dict[str, Kind] = {}
        skipped: dict[str, str] = {}
        title = None
        if file is not None:
            title = next((name for name in TITLE_COLUMNS if name in file.schema.names), None)
            kinds, skipped = _choose(file, columns, title)
        table = _aligned(file, kinds, len(index))
        with whole_directory(directory) as aside:
            with pa.ipc.new_file(aside / ATTRIBUTES_FILE, table.schema) as writer:
                writer.write_table(table)
            header = {
                "format": _FORMAT,
                "items": len(index),
                "columns": kinds,
                "skipped": skipped,
                "title": title if title in kinds else None,
                "bytes": (aside / ATTRIBUTES_FILE).stat().st_size,
                "sha256": sha256(aside / ATTRIBUTES_FILE),
            }
            (aside / HEADER_FILE).write_text(json.dumps(header, indent=2) + "\n")
        return cls.open(directory)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Map the attributes; milliseconds at any size.

        Raises:
            InputError: a file is missing, truncated, or of another format.
        """
        header = read_json(directory / HEADER_FILE)
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise InputError(
                f"{directory / HEADER_FILE} does not describe item attributes of format {_FORMAT}; "
                "run embed_items again"
            )
        path = directory / ATTRIBUTES_FILE
        found = path.stat().st_size if path.is_file() else None
        if found != header["bytes"]:
            raise InputError(
                f"{path} has {'no' if found is None else found} bytes, expected "
                f"{header['bytes']}; restore it or run embed_items again"
            )
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{path} cannot be read as an Arrow file ({error}); restore it or run embed_items "
                "again"
            ) from error
        if table.column_names != [_ROW, *header["columns"]] or len(table) != header["items"]:
            raise InputError(
                f"{path} has {len(table)} items of {', '.join(table.column_names[1:])} but "
                f"{HEADER_FILE} says {header['items']} of {', '.join(header['columns'])}; run "
                "embed_items again"
            )
        return cls(table, header["columns"], header["skipped"], header["title"])

    def __len__(self) -> int:
        return len(self._table)

    def passing(self, condition: AttributeFilter, field: str = "filter") -> NDArray[np.bool_]:
        """Which items pass, bool ``[items]``.

        Args:
            condition: what to pass.
            field: how the condition is called in a request, for errors.

        Raises:
            InputError: there is no such column, or a value is none of its kind.
        """
        kind = self.kinds.get(condition.column)
        if kind is None:
            reason = self.skipped.get(condition.column, "")
            raise InputError(
                f"{field}.column is {condition.column!r}"
                f"{f', which was left out ({reason})' if reason else ''}; the columns to filter by "
                f"are {', '.join(self.kinds) or 'none, as the release has no items file'}"
            )
        return passing(condition, kind, self._column(condition.column), field)

    def titles(self, rows: NDArray[np.int64]) -> list[str | None]:
        """The items' titles, None where there is none.

        Args:
            rows: int64 ``[n]``, item rows.
        """
        if self._title is None:
            return [None] * len(rows)
        titles: list[str | None] = self._column(self._title).take(pa.array(rows)).to_pylist()
        return titles

    def _column(self, name: str) -> pa.Array:
        chunks = self._table.column(name).chunks
        return chunks[0] if chunks else pa.array([], self._table.schema.field(name).type)


def _choose(
    file: ItemsFile, named: Sequence[str], title: str | None
) -> tuple[dict[str, Kind], dict[str, str]]:
    usable = [name for name in file.schema.names if name != ITEM_ID]
    for column in named:
        if column not in usable:
            raise InputError(
                f"the items file {file.path} has no column {column!r} to filter by; its columns "
                f"are {', '.join(usable) or 'none'} (beside {ITEM_ID}), so name some of these"
            )
    kinds: dict[str, Kind] = {}
    skipped: dict[str, str] = {}
    for column in usable:
        type_ = file.schema.field(column).type
        kind = _kind_of(type_)
        if column == title and kind == "text":
            kinds[column] = kind
        elif named and column not in named:
            skipped[column] = "not among the columns named"
        elif kind is None:
            skipped[column] = f"of type {type_}, which cannot be filtered by"
            if named:
                raise InputError(
                    f"the item column {column!r} is {type_} and cannot be filtered by; expected "
                    "text, a list of texts, a number, a boolean or a time"
                )
        else:
            kinds[column] = kind
    if not named:
        for column in _long_texts(file, [name for name in kinds if kinds[name] == "text"]):
            if column != title:
                del kinds[column]
                skipped[column] = f"texts of over {_LONG_TEXT_BYTES} bytes on average"
    return kinds, skipped


def _kind_of(type_: pa.DataType) -> Kind | None:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if is_text(type_):
        return "text"
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return "tags" if is_text(type_.value_type) else None
    if pa.types.is_boolean(type_):
        return "boolean"
    if pa.types.is_integer(type_) and type_ != pa.uint64():
        return "integer"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        return "number"
    return "time" if pa.types.is_date(type_) or pa.types.is_timestamp(type_) else None


def _long_texts(file: ItemsFile, columns: list[str]) -> list[str]:
    sizes = dict.fromkeys(columns, 0)
    counts = dict.fromkeys(columns, 0)
    examined = 0
    for rows, _, batch in file.batches(columns):
        for column in columns:
            texts = plain_texts(batch.column(column))
            sizes[column] += pc.sum(pc.binary_length(texts)).as_py() or 0
            counts[column] += len(texts) - texts.null_count
        examined += len(rows)
        if examined >= VALUES_EXAMINED:
            break
    return [name for name in columns if sizes[name] > _LONG_TEXT_BYTES * counts[name]]


def _aligned(file: ItemsFile | None, kinds: dict[str, Kind], items: int) -> pa.Table:
    batches = list(file.batches(list(kinds))) if file is not None and kinds else []
    order = np.full(items, -1)
    if batches:
        rows = np.concatenate([rows for rows, _, _ in batches])
        order[rows] = np.arange(len(rows))
    places = pa.array(order, mask=order < 0)
    # A table of no column would have no length.
    columns: dict[str, pa.Array] = {_ROW: pa.nulls(items)}
    for column, kind in kinds.items():
        values = [_stored(batch.column(column), kind) for _, _, batch in batches]
        found = pa.concat_arrays(values) if values else pa.array([], _PLAIN[kind])
        taken = found.take(places)
        columns[column] = taken.dictionary_encode().cast(_TEXT) if kind == "text" else taken
    return pa.table(columns)


def _stored(values: pa.Array, kind: Kind) -> pa.Array:
    if kind == "text":
        texts = plain_texts(values)
        return pc.if_else(pa.array(not_blank(texts)), texts, pa.scalar(None, texts.type))
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    stored = values.cast(_PLAIN[kind], safe=False)
    if kind == "number":
        stored = pc.if_else(pc.is_nan(stored), pa.scalar(None, stored.type), stored)
    return stored
