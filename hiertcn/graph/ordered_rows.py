"""What an ordered query of either engine comes back as."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


class OrderedRows:
    """The result of an ordered query, in files; whoever asked for it reads it once."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows in order, at most ``rows`` at a time."""
        for path in self._files:
            with pq.ParquetFile(path) as file:
                yield from file.iter_batches(batch_size=rows)
