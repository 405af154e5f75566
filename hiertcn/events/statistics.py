"""Table 1 of the HierTCN paper for any ingested log.

One window pass over users and times in DuckDB, which spills to disk above its memory limit.
Standard deviations are the population's; impressions are counted over the events that have them.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import duckdb

from hiertcn.errors import InputError
from hiertcn.events.columns import IMPRESSIONS, ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.events.scan import connect, quoted
from hiertcn.events.staging import out_of_memory


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation."""

    mean: float
    std: float


@dataclass(frozen=True, kw_only=True)
class LogStatistics:
    """The rows of Table 1; impressions are None where the log has none."""

    users: int
    items: int
    interactions: int
    impressions: int | None
    sessions: int
    impressions_per_event: Spread | None
    impressions_per_session: Spread | None
    events_per_session: Spread
    sessions_per_user: Spread
    events_per_user: Spread
    impressions_per_user: Spread | None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON types."""
        return asdict(self)


PAPER_XING: Final = LogStatistics(
    users=65_347,
    items=20_778,
    interactions=1_450_300,
    impressions=None,
    sessions=535_747,
    impressions_per_event=None,
    impressions_per_session=None,
    events_per_session=Spread(2.5, 3.8),
    sessions_per_user=Spread(8.2, 7.0),
    events_per_user=Spread(22.2, 20.8),
    impressions_per_user=None,
)
PAPER_PINTEREST: Final = LogStatistics(
    users=5_923_659,
    items=74_202_787,
    interactions=56_050_857,
    impressions=1_685_877_684,
    sessions=23_354_523,
    impressions_per_event=Spread(9.8, 8.6),
    impressions_per_session=Spread(25.8, 51.1),
    events_per_session=Spread(2.4, 3.0),
    sessions_per_user=Spread(3.9, 4.7),
    events_per_user=Spread(9.7, 13.4),
    impressions_per_user=Spread(284.6, 252.0),
)


def log_statistics(
    events: Path, *, session_gap_s: float = 1800.0, memory_limit: str = "4GB"
) -> LogStatistics:
    """Compute the statistics of an events folder (``date=YYYY-MM-DD/*.parquet``).

    A session ends where a user's next event comes more than ``session_gap_s`` seconds later.

    Raises:
        InputError: the folder holds no events, or they do not fit memory and disk.
    """
    with tempfile.TemporaryDirectory(prefix="hiertcn-statistics-") as scratch:
        connection = connect(Path(scratch), memory_limit)
        try:
            return statistics_through(connection, Path(events), session_gap_s=session_gap_s)
        except duckdb.OutOfMemoryException as error:
            raise out_of_memory(memory_limit, error) from error
        except duckdb.Error as error:
            reason = str(error).split("\n", maxsplit=1)[0]
            raise InputError(
                f"{events} cannot be read as an events folder ({reason}); expected "
                "date=YYYY-MM-DD/*.parquet as ingest writes them"
            ) from error
        finally:
            connection.close()


def statistics_through(
    connection: duckdb.DuckDBPyConnection, events: Path, *, session_gap_s: float
) -> LogStatistics:
    """Compute ``log_statistics`` through a connection that is open already.

    Raises:
        InputError: the folder holds no events.
        duckdb.Error: it cannot be read, or memory and disk do not suffice.
    """
    reader = f"read_parquet({quoted(f'{events}/*/*.parquet')}, hive_partitioning = false)"
    columns = {row[0] for row in connection.execute(f"DESCRIBE SELECT * FROM {reader}").fetchall()}
    shown = f"len({IMPRESSIONS})" if IMPRESSIONS in columns else "NULL::BIGINT"
    gap_us = round(session_gap_s * 1e6)
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE sessions AS
        WITH steps AS (
            SELECT {USER_ID}, {shown} AS shown, epoch_us({TIMESTAMP}) AS time_us,
                time_us - lag(time_us) OVER (PARTITION BY {USER_ID} ORDER BY time_us) AS pause
            FROM {reader}
        ), numbered AS (
            SELECT {USER_ID}, shown, sum((pause IS NOT NULL AND pause > {gap_us})::INT) OVER (
                PARTITION BY {USER_ID} ORDER BY time_us ROWS UNBOUNDED PRECEDING) AS session
            FROM steps
        )
        SELECT {USER_ID}, session, count(*) AS events, sum(shown) AS shown,
            sum(shown * shown) AS shown_squared, count(shown) AS events_with_shown
        FROM numbered GROUP BY {USER_ID}, session
        """
    )
    row = connection.execute(
        f"""
        WITH users AS (
            SELECT count(*) AS sessions, sum(events) AS events, sum(shown) AS shown
            FROM sessions GROUP BY {USER_ID}
        )
        SELECT
            (SELECT count(*) FROM users), (SELECT count(DISTINCT {ITEM_ID}) FROM {reader}),
            sum(events), sum(shown), count(*), sum(events_with_shown), sum(shown_squared),
            avg(shown), stddev_pop(shown), avg(events), stddev_pop(events),
            (SELECT {{'a': avg(sessions), 'b': stddev_pop(sessions), 'c': avg(events),
                'd': stddev_pop(events), 'e': avg(shown), 'f': stddev_pop(shown)}} FROM users)
        FROM sessions
        """
    ).fetchone()
    if row is None or not row[0]:
        raise InputError(f"{events} holds no events; ingest a log first")
    users, items, interactions, impressions, sessions, with_shown, squared = row[:7]
    per_user = row[11]
    per_event = None
    if impressions is not None:
        mean = float(impressions) / with_shown
        per_event = Spread(mean, max(float(squared) / with_shown - mean**2, 0.0) ** 0.5)
    return LogStatistics(
        users=int(users),
        items=int(items),
        interactions=int(interactions),
        impressions=None if impressions is None else int(impressions),
        sessions=int(sessions),
        impressions_per_event=per_event,
        impressions_per_session=_spread(row[7], row[8]),
        events_per_session=Spread(float(row[9]), float(row[10])),
        sessions_per_user=Spread(float(per_user["a"]), float(per_user["b"])),
        events_per_user=Spread(float(per_user["c"]), float(per_user["d"])),
        impressions_per_user=_spread(per_user["e"], per_user["f"]),
    )


def _spread(mean: float | None, std: float | None) -> Spread | None:
    return None if mean is None or std is None else Spread(float(mean), float(std))
