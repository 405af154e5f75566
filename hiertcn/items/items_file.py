"""Read an items file in batches, aligned to the rows of the item index.

Holds one batch of 4096 items at a time, of the columns asked for only. Items that are not in the
index are passed over; of an item that occurs twice the first occurrence counts.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.dataset
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.events.columns import ITEM_ID
from hiertcn.items.index import IdIndex

_BATCH_ITEMS: Final = 4096


class ItemsFile:
    """A parquet file (or folder of them) with a column ``item_id``, seen through an index.

    Attributes:
        path: where it lies.
        schema: its Arrow schema.
        count: number of rows, indexed or not.
    """

    def __init__(self, path: Path, index: IdIndex) -> None:
        """Open the file; read its footer only.

        Raises:
            InputError: it is missing, is no readable parquet, or has no column ``item_id``.
        """
        self.path = path
        self._index = index
        try:
            self._dataset = pyarrow.dataset.dataset(path, format="parquet")
            self.schema: pa.Schema = self._dataset.schema
            self.count: int = self._dataset.count_rows()
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"the items file {path} cannot be read as parquet ({_first_line(error)}); expected "
                "a complete parquet file, so write it again"
            ) from error
        if ITEM_ID not in self.schema.names:
            raise InputError(
                f"the items file {path} has no column {ITEM_ID!r}; its columns are "
                f"{', '.join(self.schema.names)}"
            )

    def batches(
        self, columns: Sequence[str]
    ) -> Iterator[tuple[NDArray[np.int64], pa.Array, pa.RecordBatch]]:
        """Yield (rows int64 [n], ids [n], the columns [n]) of items in the index, each once.

        Raises:
            InputError: the file cannot be read to its end.
        """
        seen = np.zeros(len(self._index), np.bool_)
        scanner = self._dataset.scanner(
            columns=[ITEM_ID, *columns], batch_size=_BATCH_ITEMS, use_threads=False
        )
        try:
            for batch in scanner.to_batches():
                ids = _as_text(batch.column(0), self.path)
                rows = self._index.rows(ids)
                first = np.zeros(len(rows), np.bool_)
                first[np.unique(rows, return_index=True)[1]] = True
                wanted = first & (rows >= 0)
                wanted[wanted] = ~seen[rows[wanted]]
                seen[rows[wanted]] = True
                mask = pa.array(wanted)
                yield rows[wanted], ids.filter(mask), batch.filter(mask).select(list(columns))
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"the items file {self.path} breaks off while being read ({_first_line(error)}); "
                "write it again"
            ) from error


def _as_text(ids: pa.Array, path: Path) -> pa.Array:
    type_ = ids.type.value_type if pa.types.is_dictionary(ids.type) else ids.type
    if pa.types.is_floating(type_) or pa.types.is_nested(type_):
        raise InputError(
            f"{ITEM_ID!r} in the items file {path} is {ids.type}; expected text or integers"
        )
    return ids.cast(type_).cast(pa.large_string())


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
