import dataclasses

import numpy as np
import pytest
import torch

from hiertcn.errors import InputError
from hiertcn.items.table import ItemTable
from hiertcn.sessions.batches import SessionBatches
from hiertcn.sessions.split import split_by_time
from hiertcn.training import hiertcn as training
from hiertcn.training.hiertcn import train_hiertcn
from hiertcn.training.item_vectors import (
    FrozenVectors,
    TrainedVectors,
    load_vectors,
    save_vectors,
    start_vectors,
)
from hiertcn.training.options import TrainOptions
from hiertcn.training.validation import Validation
from models.hiertcn import HierTCN, HierTCNConfig, load_hiertcn
from models.network_ranker import NetworkRanker
from tests.session_logs import random_users, write_store, write_table

ITEMS, DIM = 30, 9
CONFIG = HierTCNConfig(
    item_dim=DIM, hidden=12, gru_layers=2, tcn_blocks=2, kernel=3, filters=16, dropout=0.1
)
OPTIONS = TrainOptions(
    item_vectors="fine-tuned",
    lanes=4,
    sessions_per_step=3,
    max_length=6,
    max_epochs=2,
    random_negatives=8,
    in_batch_negatives=8,
    learning_rate=1e-2,
    warmup_steps=5,
    device="cpu",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    users = random_users(np.random.default_rng(0), users=40, items=ITEMS)
    store = write_store(directory, users, ITEMS)
    return store, write_table(directory / "table", ITEMS, DIM), split_by_time(store, 0.2, 0.2)


def new_model(seed=0):
    torch.manual_seed(seed)
    return HierTCN(CONFIG)


def options_of(kind, **changes):
    return dataclasses.replace(OPTIONS, item_vectors=kind, **changes)


@pytest.fixture(params=[False, True], ids=["dense", "sparse"])
def is_sparse(request, monkeypatch):
    monkeypatch.setattr(training, "DENSE_ITEMS", 0 if request.param else 20_000)
    return request.param


@pytest.mark.parametrize("kind", ["frozen", "fine-tuned"])
def test_both_kinds_gather_the_tables_rows(log, kind):
    table = log[1]
    vectors = start_vectors(kind, table, CPU, seed=0)
    assert len(vectors) == ITEMS and vectors.dim == DIM
    rows = np.array([[3, -1], [29, 0]], np.int32)
    for asked in (rows, torch.from_numpy(rows)):
        gathered = vectors.gather(asked).detach().numpy()
        np.testing.assert_array_equal(gathered, table.gather(rows))
    np.testing.assert_array_equal(vectors.all().detach().numpy(), table.gather(np.arange(ITEMS)))
    assert vectors.outputs is vectors
    with pytest.raises(InputError, match=f"row {ITEMS}"):
        vectors.gather(np.array([ITEMS]))


def test_random_rows_have_about_unit_length_and_the_tables_prior(log):
    table = log[1]
    one, again, other = (start_vectors("one-hot", table, CPU, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.all(), again.all()) and not torch.equal(one.all(), other.all())
    lengths = torch.linalg.vector_norm(one.all()[:, :-1], dim=1)
    assert 0.7 < float(lengths.detach().mean()) < 1.3
    np.testing.assert_array_equal(one.all()[:, -1].detach().numpy(), table.vectors[:, -1])
    assert one.outputs is not one and not torch.equal(one.outputs.all(), one.all())


def test_gradients_of_a_repeated_row_add_up_and_unknown_rows_have_none():
    for sparse in (False, True):
        vectors = TrainedVectors(torch.ones(4, 2), sparse=sparse)
        vectors.gather(np.array([1, 1, -1, 3])).sum().backward()
        gradient = vectors.weight.grad
        assert gradient.is_sparse == sparse
        expected = torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
        torch.testing.assert_close(gradient.to_dense() if sparse else gradient, expected)


@pytest.mark.parametrize("kind", ["float16", "float32", "fine-tuned"])
def test_a_batchs_vectors_and_means_are_the_tables(log, tmp_path, kind):
    store, table, _ = log
    if kind != "fine-tuned":
        table = ItemTable.write(tmp_path / "table", table.vectors, kind)
    vectors = start_vectors("frozen" if kind != "fine-tuned" else kind, table, CPU, seed=0)
    batches = SessionBatches(store, lanes=3, sessions_per_step=2, max_length=3, context=1)
    for batch in batches.epoch(0):
        found, means = (part.detach().numpy() for part in vectors.gather_sessions(batch))
        np.testing.assert_array_equal(found, table.gather(batch.item_rows))
        for piece, session in enumerate(batch.session):
            whole = slice(store.session_offsets[session], store.session_offsets[session + 1])
            expected = table.gather(store.item_rows[whole]).mean(0) * batch.closes[piece]
            np.testing.assert_allclose(means[piece], expected, atol=1e-6)


def test_a_batch_of_unknown_items_is_refused(log, tmp_path):
    store, table, _ = log
    shorter = ItemTable.write(tmp_path / "table", table.vectors[:5])
    batch = next(SessionBatches(store, lanes=3, sessions_per_step=2).epoch(0))
    with pytest.raises(InputError, match="past the item table"):
        FrozenVectors(shorter).gather_sessions(batch)


@pytest.mark.parametrize("kind", ["fine-tuned", "learned", "one-hot"])
def test_trained_vectors_learn_and_are_written_as_tables(log, tmp_path, kind, is_sparse):
    store, table, split = log
    options = options_of(kind, max_epochs=5, patience=5)
    frozen = train_hiertcn(new_model(), *log, tmp_path / "frozen", options_of("frozen"))
    assert frozen.item_parameters == 0 and not (tmp_path / "frozen" / "item_table").exists()
    summary = train_hiertcn(new_model(), *log, tmp_path / "model", options)
    assert summary.item_parameters == ITEMS * DIM * (2 if kind == "one-hot" else 1)
    assert summary.validation_mrr > 0.25

    written = ItemTable.open(tmp_path / "model" / "item_table")
    assert written.vectors.dtype == table.vectors.dtype and written.checksum != table.checksum
    outputs = None
    if kind == "one-hot":
        outputs = ItemTable.open(tmp_path / "model" / "output_table")
    # What was written ranks as what was trained.
    model = load_hiertcn(tmp_path / "model")
    loaded = start_vectors(kind, table, CPU, seed=5)
    load_vectors(loaded, tmp_path / "model")
    validation = Validation(store, loaded, split, requests=4000, seed=0, device=CPU)
    assert validation.mrr(model) == summary.validation_mrr
    if kind != "one-hot":
        validation = Validation(store, written, split, requests=4000, seed=0, device=CPU)
        assert validation.mrr(model) == summary.validation_mrr

    from hiertcn.evaluation.protocol import build_requests

    requests = build_requests(store, split.test_start_us)
    scores = NetworkRanker(model, store, written, outputs=outputs).score(requests, None)
    np.testing.assert_array_equal(scores, NetworkRanker(model, store, loaded).score(requests, None))


def test_a_stopped_run_resumes_to_the_same_bits(log, tmp_path, monkeypatch, is_sparse):
    class Killed(BaseException):
        pass

    options = options_of("one-hot", checkpoint_s=0.0)
    whole = train_hiertcn(new_model(), *log, tmp_path / "whole", options)
    write = training.save_checkpoint

    def write_then_raise(path, tensors, meta):
        write(path, tensors, meta)
        if meta["progress"]["step"] == whole.steps * 3 // 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", write_then_raise)
        with pytest.raises(Killed):
            train_hiertcn(new_model(), *log, tmp_path / "model", options)
    train_hiertcn(new_model(9), *log, tmp_path / "model", options)
    for name in ("item_table/vectors.bin", "output_table/vectors.bin", "model.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_warm_start_takes_the_trained_rows_and_new_items_start_from_the_table(log, tmp_path):
    _, table, _ = log
    train_hiertcn(new_model(), *log, tmp_path / "first", options_of("fine-tuned"))
    trained = ItemTable.open(tmp_path / "first" / "item_table")
    options = options_of("fine-tuned", max_steps=1, learning_rate=1e-12)
    train_hiertcn(new_model(3), *log, tmp_path / "next", options, warm_start=tmp_path / "first")
    warm = ItemTable.open(tmp_path / "next" / "item_table")
    np.testing.assert_allclose(warm.vectors, trained.vectors, atol=1e-6)

    longer = np.concatenate([table.vectors, np.ones((2, DIM), np.float32)])
    grown = start_vectors("fine-tuned", ItemTable.write(tmp_path / "more", longer), CPU, seed=0)
    load_vectors(grown, tmp_path / "first")
    np.testing.assert_array_equal(grown.all()[:ITEMS].detach().numpy(), trained.vectors)
    assert (grown.all()[ITEMS:] == 1).all()
    narrow = TrainedVectors(torch.zeros(ITEMS, DIM - 1))
    with pytest.raises(InputError, match=f"expected width {DIM - 1}"):
        load_vectors(narrow, tmp_path / "first")


def test_frozen_vectors_write_nothing(log, tmp_path):
    save_vectors(FrozenVectors(log[1]), tmp_path, "float32")
    assert not any(tmp_path.iterdir())


def test_the_item_learning_rate_moves_the_vectors_alone(log, tmp_path):
    _, table, _ = log
    options = options_of("fine-tuned", max_steps=4, item_learning_rate=1e-12)
    train_hiertcn(new_model(), *log, tmp_path, options)
    written = ItemTable.open(tmp_path / "item_table")
    np.testing.assert_allclose(written.vectors, table.vectors, atol=1e-6)
    assert not torch.equal(load_hiertcn(tmp_path).head[0].weight, new_model().head[0].weight)
    with pytest.raises(InputError, match="item_vectors"):
        TrainOptions(item_vectors="thawed")
