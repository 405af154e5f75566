import numpy as np
import pytest
import torch

from hiertcn.errors import InputError
from hiertcn.files import write_json
from hiertcn.graph.blocks import BlockBuilder
from hiertcn.graph.walks import Neighborhoods, WalkOptions
from hiertcn.training.checkpoints import save_weights
from hiertcn.training.item_batches import WeightedSum, adjacency, transposed
from models.graphsage import POOLINGS, GraphSAGE, GraphSAGEConfig, PinSageConv, load_graphsage

# Item 3 has no neighbors.
NEIGHBORHOODS = Neighborhoods(
    np.array([[1, 2], [0, -1], [0, 1], [-1, -1]], np.int32),
    np.array([[0.75, 0.25], [1, 0], [0.5, 0.5], [0, 0]], np.float32),
    WalkOptions(top=2),
)


def make_encoder(**changes):
    torch.manual_seed(0)
    fields = {"items": 4, "feature_dim": 3, "dim": 5, "hidden": 6, **changes}
    return GraphSAGE(GraphSAGEConfig(**fields)).eval()


def embed(encoder, targets, features, present, neighborhoods=NEIGHBORHOODS):
    rows, blocks = BlockBuilder(neighborhoods).build(np.array(targets), encoder.layers)
    taken = torch.from_numpy(rows)
    with torch.no_grad():
        return encoder(
            taken, features[taken], present[taken], [adjacency(block) for block in blocks]
        )


def test_convolution_is_equation_18_with_importance_weights():
    torch.manual_seed(1)
    convolution = PinSageConv(6)
    z = torch.randn(4, 6)
    _, (block,) = BlockBuilder(NEIGHBORHOODS).build(np.arange(4), 1)
    found = convolution(z, adjacency(block))
    for u in range(4):
        aggregated = convolution.no_neighbors if u == 3 else torch.zeros(6)
        for v, weight in zip(NEIGHBORHOODS.rows[u], NEIGHBORHOODS.weights[u], strict=True):
            if v >= 0:
                message = torch.relu(convolution.neighbor.weight @ z[v] + convolution.neighbor.bias)
                aggregated = aggregated + float(weight) * message
        joined = torch.cat([z[u], aggregated])
        expected = torch.relu(convolution.combine.weight @ joined + convolution.combine.bias)
        assert torch.allclose(found[u], expected, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "max", "graphsage"])
def test_other_poolings_aggregate_the_same_neighbors(pooling):
    torch.manual_seed(1)
    convolution = PinSageConv(6, pooling)
    z = torch.randn(4, 6, requires_grad=True)
    _, (block,) = BlockBuilder(NEIGHBORHOODS).build(np.arange(4), 1)
    found = convolution(z, adjacency(block))
    rows = []
    for u in range(4):
        near = z[[int(v) for v in NEIGHBORHOODS.rows[u] if v >= 0]]
        if pooling != "graphsage":
            near = torch.relu(convolution.neighbor(near))
        pooled = near.max(dim=0).values if pooling == "max" and len(near) else near.mean(dim=0)
        joined = torch.cat([z[u], convolution.no_neighbors if u == 3 else pooled])
        rows.append(torch.relu(convolution.combine(joined)))
    expected = torch.stack(rows)
    assert torch.allclose(found, expected, atol=1e-6)
    taught = torch.autograd.grad(found.square().sum(), z, retain_graph=True)[0]
    assert torch.allclose(taught, torch.autograd.grad(expected.square().sum(), z)[0], atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dim", [128, 512])
def test_poolings_and_widths_embed_to_length_one(pooling, dim):
    encoder = make_encoder(pooling=pooling, dim=dim, hidden=dim)
    found = embed(encoder, [3, 0, 1], torch.randn(4, 3), torch.ones(4).bool())
    assert found.shape == (3, dim) and torch.allclose(found.norm(dim=1), torch.ones(3))
    with pytest.raises(InputError, match="pooling is 'sum'"):
        make_encoder(pooling="sum")


def test_output_has_length_one_and_does_not_depend_on_the_batch():
    encoder, features, present = make_encoder(), torch.randn(4, 3), torch.ones(4).bool()
    together = embed(encoder, [0, 1, 2, 3], features, present)
    assert together.shape == (4, 5)
    assert torch.allclose(together.norm(dim=1), torch.ones(4))
    for item in range(4):
        assert torch.allclose(embed(encoder, [item], features, present)[0], together[item])
    shuffled = embed(encoder, [2, 0], features, present)
    assert torch.allclose(shuffled, together[[2, 0]])


def test_order_of_neighbors_changes_nothing():
    encoder, features, present = make_encoder(), torch.randn(4, 3), torch.ones(4).bool()
    rows, weights = NEIGHBORHOODS.rows.copy(), NEIGHBORHOODS.weights.copy()
    rows[[0, 2]], weights[[0, 2]] = rows[[0, 2], ::-1], weights[[0, 2], ::-1]
    turned = Neighborhoods(rows, weights, NEIGHBORHOODS.options)
    assert torch.allclose(
        embed(encoder, [0, 2], features, present, turned),
        embed(encoder, [0, 2], features, present),
        atol=1e-6,
    )


def test_missing_features_are_masked_and_are_not_zeros():
    encoder, present = make_encoder(id_vectors=False), torch.tensor([True, False, True, False])
    features = torch.randn(4, 3)
    found = embed(encoder, [0, 1, 2, 3], features, present)
    poisoned = features.clone()
    poisoned[~present] = float("nan")
    assert torch.equal(embed(encoder, [0, 1, 2, 3], poisoned, present), found)
    zeros = features.clone()
    zeros[~present] = 0
    as_zeros = embed(encoder, [0, 1, 2, 3], zeros, torch.ones(4).bool())
    assert not torch.allclose(as_zeros[3], found[3], atol=1e-3)


def test_missing_features_give_finite_gradients():
    encoder = make_encoder()
    features = torch.full((4, 3), float("nan"))
    z = encoder.embed_inputs(torch.arange(4), torch.nan_to_num(features), torch.zeros(4).bool())
    z.sum().backward()
    assert encoder.missing.grad.abs().sum() > 0
    assert encoder.features.weight.grad.abs().sum() == 0


def test_items_beyond_the_id_vectors_are_embedded_from_features():
    encoder = make_encoder()
    z = encoder.embed_inputs(
        torch.tensor([-1, 4]), torch.ones(2, 3), torch.ones(2, dtype=torch.bool)
    )
    assert torch.allclose(z[0], encoder.features(torch.ones(3)))
    assert torch.equal(z[0], z[1])


def test_config_and_weights_round_trip(tmp_path):
    encoder, features, present = make_encoder(), torch.randn(4, 3), torch.ones(4).bool()
    assert GraphSAGEConfig.from_dict(encoder.config.to_dict()) == encoder.config
    write_json(tmp_path / "config.json", encoder.config.to_dict())
    save_weights(encoder, tmp_path / "model.safetensors")
    again = load_graphsage(tmp_path)
    assert torch.equal(
        embed(again, [0, 3], features, present), embed(encoder, [0, 3], features, present)
    )
    with pytest.raises(InputError, match="config does not fit"):
        GraphSAGEConfig.from_dict({"items": 1, "feature_dim": 1, "colour": 2})
    with pytest.raises(InputError, match="all items would look alike"):
        GraphSAGEConfig(items=3, feature_dim=0, id_vectors=False)


def test_weighted_sums_and_their_gradients_are_the_sparse_products():
    torch.manual_seed(2)
    dense = torch.rand(7, 9) * (torch.rand(7, 9) < 0.4)
    dense[3] = 0
    sparse = dense.to_sparse_csr()
    x = torch.randn(9, 4, requires_grad=True)
    taught = torch.randn(7, 4)
    found = WeightedSum.apply(x, sparse)
    torch.testing.assert_close(found, dense @ x)
    (gradient,) = torch.autograd.grad(found, x, taught)
    torch.testing.assert_close(gradient, dense.T @ taught)
    torch.testing.assert_close(transposed(sparse).to_dense(), dense.T)


@pytest.mark.parametrize("feature_dim", [0, 3])
def test_an_item_without_an_id_vector_teaches_none(feature_dim):
    encoder = make_encoder(feature_dim=feature_dim)
    encoder.id_vectors.sparse = True
    features, present = torch.randn(4, feature_dim), torch.ones(4, dtype=torch.bool)
    rows = torch.tensor([2, -1, 3, 9])
    z = encoder.embed_inputs(rows, features, present)
    nothing = encoder.features(features) if feature_dim else torch.zeros(4, 6)
    for place, row in enumerate(rows.tolist()):
        own = encoder.id_vectors.weight[row] if 0 <= row < 4 else torch.zeros(6)
        assert torch.allclose(z[place], nothing[place] + own)
    z.sum().backward()
    assert encoder.id_vectors.weight.grad.coalesce().indices().tolist() == [[2, 3]]
