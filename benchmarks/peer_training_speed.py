"""Training speed beside the GRU4Rec of its authors: events a second of processor time.

    python -m benchmarks.peer_training_speed --data DATA --gru4rec FOLDER [--turns 3] [--json PATH]

Both learn the fit part of online_retail under the comparison protocol for one epoch on one thread,
with vectors of 96 and 512 sampled negatives, and take turns, each in a process of its own. FOLDER
holds ``gru4rec_pytorch.py`` of https://github.com/hidasib/GRU4Rec_PyTorch_Official (its licence is
free for research; nothing of it is here). HierTCN is the comparison's network, with the few lanes
that quality asks for and with as many as GRU4Rec has sessions in a batch.
"""

import argparse
import dataclasses
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch

from benchmarks.best_rows import settings
from benchmarks.protocol_data import ProtocolCase, load_case
from benchmarks.protocol_vectors import ITEM_VECTORS, first_vectors
from hiertcn.errors import InputError
from hiertcn.files import write_json
from hiertcn.items.table import ItemTable
from hiertcn.sessions.split import Split
from hiertcn.training.hiertcn import train_hiertcn
from models.hiertcn import HierTCN

_WIDTH: Final = 96
_NEGATIVES: Final = 512
_BATCH: Final = 64
_PEER: Final = "GRU4Rec"
_LANES: Final = {"HierTCN, 4 lanes": 4, f"HierTCN, {_BATCH} lanes": _BATCH}
_NO_END_US: Final = 1 << 62


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the logs")
    parser.add_argument("--gru4rec", type=Path, required=True, help="holds gru4rec_pytorch.py")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", choices=(_PEER, *_LANES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.gru4rec / "gru4rec_pytorch.py").exists():
        raise InputError(f"{arguments.gru4rec} holds no gru4rec_pytorch.py; clone GRU4Rec there")
    if arguments.measure:
        torch.set_num_threads(1)
        case = load_case(arguments.data, "online_retail", "test")
        name = arguments.measure
        is_peer = name == _PEER
        print(_gru4rec(case, arguments.gru4rec) if is_peer else _hiertcn(case, _LANES[name]))
        return
    turns: dict[str, list[float]] = {name: [] for name in (_PEER, *_LANES)}
    for _ in range(arguments.turns):
        for name, found in turns.items():
            found.append(_in_a_process(name, arguments))
    medians = {name: statistics.median(found) for name, found in turns.items()}
    for name, found in turns.items():
        ratios = [one / peer for one, peer in zip(found, turns[_PEER], strict=True)]
        print(
            f"{name:<20}{medians[name]:10,.0f} events a processor second, "
            f"{statistics.median(ratios):.2f} of GRU4Rec's in the same turn"
        )
    if arguments.json:
        write_json(arguments.json, {"medians": medians, "turns": turns})


def _in_a_process(name: str, arguments: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.peer_training_speed", "--measure", name]
    command += ["--data", str(arguments.data), "--gru4rec", str(arguments.gru4rec)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _gru4rec(case: ProtocolCase, folder: Path) -> float:
    """Events a processor second of an epoch; a session's first event is no target."""
    sys.path.insert(0, str(folder))
    peer: Any = importlib.import_module("gru4rec_pytorch")
    store = case.fit
    lengths = np.diff(store.session_offsets)
    log = pa.table(
        {
            "SessionId": np.repeat(np.arange(len(lengths)), lengths),
            "ItemId": np.asarray(store.item_rows).astype(np.int64),
            "Time": np.arange(len(store.item_rows)),
        }
    ).to_pandas()
    model = peer.GRU4Rec(
        layers=[_WIDTH],
        batch_size=_BATCH,
        n_sample=_NEGATIVES,
        n_epochs=1,
        device=torch.device("cpu"),
    )
    began = time.process_time()
    # A smaller store of samples than its 10 million, which are drawn before the first batch.
    model.fit(log, sample_cache_max_size=1000 * _NEGATIVES, compatibility_mode=False)
    return float((lengths - 1).sum() / (time.process_time() - began))


def _hiertcn(case: ProtocolCase, lanes: int) -> float:
    """Events a processor second of an epoch."""
    setting = settings(case.name, 1)["HierTCN"]
    options = dataclasses.replace(
        setting.options,
        lanes=lanes,
        random_negatives=_NEGATIVES,
        item_vectors=ITEM_VECTORS[setting.start],
    )
    vectors = first_vectors(case, setting.config.item_dim, setting.start, 0)
    with tempfile.TemporaryDirectory() as folder:
        table = ItemTable.write(Path(folder) / "start", vectors, "float32")
        # Compiles what the measured epoch needs.
        warm = dataclasses.replace(options, max_steps=2)
        split = Split(validation_start_us=_NO_END_US, test_start_us=_NO_END_US)
        train_hiertcn(HierTCN(setting.config), case.fit, table, split, Path(folder) / "warm", warm)
        began = time.process_time()
        train_hiertcn(
            HierTCN(setting.config), case.fit, table, split, Path(folder) / "model", options
        )
        seconds = time.process_time() - began
    return case.fit.meta.interactions / seconds


if __name__ == "__main__":
    main()
