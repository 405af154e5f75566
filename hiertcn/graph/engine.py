"""The DuckDB connection that graph queries run on: bounded memory, spilling beside the output.

Queries themselves are Ibis expressions and know nothing of DuckDB.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import duckdb
import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from hiertcn.errors import InputError
from hiertcn.graph.options import GraphOptions

_SPILL_FOLDER: Final = "SELECT current_setting('temp_directory')"


@contextlib.contextmanager
def connect(options: GraphOptions, spill_beside: Path) -> Iterator[Any]:
    """Yield an Ibis backend whose spill folder lies beside ``spill_beside`` and goes at the end.

    Raises:
        InputError: the limits are not DuckDB's, or memory or disk ran out inside the block.
    """
    spill_beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".spill-", dir=spill_beside.parent) as spill:
        settings: dict[str, Any] = {
            "memory_limit": options.memory_limit,
            "temp_directory": spill,
            # Results come ordered by explicit ORDER BY only; this lets big queries stream.
            "preserve_insertion_order": False,
        }
        if options.threads:
            settings["threads"] = options.threads
        try:
            backend: Any = ibis.duckdb.connect(**settings)
        except duckdb.Error as error:
            raise InputError(
                f"DuckDB refused memory_limit {options.memory_limit!r} and threads "
                f"{options.threads} ({_first_line(error)}); expected a size such as '4GB'"
            ) from error
        try:
            # Else a UTC day would begin at this machine's midnight.
            backend.raw_sql("SET TimeZone = 'UTC'")
            backend.raw_sql("SET enable_progress_bar = false")
            yield backend
        except duckdb.OutOfMemoryException as error:
            raise InputError(
                f"the graph query ran out of its memory_limit of {options.memory_limit} or of disk "
                f"under {spill_beside.parent} ({_first_line(error)}); raise memory_limit, free "
                "disk space, or lower chunk_events"
            ) from error
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            raise InputError(
                f"the graph query could not read or write a file ({_first_line(error)}); restore "
                "or rebuild the file it names and run again"
            ) from error
        finally:
            backend.disconnect()


def ordered_batches(
    backend: Any, expression: ibis.Table, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Yield an ordered expression's rows in batches of at most ``batch_rows``, in its order.

    They pass through a parquet file in a temporary folder: Ibis 12 asks DuckDB 2 for a reader
    that it no longer has, and a file bounds memory on any engine.
    """
    with tempfile.TemporaryDirectory(
        prefix=".rows-", dir=backend.raw_sql(_SPILL_FOLDER).fetchone()[0]
    ) as folder:
        path = Path(folder) / "rows.parquet"
        backend.to_parquet(expression, path)
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=batch_rows)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
