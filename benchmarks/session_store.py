"""Time and memory to build the session store of the paper's log, and to read an epoch of it.

    python -m benchmarks.session_store [--events 56000000] [--users 6000000] [--json PATH]

The log is that of benchmarks/graph_build.py in the size of the HierTCN paper's Table 1: 56 M
interactions of 6 M users over three months, 2.4 a session, with text ids. The store is built in a
process of its own, so that its peak resident memory (with Python, pyarrow and the ids' index in it)
can be told. The alternative is DuckDB's sort of the same columns into one parquet file, in a
process of its own too, with the same limit. Then an epoch of batches is read with one thread, and
the process's anonymous memory (what is no file's page) is taken at every tenth of it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import duckdb
import numpy as np
import psutil

from benchmarks.graph_build import draw_log
from hiertcn.files import write_json
from hiertcn.items.index import IdIndex
from hiertcn.sessions.batches import SessionBatches
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.store import SessionStore

_TARGET_S: Final = 300.0
_TARGET_GB: Final = 4.0
_READINGS: Final = 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=56_000_000)
    parser.add_argument("--users", type=int, default=6_000_000)
    parser.add_argument("--items", type=int, default=2_000_000)
    parser.add_argument("--days", type=int, default=90)
    parser.add_argument("--memory", default="2GB", help="DuckDB's limit")
    parser.add_argument("--lanes", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where the log goes (default: temporary)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", choices=_STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(_STEPS[arguments.measure](arguments.folder, arguments)))
        return
    with TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        draw_log(folder, arguments.events, arguments.users, arguments.items, arguments.days)
        figures = {step: _in_a_process(step, folder, arguments) for step in _STEPS}
    build, sort, read = (figures[step] for step in _STEPS)
    print(
        f"built in {build['seconds']:.0f} s (target {_TARGET_S:.0f}), {build['cpu_s']:.0f} of the "
        f"processors', peak {build['peak_gb']:.2f} GB (target {_TARGET_GB:.0f}): "
        f"{build['sessions']:,} sessions, {build['users']:,} users\n"
        f"DuckDB's sort alone {sort['seconds']:.0f} s, {sort['cpu_s']:.0f} of the processors', "
        f"peak {sort['peak_gb']:.2f} GB: the store takes {build['cpu_s'] / sort['cpu_s']:.2f} of "
        f"its processor time\n"
        f"an epoch read at {read['per_s'] / 1e6:.2f} M interactions/s, anonymous memory "
        f"{read['anonymous_mb'][0]:.0f} MB after its first tenth, {read['anonymous_mb'][-1]:.0f} "
        f"MB at its end"
    )
    if arguments.json:
        write_json(arguments.json, figures)


def _in_a_process(step: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.session_store", "--measure", step]
    command += ["--folder", str(folder), "--memory", arguments.memory]
    command += ["--lanes", str(arguments.lanes)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _build(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    items = IdIndex.open(folder / "index")
    began = time.perf_counter()
    summary = build_sessions(
        folder / "events", items, folder / "store", memory_limit=arguments.memory
    )
    return {"seconds": time.perf_counter() - began, **_used(), **summary.to_dict()}


def _sort(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    database = duckdb.connect(
        config={"memory_limit": arguments.memory, "temp_directory": str(folder / "spill")}
    )
    began = time.perf_counter()
    database.execute(
        f"COPY (SELECT user_id, item_id, timestamp FROM read_parquet('{folder}/events/*/*.parquet')"
        f" ORDER BY user_id, timestamp) TO '{folder}/sorted.parquet' (FORMAT parquet)"
    )
    return {"seconds": time.perf_counter() - began, **_used()}


def _read(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    batches = SessionBatches(
        SessionStore.open(folder / "store"),
        lanes=arguments.lanes,
        sessions_per_step=4,
        context=121,
    )
    steps = batches.steps(0)
    marks = set(np.linspace(0, steps - 1, _READINGS + 1).astype(int)[1:].tolist())
    anonymous, seen = [], 0
    began = time.perf_counter()
    for step, batch in enumerate(batches.epoch(0)):
        seen += len(batch.interactions)
        if step in marks:
            memory = psutil.Process().memory_info()
            anonymous.append((memory.rss - memory.shared) / 1e6)
    seconds = time.perf_counter() - began
    return {"per_s": seen / seconds, "interactions": seen, "anonymous_mb": anonymous}


def _used() -> dict[str, float]:
    """Processor seconds and peak memory of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu_s": used.ru_utime + used.ru_stime, "peak_gb": used.ru_maxrss / 1e6}


_STEPS: Final = {"build": _build, "sort": _sort, "read": _read}


if __name__ == "__main__":
    main()
