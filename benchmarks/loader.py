"""How fast batches come: planning, building, gathering their vectors; and attaching a large table.

    python -m benchmarks.loader [--users N] [--items N] [--json PATH]

Sessions are drawn as long as the paper's Table 1 gives them (2.4 interactions a session, 3.9
sessions a user). The limit beside the figure is what one core copies with numpy of the same bytes:
a vector read as float16 and written as float32. CPU time of one thread, the fastest of several
passes, so that a busy machine counts less.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from hiertcn.files import write_json
from hiertcn.items.table import HEADER_FILE, VECTORS_FILE, ItemTable
from hiertcn.sessions.batches import SessionBatches
from hiertcn.sessions.store import SessionStore, StoreMeta
from hiertcn.training.item_vectors import FrozenVectors
from hiertcn.training.lanes import to_tensors

DIM: Final = 128
TARGET_PER_S: Final = 3e6
LARGE_TABLE_BYTES: Final = 10 << 30

_SESSIONS_A_USER, _ITEMS_A_SESSION = 3.9, 2.4
_CONTEXT = 121
_PASSES = 5
_COPY_BYTES = 256 << 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--lanes", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            **measure_loader(Path(folder), arguments.users, arguments.items, arguments.lanes),
            **measure_attach(Path(folder)),
        }
    print(
        f"plan of an epoch      {figures['plan_s']:.3f} s for {figures['sessions']:,.0f} sessions\n"
        f"batches alone         {figures['batches_per_s'] / 1e6:.2f} M interactions/s, "
        f"{figures['per_step']:.0f} a step\n"
        f"with their vectors    {figures['gathered_per_s'] / 1e6:.2f} M interactions/s "
        f"(target {TARGET_PER_S / 1e6:.0f} M), {figures['ratio_to_copy']:.2f} of copying the same "
        f"bytes ({figures['copied_per_s'] / 1e6:.1f} M/s)\n"
        f"as a LaneBatch        {figures['tensors_per_s'] / 1e6:.2f} M interactions/s\n"
        f"attach of a 10 GB table {figures['attach_ms']:.2f} ms"
    )
    if arguments.json:
        write_json(arguments.json, figures)


def measure_loader(folder: Path, users: int, items: int, lanes: int) -> dict[str, float]:
    """Time an epoch of batches without vectors, with them, and as tensors."""
    store = drawn_store(users, items)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((items, DIM), np.float32)
    table = FrozenVectors(ItemTable.write(folder / "table", vectors))
    batches = SessionBatches(store, lanes=lanes, sessions_per_step=4, context=_CONTEXT)
    # Compiles, and touches every page of the table once.
    for batch in batches.epoch(0):
        to_tensors(batch, table)
    table.table.gather(np.arange(items))
    started = time.process_time()
    steps = batches.steps(1)
    plan_s = time.process_time() - started
    seconds = dict.fromkeys(("batches", "gathered", "tensors"), math.inf)
    for kind in [*seconds] * _PASSES:
        started = time.process_time()
        for batch in batches.epoch(1):
            if kind == "gathered":
                table.gather_sessions(batch)
            elif kind == "tensors":
                to_tensors(batch, table)
        seconds[kind] = min(seconds[kind], time.process_time() - started)
    copied = _copy_seconds(store.meta.interactions)
    return {
        "sessions": store.meta.sessions,
        "plan_s": plan_s,
        "per_step": batches.interactions / steps,
        "copied_per_s": batches.interactions / copied,
        "ratio_to_copy": copied / seconds["gathered"],
        **{f"{kind}_per_s": batches.interactions / value for kind, value in seconds.items()},
    }


def measure_attach(folder: Path) -> dict[str, float]:
    """Time opening a 10 GB table; its file has a hole, for attaching reads none of it."""
    small = ItemTable.write(folder / "large", np.zeros((1, DIM), np.float32))
    rows = LARGE_TABLE_BYTES // (2 * DIM)
    header = small.directory / HEADER_FILE
    header.write_text(header.read_text().replace("[\n    1,", f"[\n    {rows},"))
    with (small.directory / VECTORS_FILE).open("r+b") as file:
        file.truncate(LARGE_TABLE_BYTES)
    milliseconds = []
    for _ in range(9):
        started = time.perf_counter()
        table = ItemTable.open(small.directory)
        milliseconds.append(1e3 * (time.perf_counter() - started))
        if len(table) != rows:
            raise RuntimeError(f"the table has {len(table)} rows; expected {rows}")
    return {"attach_ms": float(np.median(milliseconds))}


def drawn_store(users: int, items: int, seed: int = 0) -> SessionStore:
    """Return an in-memory store with session lengths as in the paper's Table 1."""
    rng = np.random.default_rng(seed)
    sessions = rng.geometric(1 / _SESSIONS_A_USER, users)
    lengths = rng.geometric(1 / _ITEMS_A_SESSION, int(sessions.sum()))
    total = int(lengths.sum())
    meta = StoreMeta(
        users=users,
        sessions=len(lengths),
        interactions=total,
        items=items,
        impressions=None,
        gap_us=1_800_000_000,
        watermark_us=total,
    )
    columns: dict[str, NDArray[Any]] = {
        "item_rows": rng.integers(0, items, total).astype(np.int32),
        "timestamps_us": np.arange(total, dtype=np.int64),
        "session_offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "user_offsets": np.concatenate([[0], np.cumsum(sessions)]),
    }
    return SessionStore(Path("drawn"), meta, columns)


def _copy_seconds(rows: int) -> float:
    # A row is 2 bytes a coordinate read and 4 written; a copy reads and writes alike. The buffer is
    # no more in the caches than the table is.
    origin = np.ones(_COPY_BYTES, np.uint8)
    target = np.empty_like(origin)
    fastest = math.inf
    for _ in range(_PASSES):
        started = time.process_time()
        np.copyto(target, origin)
        fastest = min(fastest, time.process_time() - started)
    return fastest * rows * DIM * 3 / _COPY_BYTES


if __name__ == "__main__":
    main()
