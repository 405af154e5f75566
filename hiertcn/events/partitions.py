"""Date-partitioned parquet that is written a little at a time.

Rows wait in memory until the budget is reached; then each date's rows are written as one more row
group of its file. Memory is bounded by the budget whatever the number of dates or rows.
"""

import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hiertcn.events.columns import DATE


class PartitionWriter:
    """Writes tables to ``directory/date=YYYY-MM-DD/part-0.parquet``, sorted by nothing.

    Rows of one date keep the order in which they were added. Close it (or use it as a context
    manager), else the last rows and the files' footers are missing.
    """

    def __init__(self, directory: Path, *, rows_in_memory: int = 1_000_000) -> None:
        self._directory = directory
        self._budget = rows_in_memory
        self._waiting: dict[str, list[pa.Table]] = {}
        self._waiting_rows = 0
        self._writers: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> "PartitionWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def add(self, date: str, table: pa.Table) -> None:
        """Add rows of one date (``YYYY-MM-DD``)."""
        self._waiting.setdefault(date, []).append(table)
        self._waiting_rows += table.num_rows
        if self._waiting_rows > self._budget:
            self._flush()

    def close(self) -> None:
        """Write what waits and close all files."""
        self._flush()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _flush(self) -> None:
        # All dates at once: added tables may be slices, and one left waiting would keep the
        # memory of its whole parent alive.
        for date, tables in sorted(self._waiting.items()):
            if date not in self._writers:
                folder = self._directory / f"{DATE}={date}"
                folder.mkdir(parents=True, exist_ok=True)
                self._writers[date] = pq.ParquetWriter(
                    folder / "part-0.parquet", tables[0].schema, compression="zstd"
                )
            self._writers[date].write_table(pa.concat_tables(tables))
        self._waiting.clear()
        self._waiting_rows = 0


def date_text(start: datetime.date, days: int) -> str:
    """Return the date ``days`` after ``start`` as ``YYYY-MM-DD``."""
    return (start + datetime.timedelta(days=days)).isoformat()
