"""The engine that graph queries run on: DuckDB, out of core in this process, or Spark.

Queries are Ibis expressions and know neither; both engines give the same rows. What differs is
here: how parquet is read, what XXH64 is called, and how an ordered result comes back without
passing through memory as a whole.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import duckdb
import ibis
import ibis.expr.datatypes as dt
import numpy as np
import pyarrow as pa

from hiertcn.errors import InputError
from hiertcn.events.columns import DATE, ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.graph.log_fingerprints import HASH_SEED
from hiertcn.graph.options import GraphOptions
from hiertcn.graph.ordered_rows import OrderedRows
from hiertcn.items.hashing import xxh64

_SPILL_PREFIX: Final = ".spill-"
_LOCK_FILE: Final = "lock"


class GraphEngine(Protocol):
    """What graph queries need of an engine."""

    def read_events(self, files: Sequence[Path]) -> ibis.Table:
        """Return a log's rows: user_id, item_id and ``at``, int64 microseconds since 1970 UTC."""
        ...

    def read_dated(self, folder: Path, files: Sequence[Path]) -> ibis.Table:
        """Return the rows of ``folder/date=YYYY-MM-DD/*``, with ``date`` as a text column."""
        ...

    def ordered(self, expression: ibis.Table) -> contextlib.AbstractContextManager[OrderedRows]:
        """Compute an ordered expression; the rows lie on disk until the block ends."""
        ...


@contextlib.contextmanager
def connect(options: GraphOptions, spill_beside: Path) -> Iterator[GraphEngine]:
    """Yield the engine of ``options``; its spill folder lies beside ``spill_beside``.

    The folder goes at the end; one that a killed process left goes at the next start.

    Raises:
        InputError: the engine is not installed or refuses its limits, or memory or disk ran out
            inside the block.
    """
    with spill_folder(spill_beside.parent) as spill:
        if options.engine == "spark":
            from hiertcn.graph.spark import connect_spark

            with connect_spark(options, spill) as spark:
                yield spark
        else:
            with _connect_duckdb(options, spill) as engine:
                yield engine


class DuckDBEngine:
    """DuckDB inside this process."""

    def __init__(self, backend: Any, spill: Path) -> None:
        self._backend = backend
        self._spill = spill
        # Spark has a function of this name and seed.
        backend.con.create_function("xxhash64", _xxhash64, ["VARCHAR"], "BIGINT", type="arrow")

    def read_events(self, files: Sequence[Path]) -> ibis.Table:
        """See :class:`GraphEngine`."""
        table = self._backend.read_parquet([str(file) for file in files], hive_partitioning=False)
        return table.select(USER_ID, ITEM_ID, at=_epoch_us(table[TIMESTAMP]))

    def read_dated(self, folder: Path, files: Sequence[Path]) -> ibis.Table:
        """See :class:`GraphEngine`."""
        table = self._backend.read_parquet([str(file) for file in files], hive_partitioning=True)
        return table.mutate(**{DATE: table[DATE].cast("string")})

    @contextlib.contextmanager
    def ordered(self, expression: ibis.Table) -> Iterator[OrderedRows]:
        """See :class:`GraphEngine`.

        Through a file: Ibis 12 asks DuckDB 2 for a reader that it no longer has.
        """
        with tempfile.TemporaryDirectory(prefix="rows-", dir=self._spill) as folder:
            path = Path(folder) / "rows.parquet"
            self._backend.to_parquet(expression, path)
            yield OrderedRows([path])


@contextlib.contextmanager
def _connect_duckdb(options: GraphOptions, spill: Path) -> Iterator[DuckDBEngine]:
    settings: dict[str, Any] = {
        "memory_limit": options.memory_limit,
        "temp_directory": str(spill),
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
        yield DuckDBEngine(backend, spill)
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"the graph query ran out of its memory_limit of {options.memory_limit} or of disk "
            f"under {spill.parent} ({_first_line(error)}); raise memory_limit, free "
            "disk space, or choose the engine compiled, which needs less"
        ) from error
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        raise InputError(
            f"the graph query could not read or write a file ({_first_line(error)}); restore "
            "or rebuild the file it names, or free disk space, and run again"
        ) from error
    finally:
        backend.disconnect()


@contextlib.contextmanager
def spill_folder(beside: Path) -> Iterator[Path]:
    """Yield a folder in ``beside`` that goes at the end; those that killed processes left go now.

    It is locked while in use, so that the next process knows a dead one's.
    """
    beside.mkdir(parents=True, exist_ok=True)
    for old in beside.glob(f"{_SPILL_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(old):
            shutil.rmtree(old, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(
            prefix=_SPILL_PREFIX, dir=beside, ignore_cleanup_errors=True
        ) as spill,
        _locked(Path(spill)),
    ):
        yield Path(spill)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file; OSError if another process does."""
    descriptor = os.open(folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@ibis.udf.scalar.builtin(name="epoch_us")  # type: ignore[untyped-decorator]
def _epoch_us(at: dt.Timestamp(timezone="UTC")) -> int:  # type: ignore[empty-body,valid-type]
    """DuckDB's own function."""


def _xxhash64(texts: Any) -> pa.Array:
    """XXH64 of a chunked string array, as int64."""
    return pa.array(xxh64(texts.combine_chunks().cast(pa.large_string()), HASH_SEED).view(np.int64))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
