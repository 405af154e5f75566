"""What a graph build can be told: one options object for edges, merge and engine."""

import datetime
import os
import re
from dataclasses import dataclass
from typing import Final

from hiertcn.errors import InputError

ENGINES: Final = ("compiled", "duckdb", "spark")

_SECONDS_PER_DAY = 86_400
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """How co-interactions become edges.

    Attributes:
        window_s: seconds; two interactions of one user at most this far apart make an edge.
        max_followers: an event is paired with at most this many next events of its user.
        window_days: days of partitions merged, counting back from ``as_of``.
        half_life_days: days after which a co-interaction weighs half; 0 means no decay.
        top_n: neighbors kept per item, by weight.
        as_of: newest date merged, ``YYYY-MM-DD``; empty means the newest partition's date.
        memory_limit: what events and pairs, DuckDB or a local Spark may hold in memory, such as
            ``4GB``; the rest spills to disk. What Python holds beside it comes on top.
        threads: of this process and of DuckDB or a local Spark; 0 means one per core.
        engine: what counts co-interactions: ``compiled`` code of this process, or a query on
            ``duckdb`` or ``spark``; all give the same edges and counts.
        spark_master: where Spark runs: a master URL such as ``spark://host:7077`` or ``yarn``, or
            a Spark Connect URL ``sc://host:15002``; empty means inside this process. A Spark that
            runs elsewhere must see the log's and the store's folders under the same paths.
        chunk_events: events per query while partitions are built (a day is never divided).
    """

    window_s: float = 600.0
    max_followers: int = 20
    window_days: int = 90
    half_life_days: float = 30.0
    top_n: int = 50
    as_of: str = ""
    memory_limit: str = "4GB"
    threads: int = 0
    engine: str = "compiled"
    spark_master: str = ""
    chunk_events: int = 5_000_000

    def __post_init__(self) -> None:
        if not 0 < self.window_s <= _SECONDS_PER_DAY:
            raise InputError(
                f"window_s is {self.window_s}; expected seconds, above 0 and at most "
                f"{_SECONDS_PER_DAY} (one day)"
            )
        for name in ("max_followers", "window_days", "top_n", "chunk_events"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not 0 <= self.half_life_days < float("inf"):
            raise InputError(
                f"half_life_days is {self.half_life_days}; expected days, 0 (no decay) or more"
            )
        if self.threads < 0:
            raise InputError(
                f"threads is {self.threads}; expected 0 (one per core) or a number of threads"
            )
        if self.engine not in ENGINES:
            raise InputError(f"engine is {self.engine!r}; expected compiled, duckdb or spark")
        if self.spark_master and self.engine != "spark":
            raise InputError(
                f"spark_master is {self.spark_master!r} but the engine is {self.engine}; choose "
                "the engine spark, or leave spark_master empty"
            )
        if self.as_of:
            try:
                datetime.date.fromisoformat(self.as_of)
            except ValueError:
                raise InputError(
                    f"as_of is {self.as_of!r}; expected a date as YYYY-MM-DD or nothing"
                ) from None

    @property
    def thread_count(self) -> int:
        """``threads``, or the number of cores."""
        return self.threads or os.cpu_count() or 1

    @property
    def memory_bytes(self) -> int:
        """``memory_limit`` in bytes.

        Raises:
            InputError: it is not a number and a unit.
        """
        match = _SIZE.fullmatch(self.memory_limit.strip())
        if not match:
            raise InputError(
                f"memory_limit is {self.memory_limit!r}; expected a number and a unit, such as "
                "'4GB'"
            )
        base = 1024 if match[3] else 1000
        return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
