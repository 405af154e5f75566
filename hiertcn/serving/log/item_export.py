"""Writes upserted items as parquet that the next daily run can read beside its items file.

One file per log segment, ``items/part-<segment>.parquet``: ``item_id`` and a column per attribute,
text, double, list of float or list of text; where the items of a segment differ in an attribute's
kind, the column is text. Of an item that was upserted again, the earlier row is taken out of the
file it is in, so that all files together have one row an item. Doing it again after a crash
replaces files and repeats nothing.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hiertcn.events.columns import ITEM_ID
from hiertcn.files import whole_file
from hiertcn.serving.log.logged_items import Attribute, LoggedItem

_log = logging.getLogger(__name__)

ITEMS_FOLDER: Final = "items"


def export_items(items: Sequence[LoggedItem], folder: Path, segment: int) -> None:
    """Write the items of one segment.

    Args:
        items: one version of each item.
        folder: where the files lie.
        segment: number of the log's segment.

    Raises:
        InputError: the disk is full; nothing half-written is left.
    """
    columns: dict[str, pa.Array] = {
        ITEM_ID: pa.array([item.item_id for item in items], pa.string())
    }
    for name in dict.fromkeys(name for item in items for name in item.attributes):
        columns[name] = _column([item.attributes.get(name) for item in items])
    path = folder / f"part-{segment}.parquet"
    with whole_file(path) as aside:
        pq.write_table(pa.table(columns), aside)
    for earlier in sorted(folder.glob("part-*.parquet")):
        if int(earlier.stem.removeprefix("part-")) < segment:
            _take_out(earlier, columns[ITEM_ID])
    _log.info("wrote %d upserted items to %s", len(items), path)


def _take_out(path: Path, newer: pa.Array) -> None:
    with pq.ParquetFile(path) as file:
        if not pc.any(pc.is_in(file.read([ITEM_ID]).column(0), value_set=newer)).as_py():
            return
        table = file.read()
    kept = table.filter(pc.invert(pc.is_in(table.column(ITEM_ID), value_set=newer)))
    if kept.num_rows:
        with whole_file(path) as aside:
            pq.write_table(kept, aside)
    else:
        path.unlink()


def _column(values: Sequence[Attribute | None]) -> pa.Array:
    kinds = {_type_of(value) for value in values if value is not None}
    if len(kinds) > 1:
        return pa.array([None if value is None else _as_text(value) for value in values])
    return pa.array(values, kinds.pop())


def _type_of(value: Attribute) -> pa.DataType:
    if isinstance(value, str):
        return pa.string()
    if isinstance(value, np.ndarray):
        return pa.list_(pa.float32())
    if isinstance(value, tuple):
        return pa.list_(pa.string())
    return pa.float64()


def _as_text(value: Attribute) -> str:
    plain: Any = value.tolist() if isinstance(value, np.ndarray) else value
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
