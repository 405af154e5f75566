"""From a log to the item graph: time and memory, a new day's share, and a plain self-join beside.

    python -m benchmarks.graph_build [--events 20000000] [--memory 4GB 1GB] [--json PATH]

The log is drawn: sessions of 2.4 events on average (HierTCN's Table 1), a minute apart, 1 M users
drawn evenly and 200 k items by Zipf's law, over ten days, as ingest would write it, with text ids.
Each memory limit runs in a process of its own, so that its peak resident memory (with Python,
pyarrow and numba in it) can be told. "New day" drops the newest day's partition and
builds again. The alternative counts the same pairs of the newest day with DuckDB's self-join of
the day's events on the user. ``--events 200000000 --users 10000000 --memory 6GB`` is the large one.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hiertcn.files import write_json
from hiertcn.graph.csr import CSR
from hiertcn.graph.edges import build_edges, event_files, partition_path
from hiertcn.graph.merge import merge_edges
from hiertcn.graph.options import GraphOptions
from hiertcn.items.index import IdIndex

_DAY_US: Final = 86_400_000_000
_SESSION_EVENTS: Final = 2.4
_PAUSE_US: Final = 60e6
_TOP: Final = 50


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--days", type=int, default=10)
    parser.add_argument(
        "--memory", nargs="+", default=["4GB", "1GB"], help="limits on events and pairs"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--engine", choices=("compiled", "duckdb", "spark"), default="compiled")
    parser.add_argument("--folder", type=Path, help="where the log goes (default: temporary)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", metavar="LIMIT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        options = GraphOptions(
            memory_limit=arguments.measure,
            threads=arguments.threads,
            top_n=_TOP,
            engine=arguments.engine,
        )
        print(json.dumps(_measure(arguments.folder, options)))
        return
    with TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        draw_log(folder, arguments.events, arguments.users, arguments.items, arguments.days)
        figures: dict[str, Any] = {
            "events": arguments.events,
            "users": arguments.users,
            "items": arguments.items,
            "engine": arguments.engine,
        }
        for limit in arguments.memory:
            figures[limit] = _in_a_process(folder, limit, arguments.threads, arguments.engine)
            _show(limit, figures[limit])
        figures["self_join"] = _self_join(folder, arguments.threads)
        print(f"self-join of the newest day: {figures['self_join']}")
    if arguments.json:
        write_json(arguments.json, figures)


def draw_log(folder: Path, events: int, users: int, items: int, days: int, seed: int = 0) -> None:
    """Write ``events`` by day and the ``index`` of all items into the folder."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, items + 1)
    cumulated = np.cumsum(shares) / shares.sum()
    ids = pa.array([f"item-{row}" for row in rng.permutation(items)])
    IdIndex.build(ids, folder / "index")
    count = events // days
    for day in range(days):
        starts = rng.random(count) < 1 / _SESSION_EVENTS
        starts[0] = True
        session = np.cumsum(starts) - 1
        user = rng.integers(0, users, session[-1] + 1)[session]
        pauses = np.where(starts, 0.0, rng.exponential(_PAUSE_US, count))
        elapsed = np.cumsum(pauses)
        began = rng.random(session[-1] + 1) * _DAY_US * 0.99
        at = began[session] + elapsed - elapsed[starts][session]
        at_us = np.minimum(at, _DAY_US - 1).astype(np.int64)
        item = np.searchsorted(cumulated, rng.random(count)).clip(0, items - 1)
        order = np.lexsort((at_us, user))
        date = np.datetime64("2026-01-01") + day
        midnight = date.astype("datetime64[us]").astype(np.int64)
        names = pc.binary_join_element_wise("user-", pa.array(user[order]).cast(pa.string()), "")
        times = pa.array(at_us[order] + midnight, pa.timestamp("us", tz="UTC"))
        part = folder / "events" / f"date={date}"
        part.mkdir(parents=True)
        columns = {"user_id": names, "item_id": ids.take(pa.array(item[order])), "timestamp": times}
        pq.write_table(pa.table(columns), part / "part-0.parquet", compression="zstd")


def _in_a_process(folder: Path, limit: str, threads: int, engine: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.graph_build", "--measure", limit]
    command += ["--folder", str(folder), "--threads", str(threads), "--engine", engine]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure(folder: Path, options: GraphOptions) -> dict[str, Any]:
    work = folder / f"work-{options.memory_limit}"
    store, events = work / "store", folder / "events"
    index = IdIndex.open(folder / "index")
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        began, processor = time.perf_counter(), time.process_time()
        result = run()
        seconds[f"{name}_s"] = round(time.perf_counter() - began, 2)
        seconds[f"{name}_processor_s"] = round(time.process_time() - processor, 2)
        return result

    summary = timed("edges", lambda: build_edges(events, store, options))
    csr: CSR = timed("merge", lambda: merge_edges(store, index, work / "graph", options))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    newest = partition_path(store, summary.last_date)
    newest.unlink()
    timed("new_day_edges", lambda: build_edges(events, store, options))
    timed("unchanged_edges", lambda: build_edges(events, store, options))
    shutil.rmtree(work)
    return {
        **seconds,
        "total_s": round(seconds["edges_s"] + seconds["merge_s"], 2),
        "new_day_share_of_edges": round(seconds["new_day_edges_s"] / seconds["edges_s"], 3),
        "peak_rss_gb": round(peak / 1e6, 2),
        "pairs": summary.edges,
        "edges": len(csr.indices),
    }


def _self_join(folder: Path, threads: int) -> dict[str, float]:
    """Time the newest day: our partition, and the same count by joining on the user."""
    files = event_files(folder / "events")
    date = max(files)
    day = folder / "day"
    (day / "events").mkdir(parents=True)
    (day / "events" / f"date={date}").symlink_to(files[date][0].parent.resolve())
    options = GraphOptions(threads=threads)
    began = time.perf_counter()
    summary = build_edges(day / "events", day / "store", options)
    ours = time.perf_counter() - began
    connection = duckdb.connect(config={"threads": threads, "memory_limit": "4GB"})
    began = time.perf_counter()
    pairs = connection.execute(
        f"""
        WITH placed AS (
            SELECT user_id, item_id, timestamp,
                   row_number() OVER (PARTITION BY user_id ORDER BY timestamp, item_id) AS place
            FROM read_parquet('{files[date][0]}')
        )
        SELECT count(*) FROM (
            SELECT least(a.item_id, b.item_id) AS one, greatest(a.item_id, b.item_id) AS other,
                   count(*) AS times
            FROM placed a JOIN placed b ON a.user_id = b.user_id
             AND b.place > a.place AND b.place <= a.place + {options.max_followers}
             AND b.timestamp <= a.timestamp + INTERVAL 10 MINUTE
            WHERE a.item_id <> b.item_id
            GROUP BY ALL
        )
        """
    ).fetchone()
    theirs = time.perf_counter() - began
    return {
        "ours_s": round(ours, 2),
        "self_join_s": round(theirs, 2),
        "ratio": round(theirs / ours, 2),
        "ours_pairs": summary.edges,
        "self_join_pairs": int(pairs[0]) if pairs else 0,
    }


def _show(limit: str, row: dict[str, Any]) -> None:
    print(
        f"{limit}: {row['total_s']} s (edges {row['edges_s']}, merge {row['merge_s']}; processor "
        f"seconds {row['edges_processor_s']} and {row['merge_processor_s']}), peak "
        f"{row['peak_rss_gb']} GB; a new day {row['new_day_edges_s']} s = "
        f"{row['new_day_share_of_edges']:.0%} of all edges; unchanged {row['unchanged_edges_s']} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
