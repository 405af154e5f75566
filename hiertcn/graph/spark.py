"""Spark as the engine of graph queries: in this process, at a master, or through Spark Connect.

Spark reads the log itself and takes ids as they are: a cluster should not wait for one process to
number them. Ordered results are written by Spark as sorted parts into the spill folder and read
from there, so nothing passes through the driver as a whole; Spark on other machines must therefore
see the log's and the store's folders under the same paths.

A Spark session that already runs in the process is used and left running, whatever
``spark_master`` says; one that is started here is stopped at the end.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import ibis

from hiertcn.errors import InputError
from hiertcn.events.columns import DATE, ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.graph.options import GraphOptions
from hiertcn.graph.ordered_rows import OrderedRows

_CONNECT: Final = "sc://"


class SparkEngine:
    """See :class:`hiertcn.graph.engine.GraphEngine`."""

    def __init__(self, session: Any, spill: Path) -> None:
        self._session = session
        self._backend = ibis.pyspark.connect(session)
        self._spill = spill
        self._names = itertools.count()

    def read_events(self, files: Sequence[Path]) -> ibis.Table:
        """See :class:`hiertcn.graph.engine.GraphEngine`."""
        frame = self._session.read.parquet(*map(str, files))
        at = f"unix_micros(cast({TIMESTAMP} as timestamp)) as at"
        return self._view(frame.selectExpr(USER_ID, ITEM_ID, at))

    def read_dated(self, folder: Path, files: Sequence[Path]) -> ibis.Table:
        """See :class:`hiertcn.graph.engine.GraphEngine`."""
        reader = self._session.read.option("basePath", str(folder))
        table = self._view(reader.parquet(*map(str, files)))
        return table.mutate(**{DATE: table[DATE].cast("string")})

    @contextlib.contextmanager
    def ordered(self, expression: ibis.Table) -> Iterator[OrderedRows]:
        """See :class:`hiertcn.graph.engine.GraphEngine`."""
        with tempfile.TemporaryDirectory(prefix="rows-", dir=self._spill) as folder:
            parts = Path(folder) / "parts"
            self._backend.to_parquet(expression, parts)
            # Sorting cuts the rows into ranges, and a part's number is its range's.
            yield OrderedRows(sorted(parts.glob("part-*.parquet")))

    def _view(self, frame: Any) -> ibis.Table:
        name = f"hiertcn_{id(self)}_{next(self._names)}"
        frame.createOrReplaceTempView(name)
        return self._backend.table(name)


@contextlib.contextmanager
def connect_spark(options: GraphOptions, spill: Path) -> Iterator[SparkEngine]:
    """Yield the engine at ``options.spark_master``.

    Raises:
        InputError: pyspark or Java is missing, the master cannot be reached, or a query failed
            inside the block.
    """
    try:
        import pyspark  # noqa: F401
        from py4j.protocol import Py4JError  # type: ignore[import-untyped]
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise InputError(
            f"the graph engine spark needs the extra spark ({error}); install "
            "'hiertcn[spark]' or choose the engine compiled"
        ) from error
    running = SparkSession.getActiveSession()
    try:
        session = running or _start(SparkSession.builder, options)
    except (PySparkException, Py4JError, OSError) as error:
        raise InputError(
            f"Spark at {options.spark_master or 'this machine'} could not be started "
            f"({_reason(error)}); expected a reachable master, or Java 17 or later "
            "and a memory_limit that it can start with here"
        ) from error
    zone = session.conf.get("spark.sql.session.timeZone")
    try:
        # Else a UTC day would begin at this machine's midnight.
        session.conf.set("spark.sql.session.timeZone", "UTC")
        yield SparkEngine(session, spill)
    except (PySparkException, Py4JError) as error:
        raise InputError(
            f"the graph query failed on Spark ({_reason(error)}); see Spark's log, and check "
            "that it sees the log's and the store's folders under the same paths and has room "
            "in memory and on disk"
        ) from error
    finally:
        if running:
            session.conf.set("spark.sql.session.timeZone", zone)
        else:
            session.stop()


def _start(builder: Any, options: GraphOptions) -> Any:
    builder = builder.appName("hiertcn item graph")
    if options.spark_master.startswith(_CONNECT):
        return builder.remote(options.spark_master).getOrCreate()
    local = f"local[{options.threads or '*'}]"
    builder = builder.master(options.spark_master or local)
    if not options.spark_master:
        builder = (
            # The unit is Java's, which knows no "b".
            builder.config("spark.driver.memory", f"{options.memory_bytes >> 20}m")
            .config("spark.ui.enabled", "false")
            .config("spark.driver.bindAddress", "127.0.0.1")
            .config("spark.driver.host", "127.0.0.1")
        )
    return builder.getOrCreate()


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Of an error in Java, the first line only says which call it was.
    return next((line[2:] for line in lines if line.startswith(": ")), lines[0])
