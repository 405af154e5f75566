"""What items are called in examples: their id, with a title where the items file has one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hiertcn.events.columns import ITEM_ID
from hiertcn.items.attributes import TITLE_COLUMNS
from hiertcn.items.index import IdIndex

_LONGEST_TITLE: Final = 60


def item_texts(
    index: IdIndex, items_file: Path | None = None
) -> Callable[[NDArray[np.int64]], Sequence[str]]:
    """Return a function from item rows int64 [n] to texts; one call is one scan of the items file.

    Args:
        index: id <-> row.
        items_file: parquet with an ``item_id``; None or a missing file for ids alone.
    """
    title = None
    if items_file is not None and items_file.exists():
        columns = pq.read_schema(items_file).names
        title = next((name for name in TITLE_COLUMNS if name in columns), None)

    def texts(rows: NDArray[np.int64]) -> list[str]:
        ids = index.ids(rows)
        if title is None or not ids:
            return ids
        with duckdb.connect() as connection:
            connection.register("wanted", pa.table({ITEM_ID: pa.array(sorted(set(ids)))}))
            found = connection.execute(
                f"SELECT items.{ITEM_ID}::VARCHAR, any_value(items.{title}::VARCHAR) "
                f"FROM read_parquet(?) AS items SEMI JOIN wanted "
                f"ON items.{ITEM_ID}::VARCHAR = wanted.{ITEM_ID} GROUP BY 1",
                [str(items_file)],
            ).fetchall()
        titles = {item: _shortened(text) for item, text in found if text}
        return [f"{item}: {titles[item]}" if item in titles else item for item in ids]

    return texts


def _shortened(title: str) -> str:
    title = " ".join(title.split())
    return title if len(title) <= _LONGEST_TITLE else title[: _LONGEST_TITLE - 1].rstrip() + "…"
