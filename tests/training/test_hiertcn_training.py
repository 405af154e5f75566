import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hiertcn.errors import InputError
from hiertcn.items.index import IdIndex
from hiertcn.items.table import ItemTable
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.split import Split, split_by_time
from hiertcn.sessions.store import SessionStore
from hiertcn.training.checkpoints import CHECKPOINT_FILE, load_checkpoint
from hiertcn.training.hiertcn import train_hiertcn
from hiertcn.training.options import LOSSES, TrainOptions
from hiertcn.training.validation import Validation
from models.hiertcn import HierTCN, HierTCNConfig, load_hiertcn
from tests.session_logs import START_US, random_users, write_events, write_store, write_table

ITEMS, DIM = 30, 9
CONFIG = HierTCNConfig(
    item_dim=DIM, hidden=12, gru_layers=2, tcn_blocks=2, kernel=3, filters=16, dropout=0.1
)
OPTIONS = TrainOptions(
    lanes=4, sessions_per_step=3, max_length=6, max_epochs=3, random_negatives=8, device="cpu"
)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    users = random_users(np.random.default_rng(0), users=40, items=ITEMS)
    store = write_store(directory, users, ITEMS)
    return store, write_table(directory / "table", ITEMS, DIM), split_by_time(store, 0.2, 0.2)


def new_model(seed=0):
    torch.manual_seed(seed)
    return HierTCN(CONFIG)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture(scope="module")
def trained(log, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained")
    model = new_model()
    return train_hiertcn(model, *log, output, OPTIONS), weights(model), output


def test_it_learns_and_writes_what_it_says(log, tmp_path):
    store, table, split = log
    model = new_model()
    validation = Validation(store, table, split, requests=4000, seed=0, device=torch.device("cpu"))
    before = validation.mrr(model.eval())
    options = TrainOptions(
        lanes=4, sessions_per_step=3, max_epochs=12, learning_rate=1e-2, patience=12, device="cpu"
    )
    summary = train_hiertcn(model, store, table, split, tmp_path, options)
    assert summary.validation_mrr > 2 * before and summary.validation_mrr > 0.35
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "curve.json",
    }
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert len(curve["steps"]) == len(curve["train_loss"]) == len(curve["validation_mrr"])
    assert curve["train_loss"][-1] < curve["train_loss"][0]
    # Early stopping keeps the best weights, not the last.
    assert max(curve["validation_mrr"]) == summary.validation_mrr
    assert summary.best_step in curve["steps"]
    assert validation.mrr(load_hiertcn(tmp_path)) == summary.validation_mrr
    assert validation.mrr(model) == summary.validation_mrr


def test_one_seed_gives_one_model(log, trained, tmp_path):
    again = new_model()
    summary = train_hiertcn(again, *log, tmp_path, OPTIONS)
    assert_same(weights(again), trained[1])
    assert summary.validation_mrr == trained[0].validation_mrr
    threaded = new_model()
    options = TrainOptions(**{**OPTIONS.to_dict(), "prefetch": 2})
    summary = train_hiertcn(threaded, *log, tmp_path / "threaded", options)
    assert_same(weights(threaded), trained[1])
    assert 0.0 < summary.waiting_share < 1.0
    other = new_model()
    train_hiertcn(other, *log, tmp_path / "other", TrainOptions(**{**OPTIONS.to_dict(), "seed": 1}))
    assert not torch.equal(other.head[0].weight, again.head[0].weight)


TRAIN_AND_DIE = """
import os, signal, sys
from pathlib import Path
import torch
from hiertcn.items.table import ItemTable
from hiertcn.sessions.split import Split
from hiertcn.sessions.store import SessionStore
from hiertcn.training import hiertcn as training
from hiertcn.training.options import TrainOptions
from models.hiertcn import HierTCN, HierTCNConfig
import json

arguments = json.loads(sys.argv[1])
torch.manual_seed(0)
model = HierTCN(HierTCNConfig(**arguments["config"]))
write = training.save_checkpoint

def write_then_die(path, tensors, meta):
    write(path, tensors, meta)
    if meta["progress"]["step"] == arguments["die_at"]:
        os.kill(os.getpid(), signal.SIGKILL)

training.save_checkpoint = write_then_die
training.train_hiertcn(
    model, SessionStore.open(Path(arguments["store"])), ItemTable.open(Path(arguments["table"])),
    Split(**arguments["split"]), Path(arguments["output"]), TrainOptions(**arguments["options"]),
)
"""


def test_a_killed_run_resumes_to_the_same_bits(log, trained, tmp_path):
    store, table, split = log
    output = tmp_path / "model"
    options = {**OPTIONS.to_dict(), "checkpoint_s": 0.0}
    steps_an_epoch = trained[0].steps // 3
    arguments = {
        "config": CONFIG.to_dict(),
        "store": str(store.directory),
        "table": str(table.directory),
        "split": split.to_dict(),
        "output": str(output),
        "options": options,
        "die_at": steps_an_epoch + steps_an_epoch // 2,
    }
    child = subprocess.run(
        [sys.executable, "-c", TRAIN_AND_DIE, json.dumps(arguments)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert [path.name for path in output.iterdir()] == [CHECKPOINT_FILE]
    _, meta = load_checkpoint(output / CHECKPOINT_FILE)
    assert meta["progress"]["step"] == arguments["die_at"]

    # Whatever the resuming process starts from is overwritten.
    model = new_model(seed=99)
    summary = train_hiertcn(model, *log, output, TrainOptions(**options))
    assert_same(weights(model), trained[1])
    assert summary.steps == trained[0].steps
    assert (output / "curve.json").read_text() == (trained[2] / "curve.json").read_text()
    assert not (output / CHECKPOINT_FILE).exists()


def stopped_run(log, output, options, monkeypatch, at_step):
    """Leave a checkpoint of ``at_step``, as a kill right after it would."""

    class Killed(BaseException):
        pass

    from hiertcn.training import hiertcn as training

    write = training.save_checkpoint

    def write_then_raise(path, tensors, meta):
        write(path, tensors, meta)
        if meta["progress"]["step"] == at_step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", write_then_raise)
        with pytest.raises(Killed):
            train_hiertcn(new_model(), *log, output, options)


@pytest.mark.parametrize("at_step", [1, "last of the epoch"])
def test_any_step_can_be_resumed_from(log, trained, tmp_path, monkeypatch, at_step):
    options = TrainOptions(**{**OPTIONS.to_dict(), "checkpoint_s": 0.0})
    step = trained[0].steps // 3 if isinstance(at_step, str) else at_step
    stopped_run(log, tmp_path, options, monkeypatch, step)
    model = new_model(seed=5)
    train_hiertcn(model, *log, tmp_path, options)
    assert_same(weights(model), trained[1])


def test_a_checkpoint_of_another_run_is_refused(log, tmp_path, monkeypatch):
    options = TrainOptions(**{**OPTIONS.to_dict(), "checkpoint_s": 0.0})
    stopped_run(log, tmp_path, options, monkeypatch, 2)
    other = TrainOptions(**{**options.to_dict(), "learning_rate": 5e-4})
    with pytest.raises(InputError, match="another options"):
        train_hiertcn(new_model(), *log, tmp_path, other)
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"half a file")
    with pytest.raises(InputError, match="not a readable"):
        train_hiertcn(new_model(), *log, tmp_path, options)


def test_max_steps_patience_and_best_weights(log, tmp_path):
    few = TrainOptions(**{**OPTIONS.to_dict(), "max_steps": 5})
    summary = train_hiertcn(new_model(), *log, tmp_path / "few", few)
    assert (summary.steps, summary.stopped) == (5, "5 steps done")
    # A step of this size destroys the model, so the first validation stays the best.
    wild = TrainOptions(
        **{**OPTIONS.to_dict(), "max_epochs": 20, "validate_steps": 1, "patience": 2}
    )
    model = new_model()
    summary = train_hiertcn(model, *log, tmp_path / "wild", wild)
    curve = json.loads((tmp_path / "wild" / "curve.json").read_text())
    if summary.stopped.startswith("no better"):
        best = int(np.argmax(curve["validation_mrr"]))
        assert len(curve["steps"]) == best + 3 and curve["steps"][best] == summary.best_step


def test_warm_start_begins_at_the_given_weights(log, trained, tmp_path):
    options = TrainOptions(**{**OPTIONS.to_dict(), "max_steps": 1, "learning_rate": 1e-12})
    model = new_model(seed=7)
    train_hiertcn(model, *log, tmp_path, options, warm_start=trained[2])
    for name, value in weights(model).items():
        torch.testing.assert_close(value, trained[1][name], atol=1e-6, rtol=0)
    other = HierTCN(HierTCNConfig(**{**CONFIG.to_dict(), "hidden": 6}))
    with pytest.raises(InputError, match="does not fit the model"):
        train_hiertcn(other, *log, tmp_path / "other", options, warm_start=trained[2])


@pytest.fixture(scope="module")
def shown_log(tmp_path_factory):
    """A log with impressions in which users choose the item after their last one."""
    directory = tmp_path_factory.mktemp("shown")
    rng = np.random.default_rng(0)
    rows = []
    for user in range(60):
        item = int(rng.integers(ITEMS))
        for place in range(8):
            item = (item + 1) % ITEMS
            shown = [*rng.choice(ITEMS, 5), item]
            rows.append(
                {
                    "user_id": f"u{user:02d}",
                    "item_id": f"i{item}",
                    "timestamp": START_US + user * 1_000_000 + place * 1_200_000_000,
                    "impressions": [f"i{row}" for row in rng.permutation(shown)],
                }
            )
    index = IdIndex.build([f"i{item}" for item in range(ITEMS)], directory / "index")
    build_sessions(write_events(directory / "events", rows), index, directory / "store", gap_s=3600)
    store = SessionStore.open(directory / "store")
    return store, write_table(directory / "table", ITEMS, DIM), split_by_time(store, 0.2, 0.2)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_from_impressions(shown_log, tmp_path, loss):
    store, table, split = shown_log
    validation = Validation(store, table, split, requests=4000, seed=0, device=torch.device("cpu"))
    assert len(validation) > 0
    model = new_model(3)
    before = validation.mrr(model.eval())
    options = TrainOptions(
        loss=loss,
        lanes=2,
        sessions_per_step=1,
        random_negatives=4,
        in_batch_negatives=4,
        max_epochs=15,
        patience=15,
        warmup_steps=5,
        learning_rate=3e-2,
        device="cpu",
    )
    summary = train_hiertcn(model, store, table, split, tmp_path, options)
    assert summary.validation_mrr > before + 0.1


def test_a_table_that_does_not_fit_is_refused(log, tmp_path):
    store, table, split = log
    vectors = np.array(table.vectors)
    shorter = ItemTable.write(tmp_path / "shorter", vectors[:-1])
    with pytest.raises(InputError, match=f"has {ITEMS - 1} rows but"):
        train_hiertcn(new_model(), store, shorter, split, tmp_path / "model", OPTIONS)
    wider = ItemTable.write(tmp_path / "wider", np.ones((ITEMS, DIM + 1)))
    with pytest.raises(InputError, match=f"item_dim={DIM + 1}"):
        train_hiertcn(new_model(), store, wider, split, tmp_path / "model", OPTIONS)
    vectors[17, 2] = np.nan
    broken = ItemTable(tmp_path, vectors, "of a table damaged on disk")
    with pytest.raises(InputError, match="NaN or infinite value in row 17"):
        train_hiertcn(new_model(), store, broken, split, tmp_path / "model", OPTIONS)
    assert not (tmp_path / "model").exists()


def test_empty_parts_are_refused(log, tmp_path):
    store, table, _ = log
    for split, message in (
        (Split(validation_start_us=0, test_start_us=2**60), "no session starts before"),
        (Split(validation_start_us=2**60, test_start_us=2**61), "validation range"),
    ):
        with pytest.raises(InputError, match=message):
            train_hiertcn(new_model(), store, table, split, tmp_path, OPTIONS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lanes", -1), ("learning_rate", 0.0), ("loss", "l3"), ("decay", 0.0), ("device", "tpu")],
)
def test_options_are_checked(field, value):
    with pytest.raises(InputError, match=field):
        TrainOptions(**{field: value})
    assert TrainOptions.from_dict(OPTIONS.to_dict()) == OPTIONS
    with pytest.raises(InputError, match="depth"):
        TrainOptions.from_dict({"depth": 3})
