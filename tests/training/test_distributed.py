"""Two gloo processes train the model that one process trains on all lanes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hiertcn.sessions.split import split_by_time
from tests.session_logs import random_users, write_store, write_table

ITEMS, DIM = 40, 9

TRAIN = """
import json, os, sys
from pathlib import Path
import torch
from hiertcn.items.table import ItemTable
from hiertcn.sessions.split import Split
from hiertcn.sessions.store import SessionStore
from hiertcn.training import hiertcn as training
from hiertcn.training.options import TrainOptions
from models.hiertcn import HierTCN, HierTCNConfig

torch.set_num_threads(1)
arguments = json.loads(sys.argv[1])
for name, options in arguments["runs"].items():
    training.DENSE_ITEMS = 0 if name == "sparse" else 20_000
    # Ranks that begin differently take the first one's weights.
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    training.train_hiertcn(
        HierTCN(HierTCNConfig(item_dim=9, hidden=8, gru_layers=2, tcn_blocks=2, filters=8)),
        SessionStore.open(Path(arguments["store"])), ItemTable.open(Path(arguments["table"])),
        Split(**arguments["split"]), Path(arguments["output"]) / name, TrainOptions(**options),
    )
"""

SIZES = {
    "sessions_per_step": 2,
    "max_epochs": 2,
    "random_negatives": 8,
    "in_batch_negatives": 6,
    "checkpoint_s": 0.0,
    "device": "cpu",
}
RUNS = {
    # Five lanes make ranks of unequal size; many lanes end at different steps.
    "frozen": {**SIZES, "lanes": 5},
    "sparse": {**SIZES, "lanes": 30, "item_vectors": "fine-tuned", "weight_decay": 0.1},
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    users = random_users(np.random.default_rng(0), users=35, items=ITEMS)
    store = write_store(directory, users, ITEMS)
    table = write_table(directory / "table", ITEMS, DIM)
    script = directory / "train.py"
    script.write_text(TRAIN)
    found = {}
    for processes in (1, 2):
        arguments = {
            "runs": RUNS,
            "store": str(store.directory),
            "table": str(table.directory),
            "split": split_by_time(store, 0.2, 0.2).to_dict(),
            "output": str(directory / f"of-{processes}"),
        }
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, str(script)] if processes > 1 else [str(script)]
        done = subprocess.run(
            [sys.executable, *command, json.dumps(arguments)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        found[processes] = directory / f"of-{processes}"
    return found


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_have_the_loss_curve_of_one(outputs, run):
    one, two = (
        json.loads((outputs[processes] / run / "curve.json").read_text()) for processes in (1, 2)
    )
    assert one["steps"] == two["steps"] and one["steps"]
    np.testing.assert_allclose(one["train_loss"], two["train_loss"], rtol=1e-4)
    np.testing.assert_allclose(one["validation_mrr"], two["validation_mrr"], atol=0.02)


def test_only_one_process_writes_and_it_writes_everything(outputs):
    for run in RUNS:
        names = [
            sorted(path.name for path in (outputs[processes] / run).iterdir())
            for processes in (1, 2)
        ]
        assert names[0] == names[1]
