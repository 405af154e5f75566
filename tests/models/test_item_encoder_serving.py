"""The item encoder alone: an item from features and neighbors is what it would be in the graph."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hiertcn.export.onnx import export_model
from hiertcn.export.parity import prove_parity
from hiertcn.export.session import open_session
from hiertcn.export.tensors import INPUTS, ITEM_ENCODER, NEIGHBOR_LAYERS, NEIGHBOR_WEIGHTS, OUTPUTS
from hiertcn.graph.walks import NO_ITEM, Neighborhoods, WalkOptions
from hiertcn.training.item_inference import embed_items
from models.graphsage import GraphSAGE, GraphSAGEConfig
from models.item_encoder_serving import NewItemEncoder

ITEMS, NEW, TOP, FEATURES, HIDDEN = 20, 6, 4, 3, 5


@dataclass
class Features:
    values: np.ndarray
    present: np.ndarray


def _encoder(**changes) -> GraphSAGE:
    torch.manual_seed(0)
    fields = {"items": ITEMS, "feature_dim": FEATURES, "dim": 7, "hidden": HIDDEN, **changes}
    return GraphSAGE(GraphSAGEConfig(**fields)).eval()


def _neighborhoods(rng: np.random.Generator, items: int) -> Neighborhoods:
    """Neighbors are known items only: nobody neighbors one that comes later."""
    rows = np.full((items, TOP), NO_ITEM, np.int32)
    weights = np.zeros((items, TOP), np.float32)
    for item in range(items):
        count = item % (TOP + 1)
        rows[item, :count] = rng.choice(ITEMS, count, replace=False)
        drawn = rng.random(count).astype(np.float32)
        weights[item, :count] = drawn / max(drawn.sum(), 1e-9)
    return Neighborhoods(rows, weights, WalkOptions(top=TOP))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"id_vectors": False},
        {"layers": 3},
        {"pooling": "mean"},
        {"pooling": "max"},
        {"pooling": "graphsage"},
    ],
)
def test_new_items_equal_those_of_a_graph_that_holds_them(options) -> None:
    rng = np.random.default_rng(1)
    encoder = _encoder(**options)
    total = ITEMS + NEW
    features = Features(
        rng.normal(size=(total, FEATURES)).astype(np.float32), rng.random(total) < 0.7
    )
    both = _neighborhoods(rng, total)
    offline = embed_items(encoder, features, both, progress=False)

    layers = np.empty((ITEMS, encoder.layers * HIDDEN), np.float32)
    known = Neighborhoods(both.rows[:ITEMS], both.weights[:ITEMS], both.options)
    before = embed_items(encoder, features, known, layer_inputs=layers, progress=False)
    np.testing.assert_allclose(before, offline[:ITEMS], atol=1e-5)

    new_rows = both.rows[ITEMS:]
    present = features.present[ITEMS:]
    values = np.where(present[:, None], features.values[ITEMS:], np.nan).astype(np.float32)
    with torch.no_grad():
        alone = NewItemEncoder(encoder)(
            torch.from_numpy(values),
            torch.from_numpy(present.astype(np.int32)[:, None]),
            torch.from_numpy(np.where(new_rows[:, :, None] >= 0, layers[new_rows], 9.0)),
            torch.tensor(both.weights[ITEMS:]),
        ).numpy()
    assert (both.weights[ITEMS:].sum(axis=1) == 0).any()
    assert not present.all()
    np.testing.assert_allclose(alone, offline[ITEMS:], atol=1e-5)


def test_without_any_features_only_the_neighbors_tell_new_items_apart() -> None:
    encoder = NewItemEncoder(_encoder(feature_dim=0)).eval()
    layers = torch.rand(2, 1, 2 * HIDDEN)
    with torch.no_grad():
        found = encoder(
            torch.zeros(3, 1),
            torch.zeros(3, 1, dtype=torch.int32),
            torch.cat([layers, layers[:1]]),
            torch.tensor([[1.0], [1.0], [0.0]]),
        )
    assert torch.allclose(found.norm(dim=1), torch.ones(3))
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_the_exported_file_takes_any_batch_and_any_number_of_neighbors(tmp_path: Path) -> None:
    # The other poolings have fewer operators of their own.
    encoder = NewItemEncoder(_encoder(pooling="max")).eval()

    def case(batch: int, neighbors: int) -> tuple[torch.Tensor, ...]:
        weights = torch.rand(batch, neighbors)
        weights[0] = 0
        return (
            torch.randn(batch, FEATURES),
            (torch.arange(batch) % 2).to(torch.int32).unsqueeze(1),
            torch.randn(batch, neighbors, 2 * HIDDEN),
            weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9),
        )

    path = tmp_path / ITEM_ENCODER / "model.onnx"
    export_model(
        encoder,
        case(2, 3),
        INPUTS[ITEM_ENCODER],
        OUTPUTS[ITEM_ENCODER],
        path,
        dynamic_axes={NEIGHBOR_LAYERS.name: (1,), NEIGHBOR_WEIGHTS.name: (1,)},
    )
    assert [one.name for one in open_session(path).get_inputs()] == [
        spec.name for spec in INPUTS[ITEM_ENCODER]
    ]
    proof = prove_parity(encoder, path, [case(1, 1), case(3, 7), case(256, 2)])
    assert proof.max_error < 1e-5
