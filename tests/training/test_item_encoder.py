import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hiertcn.errors import InputError
from hiertcn.graph.blocks import BlockBuilder
from hiertcn.graph.csr import CSR
from hiertcn.graph.walks import importance_neighborhoods
from hiertcn.training import item_encoder
from hiertcn.training.item_batches import adjacency, feature_tensors
from hiertcn.training.item_encoder import train_item_encoder
from hiertcn.training.item_encoder_options import ItemEncoderOptions
from hiertcn.training.item_hard_negatives import HardNegatives
from hiertcn.training.item_hit_rate import answer_ranks, hit_rate
from hiertcn.training.item_inference import embed_items
from hiertcn.training.item_pairs import HeldOutEdges, PairSampler, hold_out_edges
from hiertcn.training.item_spectral_start import spectral_vectors
from models import graphsage
from models.graphsage import GraphSAGE, GraphSAGEConfig, load_graphsage
from models.item_encoder_serving import NewItemEncoder

OPTIONS = ItemEncoderOptions(epochs=3, batch=64, negatives=32, steps_per_epoch=20, seed=1)


def communities(groups=6, size=12, degree=6, seed=0):
    """Items of one group are neighbors, a few chance pairs are not."""
    rng = np.random.default_rng(seed)
    items = groups * size
    weights = np.zeros((items, items), np.float32)
    for one in range(items):
        others = one // size * size + rng.choice(size, degree, replace=False)
        others = np.append(others, rng.integers(items))
        weights[one, others] += rng.integers(1, 5, len(others))
    weights = weights + weights.T
    np.fill_diagonal(weights, 0)
    rows, columns = weights.nonzero()
    return CSR(
        indptr=np.searchsorted(rows, np.arange(items + 1)).astype(np.int64),
        indices=columns.astype(np.int32),
        weights=weights[rows, columns],
    )


def empty(items):
    return CSR(np.zeros(items + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


def noisy_features(items, width=4, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(items, width)).astype(np.float32)
    present = rng.random(items) < 0.8
    values[~present] = 0
    return SimpleNamespace(values=values, present=present)


def make_encoder(csr, features=None, **changes):
    torch.manual_seed(0)
    width = 0 if features is None else features.values.shape[1]
    fields = {"items": csr.items, "feature_dim": width, "dim": 16, "hidden": 16, **changes}
    return GraphSAGE(GraphSAGEConfig(**fields))


def train(csr, output, features=None, options=OPTIONS, encoder=None, **more):
    encoder = encoder or make_encoder(csr, features)
    neighborhoods = importance_neighborhoods(csr, top=5, progress=False)
    summary = train_item_encoder(encoder, features, neighborhoods, csr, output, options, **more)
    return encoder, neighborhoods, summary


@pytest.mark.parametrize("loss", ["softmax", "nce", "max_margin"])
def test_the_encoder_learns_what_random_vectors_do_not_know(loss, tmp_path):
    # Enough items that ten random ones are few, and enough held-out edges to measure by.
    csr, features = communities(groups=25), noisy_features(300)
    options = replace(
        OPTIONS,
        loss=loss,
        epochs=10,
        patience=10,
        validation_share=0.1,
        temperature=0.3 if loss == "nce" else 0.1,
        hard_negatives=2 if loss == "max_margin" else 0,
    )
    _, _, summary = train(csr, tmp_path, features, options)
    assert summary.held_out_edges > 100
    others = summary.baseline_hit_rates
    assert set(others) == {"features", "popularity", "random"}
    assert summary.hit_rate > 2 * max(others.values())
    assert summary.train_loss[-1] < summary.train_loss[0]
    assert max(summary.validation_hit_rate) == pytest.approx(summary.hit_rate)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "curve.json",
        "model.safetensors",
    ]
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve["hit_rate"] == summary.hit_rate


def test_the_final_epochs_teach_the_held_out_edges_without_being_measured(tmp_path):
    csr = communities(groups=25)
    found = {}
    for final in (0, 4):
        options = replace(OPTIONS, validation_share=0.1, final_epochs=final)
        encoder, neighborhoods, summary = train(csr, tmp_path / str(final), options=options)
        held = hold_out_edges(csr, share=0.1, most=5_000, seed=OPTIONS.seed)
        vectors = embed_items(encoder, None, neighborhoods)
        found[final] = summary.hit_rate, hit_rate(vectors, held)
        assert summary.steps == 60
    assert found[0][0] == found[4][0]
    assert found[4][1] > found[0][1]


def test_layer_wise_inference_equals_minibatch_inference(tmp_path):
    csr, features = communities(), noisy_features(72)
    encoder = make_encoder(csr, features).eval()
    neighborhoods = importance_neighborhoods(csr, top=5, progress=False)
    found = embed_items(encoder, features, neighborhoods, batch=17)
    for targets in np.array_split(np.arange(72), 5):
        rows, blocks = BlockBuilder(neighborhoods).build(targets, 2)
        given, present = feature_tensors(features, rows)
        with torch.no_grad():
            expected = encoder(
                torch.from_numpy(rows), given, present, [adjacency(block) for block in blocks]
            )
        np.testing.assert_allclose(found[targets], expected.numpy(), atol=1e-6)
    mapped = embed_items(
        encoder, features, neighborhoods, 9, output=tmp_path / "v.npy", memory_items=10
    )
    np.testing.assert_allclose(mapped, found, atol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), mapped)
    assert [p.name for p in tmp_path.iterdir()] == ["v.npy"]


@pytest.mark.parametrize("pooling", ["mean", "max", "graphsage"])
def test_layer_wise_inference_equals_minibatch_inference_for_every_pooling(pooling):
    csr = communities(groups=3)
    encoder = make_encoder(csr, pooling=pooling).eval()
    neighborhoods = importance_neighborhoods(csr, top=5, progress=False)
    rows, blocks = BlockBuilder(neighborhoods).build(np.arange(36), 2)
    given, present = feature_tensors(None, rows)
    with torch.no_grad():
        expected = encoder(
            torch.from_numpy(rows), given, present, [adjacency(block) for block in blocks]
        )
    found = embed_items(encoder, None, neighborhoods, batch=10)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_an_item_that_left_the_log_keeps_its_row(tmp_path):
    csr = communities(groups=5)
    earlier, neighborhoods, _ = train(csr, tmp_path / "a")
    before = embed_items(earlier, None, neighborhoods)
    # Item 7 has not been seen for longer than the graph's window.
    sources = np.repeat(np.arange(60), csr.degrees)
    stays = (sources != 7) & (csr.indices != 7)
    later = CSR(
        np.searchsorted(sources[stays], np.arange(61)).astype(np.int64),
        csr.indices[stays],
        csr.weights[stays],
    )
    options = replace(OPTIONS, epochs=1, max_steps=1, lr=1e-12)
    encoder, walked, _ = train(later, tmp_path / "b", options=options, warm_start=tmp_path / "a")
    after = embed_items(encoder, None, walked)
    assert after.shape == before.shape and np.isfinite(after).all()
    assert np.linalg.norm(after[7]) == pytest.approx(1)
    # All it has left is its learned vector, which keeps it near where it was.
    closest = np.argmax(after[7] @ before.T)
    assert closest // 12 == 7 // 12


def test_features_that_are_not_finite_are_refused_before_they_spread():
    csr, features = communities(), noisy_features(72)
    neighborhoods = importance_neighborhoods(csr, top=5, progress=False)
    encoder = make_encoder(csr, features)
    absent, row = int((~features.present).argmax()), int(features.present.argmax())
    features.values[absent] = np.nan
    assert np.isfinite(embed_items(encoder, features, neighborhoods)).all()
    features.values[row, 0] = np.inf
    with pytest.raises(InputError, match=f"item row {row} are not all finite"):
        embed_items(encoder, features, neighborhoods)


def test_sparse_gradients_of_many_items_teach_the_same_first_step(tmp_path, monkeypatch):
    csr, options = communities(), replace(OPTIONS, epochs=1, max_steps=1, id_dropout=0.3)
    dense, _, _ = train(csr, tmp_path / "dense", options=options)
    monkeypatch.setattr(graphsage, "DENSE_ITEMS", 10)
    sparse, _, _ = train(csr, tmp_path / "sparse", options=options)
    assert sparse.has_sparse_gradients and not dense.has_sparse_gradients
    for name, value in dense.state_dict().items():
        # SparseAdam adds its epsilon elsewhere, which decides where a gradient is nearly 0; a step
        # is 0.01 long.
        same = torch.isclose(sparse.state_dict()[name], value, atol=5e-4, rtol=1e-3)
        assert same.float().mean() > 0.99, name
    _, _, summary = train(csr, tmp_path / "more", options=replace(OPTIONS, epochs=2))
    assert summary.hit_rate > 0.2


def test_id_vectors_start_where_the_graph_already_says_what_goes_together(tmp_path):
    csr = communities()
    started, _, _ = train(csr, tmp_path / "started", options=replace(OPTIONS, max_steps=1))
    drawn, _, _ = train(
        csr, tmp_path / "drawn", options=replace(OPTIONS, max_steps=1, spectral_start_items=71)
    )

    def share_of_own_group(encoder):
        vectors = torch.nn.functional.normalize(encoder.id_vectors.weight.detach(), dim=1)
        nearest = (vectors @ vectors.T).fill_diagonal_(-1).argmax(dim=1)
        return float((nearest // 12 == torch.arange(72) // 12).float().mean())

    assert share_of_own_group(started) > 0.9 > 0.5 > share_of_own_group(drawn)
    alone = spectral_vectors(empty(5), 4)
    assert alone.shape == (5, 0)


def test_spectral_vectors_are_the_leading_part_of_the_positive_information():
    csr = communities(groups=2, size=5, degree=3)
    dense = np.zeros((10, 10))
    for row in range(10):
        part = slice(csr.indptr[row], csr.indptr[row + 1])
        dense[row, csr.indices[part]] = csr.weights[part]
    both = dense + dense.T
    with np.errstate(divide="ignore"):
        information = np.log(both * both.sum() / np.outer(both.sum(0), both.sum(1)))
    left, values, _ = np.linalg.svd(np.maximum(information, 0))
    expected = left[:, :4] * np.sqrt(values[:4])
    found = spectral_vectors(csr, 4)
    # Up to the signs of the columns.
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * signs, expected / expected.std(), atol=1e-3)


def test_a_killed_training_resumes_to_the_same_bits(tmp_path, monkeypatch):
    csr, features = communities(), noisy_features(72)
    whole, _, _ = train(csr, tmp_path / "whole", features)
    save_progress = item_encoder.save_progress

    def save_then_die(*arguments):
        save_progress(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(item_encoder, "save_progress", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(csr, tmp_path / "killed", features)
    assert not (tmp_path / "killed" / "config.json").exists()
    resumed, _, summary = train(csr, tmp_path / "killed", features)
    assert summary.resumed_epochs == 1
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_another_trainings_checkpoint_is_not_resumed(tmp_path, monkeypatch):
    csr = communities()
    with monkeypatch.context() as patch:
        patch.setattr(item_encoder, "remove_checkpoint", lambda output: None)
        train(csr, tmp_path, options=replace(OPTIONS, epochs=1))
    assert train(csr, tmp_path, options=replace(OPTIONS, epochs=1))[2].resumed_epochs == 1
    assert train(csr, tmp_path, options=replace(OPTIONS, epochs=1, seed=5))[2].resumed_epochs == 0


def test_warm_start_keeps_earlier_rows_and_grows(tmp_path):
    small, large = communities(groups=5), communities(groups=6)
    earlier, _, _ = train(small, tmp_path / "a")
    options = replace(OPTIONS, epochs=1, max_steps=1, lr=1e-12)
    later, _, summary = train(large, tmp_path / "b", options=options, warm_start=tmp_path / "a")
    assert "id_vectors.weight" in summary.warm_started
    before, after = earlier.id_vectors.weight, later.id_vectors.weight
    assert len(after) == 72 and torch.allclose(before, after[:60], atol=1e-6)
    wider = make_encoder(large, hidden=8)
    _, _, summary = train(large, tmp_path / "c", encoder=wider, warm_start=tmp_path / "a")
    assert "id_vectors.weight" not in summary.warm_started
    with pytest.raises(InputError, match="does not exist"):
        train(large, tmp_path / "d", warm_start=tmp_path / "nowhere")


def test_wide_features_do_not_collapse_the_vectors(tmp_path):
    csr, features = communities(groups=25), noisy_features(300, width=160)
    _, _, summary = train(csr, tmp_path, features, replace(OPTIONS, epochs=12, patience=12))
    assert summary.hit_rate > 4 * summary.baseline_hit_rates["random"]


def test_an_item_of_features_alone_lands_among_its_like(tmp_path):
    csr, rng = communities(groups=10), np.random.default_rng(0)
    centers = rng.normal(size=(10, 8)).astype(np.float32)
    groups = np.repeat(np.arange(10), 12)
    values = centers[groups] + rng.normal(scale=0.5, size=(120, 8)).astype(np.float32)
    features = SimpleNamespace(values=values, present=np.ones(120, np.bool_))
    encoder, walked, _ = train(csr, tmp_path, features, replace(OPTIONS, epochs=5))
    vectors = embed_items(encoder, features, walked)
    new = torch.from_numpy(values + rng.normal(scale=0.2, size=(120, 8)).astype(np.float32))
    found = NewItemEncoder(encoder)(
        new, torch.ones(120, 1, dtype=torch.int32), torch.zeros(120, 1, 32), torch.zeros(120, 1)
    )
    closest = np.argmax(found.numpy() @ vectors.T, axis=1)
    assert (groups[closest] == groups).mean() > 0.8


def test_dropped_neighborhoods_teach_what_stands_for_missing_neighbors(tmp_path):
    csr, features = communities(groups=3), noisy_features(36)
    moved = {}
    for share in (0.0, 0.1):
        encoder = make_encoder(csr, features)
        before = [layer.no_neighbors.detach().clone() for layer in encoder.convolutions]
        options = replace(OPTIONS, epochs=1, validation_share=0, neighborhood_dropout=share)
        train(csr, tmp_path / str(share), features, options, encoder)
        moved[share] = [
            not torch.equal(layer.no_neighbors, was)
            for layer, was in zip(encoder.convolutions, before, strict=True)
        ]
    # No item of this graph is alone by itself.
    assert moved == {0.0: [False, False], 0.1: [True, True]}


def test_items_without_features_keep_their_neighbors_in_training(tmp_path):
    csr = communities(groups=3)
    weights = []
    for share in (0.0, 0.9):
        options = replace(OPTIONS, epochs=1, neighborhood_dropout=share)
        weights.append(train(csr, tmp_path / str(share), options=options)[0].state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_target_that_is_to_be_alone_is_as_in_a_graph_without_its_edges():
    csr, features = communities(groups=3), noisy_features(36)
    encoder = make_encoder(csr, features).eval()
    neighborhoods = importance_neighborhoods(csr, top=5, progress=False)
    alone = np.arange(36) % 4 == 1
    rows, blocks = BlockBuilder(neighborhoods).build(np.arange(36), 2, alone)
    given, present = feature_tensors(features, rows)
    with torch.no_grad():
        found = encoder(
            torch.from_numpy(rows), given, present, [adjacency(block) for block in blocks]
        )
    without = replace(
        neighborhoods,
        rows=np.where(alone[:, None], -1, neighborhoods.rows),
        weights=np.where(alone[:, None], np.float32(0), neighborhoods.weights),
    )
    np.testing.assert_allclose(found, embed_items(encoder, features, without), atol=1e-6)


@pytest.mark.parametrize("items", [1, 4])
def test_no_edges_trains_nothing_and_still_embeds(items, tmp_path):
    _, neighborhoods, summary = train(empty(items), tmp_path)
    assert (summary.steps, summary.hit_rate, summary.held_out_edges) == (0, None, 0)
    vectors = embed_items(load_graphsage(tmp_path), None, neighborhoods)
    assert np.isfinite(vectors).all() and vectors.shape == (items, 16)


def test_held_out_edges_leave_no_trace_in_the_training_graph():
    csr = communities()
    held = hold_out_edges(csr, share=0.1, most=20, seed=0)
    assert len(held.queries) == 20
    kept = set(
        zip(
            np.repeat(np.arange(csr.items), held.training.degrees).tolist(),
            held.training.indices.tolist(),
            strict=True,
        )
    )
    for query, answer in zip(held.queries.tolist(), held.answers.tolist(), strict=True):
        assert (query, answer) not in kept and (answer, query) not in kept
    assert len(held.training.indices) == len(csr.indices) - 40


def test_ranks_by_hand_and_ties_count_against_the_answer():
    vectors = np.array([[1, 0], [0.9, 0], [0.8, 0], [0.8, 0], [0.1, 0]], np.float32)
    training = CSR(np.array([0, 1, 1, 1, 1, 1]), np.array([1], np.int32), np.array([1], np.float32))
    held = HeldOutEdges(training, np.array([0, 1]), np.array([2, 4]))
    # Query 0 knows item 1, so 2 ties with 3; query 1 ranks 0, 2 and 3 before 4.
    assert answer_ranks(vectors, held).tolist() == [2, 4]


def test_hard_negatives_have_a_middle_walk_rank_and_are_never_neighbors():
    csr = communities(groups=4, size=30)
    queries = np.tile(np.arange(csr.items), 2)
    ranks = (0, 10_000)  # of 120 items: the first 12
    hard = HardNegatives(csr, ranks=ranks, seed=3).draw(np.random.default_rng(0), queries, 4)
    neighbors = [set(csr.indices[csr.indptr[q] : csr.indptr[q + 1]].tolist()) for q in queries]
    for query, near, drawn in zip(queries.tolist(), neighbors, hard.tolist(), strict=True):
        assert not near & set(drawn) and query not in drawn
    # The communities' own items are visited first, and uniform draws would be theirs in 1 of 4.
    assert (hard // 30 == queries[:, None] // 30).mean() > 0.8
    # Asked in another order and in parts, the same candidates are found.
    parts = HardNegatives(csr, ranks=ranks, seed=3)
    parts.draw(np.random.default_rng(9), queries[::-7], 1)
    assert np.array_equal(parts.draw(np.random.default_rng(0), queries, 4), hard)
    far = HardNegatives(csr, ranks=(50_000, 60_000)).draw(np.random.default_rng(0), queries, 4)
    assert (far // 30 == queries[:, None] // 30).mean() < 0.4


def test_hard_negatives_of_exact_ranks():
    # Item 0 walks to 1, from there to 2, 3 or 4 with these odds; 5 is never reached.
    weights = np.zeros((6, 6), np.float32)
    weights[0, 1] = weights[1, 0] = 1
    weights[1, 2:5] = weights[2:5, 1] = [9, 3, 1]
    rows, columns = weights.nonzero()
    csr = CSR(
        np.searchsorted(rows, np.arange(7)).astype(np.int64),
        columns.astype(np.int32),
        weights[rows, columns],
    )
    for rank, item in enumerate([2, 3, 4]):
        scaled = (rank * 100_000 // 6 + 1, (rank + 1) * 100_000 // 6 + 1)
        hard = HardNegatives(csr, ranks=scaled).draw(np.random.default_rng(0), np.array([0]), 5)
        assert hard.tolist() == [[item] * 5]
    with pytest.raises(InputError, match="two ascending ranks"):
        ItemEncoderOptions(hard_ranks=(5, 5))


def test_hard_negatives_come_one_more_each_epoch(tmp_path, monkeypatch):
    asked = []
    draw = PairSampler.draw

    def count(sampler, rng, batch, shared, hard):
        asked.append(hard)
        pairs = draw(sampler, rng, batch, shared, hard)
        assert pairs.hard.shape == (batch, hard)
        return pairs

    monkeypatch.setattr(PairSampler, "draw", count)
    options = replace(OPTIONS, epochs=4, steps_per_epoch=2, hard_negatives=2, final_epochs=0)
    train(communities(), tmp_path, options=options)
    assert asked == [0, 0, 1, 1, 2, 2, 2, 2]


def test_disagreeing_inputs_are_named(tmp_path):
    csr, features = communities(), noisy_features(72)
    with pytest.raises(InputError, match="4 features and the encoder's feature_dim is 0"):
        train(csr, tmp_path, features, encoder=make_encoder(csr))
    with pytest.raises(InputError, match="id vectors of 3 items and the graph has 72"):
        train(csr, tmp_path, encoder=make_encoder(csr, items=3))
    row = int(features.present.argmax())
    features.values[row, 1] = np.nan
    with pytest.raises(InputError, match=f"item row {row} are not all finite"):
        train(csr, tmp_path, features)
    with pytest.raises(InputError, match="loss is 'l3'"):
        ItemEncoderOptions(loss="l3")
    for name in ("id_dropout", "neighborhood_dropout", "validation_share"):
        with pytest.raises(InputError, match=f"{name} is 1.0; expected a share"):
            ItemEncoderOptions(**{name: 1.0})
