"""Time and memory of backfilling every user's state, beside a loop that steps one user at a time.

    python -m benchmarks.backfill [--users 1000000] [--sessions 4] [--json PATH]

A made-up log of ``users`` with ``sessions`` closed sessions of 1 to 9 items (5 on average), the
paper's network (4 GRU layers of 128, item vectors of 128), exported as the pipeline exports it. The
backfill runs in a process of its own, whose peak resident memory is reported, the pages of
mapped files included. The alternative is what one would write first: each
user's sessions in turn through the same ONNX file, on a sample of users.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from hiertcn.export.session import open_session
from hiertcn.export.tensors import NEXT_STATE, SESSION_MEAN, STATE
from hiertcn.files import write_json
from hiertcn.items.index import IdIndex
from hiertcn.items.table import ItemTable
from hiertcn.serving.records.backfill import backfill_states
from hiertcn.sessions.store import SessionStore, StoreMeta

_DIM: Final = 128
_GAP_US: Final = 1_800_000_000
_DAY_US: Final = 86_400_000_000


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--sessions", type=int, default=4, help="closed sessions of each user")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of onnxruntime")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--sample", type=int, default=1000, help="users of the plain loop")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--run-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_in:
        _run(arguments.run_in, arguments.threads, arguments.dtype)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _export(folder / "model")
        _make_log(folder / "sessions", arguments.users, arguments.sessions, arguments.items)
        vectors = np.random.default_rng(1).normal(size=(arguments.items, _DIM)) * 0.1
        ItemTable.write(folder / "table", vectors.astype(np.float32))
        command = [sys.executable, "-m", "benchmarks.backfill", "--run-in", name]
        command += ["--threads", str(arguments.threads), "--dtype", arguments.dtype]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        loop_s = _loop(folder, arguments.sample) * arguments.users / arguments.sample
    figures: dict[str, Any] = {
        "users": arguments.users,
        "sessions": arguments.users * arguments.sessions,
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        **found,
        "loop_seconds": loop_s,
        "speed_up": loop_s / found["seconds"],
    }
    print(f"backfill of {arguments.users:,} users x {arguments.sessions} sessions")
    print(f"  batched:            {found['seconds']:9.1f} s, {found['peak_gb']:.2f} GB")
    print(f"  one user at a time: {loop_s:9.1f} s (from {arguments.sample} users)")
    print(f"  {figures['speed_up']:.0f} times as fast")
    if arguments.json:
        write_json(arguments.json, figures)


def _run(folder: Path, threads: int, dtype: str) -> None:
    store, table, start = _opened(folder)
    began = time.perf_counter()
    backfill_states(
        store,
        table,
        folder / "model" / "gru_step" / "model.onnx",
        start,
        folder / "states",
        threads=threads,
        dtype=dtype,
    )
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak_gb": _peak_bytes() / 1e9}))


def _loop(folder: Path, sample: int) -> float:
    store, table, start = _opened(folder)
    session = open_session(folder / "model" / "gru_step" / "model.onnx", threads=1)
    began = time.perf_counter()
    for user in range(sample):
        state = start[None]
        for number in range(int(store.user_offsets[user]), int(store.user_offsets[user + 1])):
            rows = store.item_rows[
                int(store.session_offsets[number]) : int(store.session_offsets[number + 1])
            ]
            mean = table.gather(np.asarray(rows)).mean(axis=0, dtype=np.float32)[None]
            (state,) = session.run([NEXT_STATE.name], {STATE.name: state, SESSION_MEAN.name: mean})
    return time.perf_counter() - began


def _opened(folder: Path) -> tuple[SessionStore, ItemTable, Any]:
    start = np.load(folder / "model" / "start_state.npy", allow_pickle=False)
    return SessionStore.open(folder / "sessions"), ItemTable.open(folder / "table"), start


def _export(directory: Path) -> None:
    import torch

    from hiertcn.export.serving_models import export_serving_models
    from models.hiertcn import HierTCN, HierTCNConfig
    from models.hiertcn_serving import GruStep, TcnCone

    torch.manual_seed(0)
    model = HierTCN(HierTCNConfig.paper(_DIM)).eval()
    start = model.start_state.detach().numpy()
    export_serving_models(TcnCone(model), GruStep(model), start, directory, item_dim=_DIM)


def _make_log(directory: Path, users: int, sessions: int, items: int) -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 10, users * sessions)
    session_offsets = np.concatenate([[0], np.cumsum(lengths)])
    count = int(session_offsets[-1])
    starts_us = np.tile(np.arange(sessions) * _DAY_US, users) + draw.integers(
        0, _DAY_US // 2, users * sessions
    )
    places = np.arange(count) - np.repeat(session_offsets[:-1], lengths)
    columns = {
        "item_rows": draw.integers(0, items, count, dtype=np.int32),
        "timestamps_us": np.repeat(starts_us, lengths) + places * 60_000_000,
        "session_offsets": session_offsets,
        "user_offsets": np.arange(users + 1, dtype=np.int64) * sessions,
    }
    meta = StoreMeta(
        users=users,
        sessions=users * sessions,
        interactions=count,
        items=items,
        impressions=None,
        gap_us=_GAP_US,
        watermark_us=(sessions + 1) * _DAY_US,
    )
    directory.mkdir()
    for name, values in columns.items():
        np.save(directory / f"{name}.npy", values)
    write_json(directory / "header.json", meta.to_dict())
    IdIndex.build([f"user-{number}" for number in range(users)], directory / "users")


def _peak_bytes() -> int:
    """Most resident memory ever, mapped pages included as far as the kernel kept them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not say VmHWM")


if __name__ == "__main__":
    main()
