"""What a loss asks for beyond the next item, against a loop over sessions."""

import numpy as np
import pytest
import torch

from hiertcn.errors import InputError
from hiertcn.sessions.batches import SessionBatches
from hiertcn.training.item_vectors import FrozenVectors
from hiertcn.training.lanes import to_tensors
from hiertcn.training.objective import Objective
from hiertcn.training.options import TrainOptions
from tests.session_logs import random_users, write_store, write_table

ITEMS, DIM = 15, 6


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    directory = tmp_path_factory.mktemp("log")
    users = random_users(np.random.default_rng(0), users=8, items=ITEMS)
    return write_store(directory, users, ITEMS), write_table(directory / "table", ITEMS, DIM)


def loss_of(log, **options):
    store, table = log
    batch = next(SessionBatches(store, lanes=3, sessions_per_step=4, max_length=5).epoch(0))
    tensors = to_tensors(batch, table)
    torch.manual_seed(0)
    u = torch.randn(len(tensors.targets), DIM)
    objective = Objective(
        store,
        FrozenVectors(table),
        np.bincount(store.item_rows, minlength=ITEMS),
        TrainOptions(**options),
        torch.device("cpu"),
    )
    return objective(u, tensors, np.random.default_rng(0)), u, tensors


@pytest.mark.parametrize("ahead", [1, 2, 4])
@pytest.mark.parametrize("loss", ["softmax", "l2"])
def test_positions_ahead_add_their_losses_within_the_session(log, loss, ahead):
    found, u, batch = loss_of(log, loss=loss, positions_ahead=ahead, ahead_decay=0.3)
    store, table = log
    vectors = torch.from_numpy(table.gather(np.arange(ITEMS)))
    expected = 0.0
    for embedding, place in zip(u, batch.interactions, strict=True):
        end = store.session_offsets[store.session_offsets > place][0]
        for distance in range(min(ahead, end - place)):
            target = int(store.item_rows[place + distance])
            if loss == "l2":
                one = torch.linalg.vector_norm(vectors[target] - embedding)
            else:
                one = -torch.log_softmax(vectors @ embedding, 0)[target]
            expected += 0.3**distance * float(one)
    assert float(found) == pytest.approx(expected / len(u), rel=1e-4)


def test_sampled_pools_mask_the_item_ahead_and_stay_finite(log):
    found, *_ = loss_of(log, positions_ahead=3, random_negatives=4, in_batch_negatives=4)
    alone, *_ = loss_of(log, random_negatives=4, in_batch_negatives=4)
    assert torch.isfinite(found) and found > alone


def test_options_are_checked():
    for name, value in (("positions_ahead", 0), ("ahead_decay", 0.0), ("ahead_decay", 1.5)):
        with pytest.raises(InputError, match=name):
            TrainOptions(**{name: value})
