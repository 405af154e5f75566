"""From training to the table that serves: configurations, warm starts, frozen and tuned vectors."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from components.train_hiertcn import train_hiertcn
from components.tune_item_table import tune_item_table
from hiertcn.items.neighbors import NeighborIndex
from hiertcn.items.table import ItemTable
from hiertcn.release.repository import ReleaseRepository
from hiertcn.sessions.request_features import FEATURES
from models.hiertcn import HierTCN, load_hiertcn, save_hiertcn
from tests.session_logs import random_users, write_store

ITEMS, UNSEEN, DIM, PARENT = 20, 3, 5, 2026010101


class Inputs:
    """A session store, whose last items nobody chose, beside two tables of its items."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        write_store(folder, random_users(rng, users=30, items=ITEMS - UNSEEN), ITEMS)
        for name in ("training_table", "embedded_table"):
            vectors = rng.normal(size=(ITEMS, DIM)).astype(np.float32)
            ItemTable.write(folder / name, vectors, "float16")

    def artifact(self, name: str) -> Any:
        path = self.folder / name
        return SimpleNamespace(name=path.name, path=str(path), uri=str(path), metadata={})

    def train(self, model: str, **changes: Any) -> HierTCN:
        train_hiertcn(
            **{
                "items_lineage": "items",
                "sessions_lineage": "sessions",
                "configuration": "best",
                "item_vectors": "auto",
                "hidden": 8,
                "lanes": 4,
                "sessions_per_step": 2,
                "learning_rate": 1e-2,
                "max_epochs": 1,
                "max_steps": 4,
                "patience": 3,
                "seed": 0,
                "checkpoint_store": "",
                "repository": str(self.folder / "repository"),
                "parent_release": 0,
                "sessions": self.artifact("store"),
                "training_table": self.artifact("training_table"),
                "model": self.artifact(model),
                **changes,
            }
        )
        return load_hiertcn(self.folder / model)

    def serve(self, model: str) -> ItemTable:
        """Publish nothing, but make the table and index that would be published."""
        tune_item_table(
            "lineage",
            "int8",
            0,
            self.artifact("embedded_table"),
            self.artifact("training_table"),
            self.artifact(model),
            self.artifact("item_table"),
            self.artifact("neighbor_index"),
        )
        table = ItemTable.open(self.folder / "item_table")
        assert NeighborIndex.open(self.folder / "neighbor_index", table).recall == 1.0
        return table


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


def network_of(model: HierTCN) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("terms.")}


def test_best_has_every_term_and_paper_none(inputs: Inputs) -> None:
    best = inputs.train("best").config
    assert (best.terms, best.head) == (FEATURES, "linear")
    assert (inputs.folder / "best" / "transitions").is_dir()
    assert (inputs.folder / "best" / "item_table").is_dir()
    paper = inputs.train("paper", configuration="paper")
    assert paper.terms is None
    assert (paper.config.hidden, paper.config.gru_layers, paper.config.filters) == (8, 4, 128)
    assert paper.config.head == "perceptron"
    assert not (inputs.folder / "paper" / "transitions").exists()
    assert not (inputs.folder / "paper" / "item_table").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"configuration": "worst"}, "configuration is 'worst'; expected best or paper"),
        ({"item_vectors": "learned"}, "item_vectors is 'learned'; expected auto, frozen or"),
    ],
)
def test_unknown_choices_are_refused(
    inputs: Inputs, changes: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        inputs.train("model", **changes)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_parent_with_other_terms_still_gives_its_network(
    inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = ReleaseRepository(inputs.folder / "repository").path(PARENT) / "model"
    relative = str(parent.relative_to(inputs.folder))
    trained = inputs.train(relative)
    before = HierTCN(replace(trained.config, terms=FEATURES[:1]))
    before.load_state_dict(network_of(trained), strict=False)
    save_hiertcn(before, parent)
    still = {"parent_release": PARENT, "learning_rate": 1e-9, "max_steps": 1}
    after = inputs.train("best", **still)
    for name, value in network_of(before).items():
        torch.testing.assert_close(network_of(after)[name], value, atol=1e-6, rtol=0)
    # Terms were fitted, though the parent had others.
    assert after.terms is not None and bool((after.terms.gate.weight != 0).any())
    assert "another shape" not in capsys.readouterr().err

    for changes in ({"hidden": 6}, {"configuration": "paper"}):
        inputs.train("other", **changes, **still)
        assert "another shape; training from scratch" in capsys.readouterr().err


def test_frozen_vectors_serve_the_newest_table_as_it_is(inputs: Inputs) -> None:
    inputs.train("model", configuration="paper")
    newest = ItemTable.open(inputs.folder / "embedded_table")
    assert inputs.serve("model").checksum == newest.checksum


def test_tuned_vectors_serve_what_they_learnt_on_the_newest_table(inputs: Inputs) -> None:
    tuned = {"configuration": "paper", "item_vectors": "fine-tuned", "learning_rate": 1.0}
    inputs.train("model", **tuned)
    start, newest, trained = (
        np.asarray(ItemTable.open(inputs.folder / name).vectors, np.float32)
        for name in ("training_table", "embedded_table", "model/item_table")
    )
    served = np.asarray(inputs.serve("model").vectors, np.float32)
    learnt = slice(ITEMS - UNSEEN)
    assert (np.abs(trained - start)[learnt].max(1) > 1e-3).all()
    np.testing.assert_allclose(
        (served - newest)[learnt], (trained - start)[learnt], atol=4e-3, rtol=0
    )
    # Nobody chose these in training, so nothing was learnt about them.
    np.testing.assert_array_equal(trained[learnt.stop :], start[learnt.stop :])
    np.testing.assert_array_equal(served[learnt.stop :], newest[learnt.stop :])
