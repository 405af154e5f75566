import numpy as np
import pytest
import torch

from hiertcn.errors import InputError
from hiertcn.evaluation.report import write_report
from hiertcn.files import read_json, write_json
from hiertcn.graph.walks import Neighborhoods, WalkOptions
from hiertcn.items.alignment import measure_drift, procrustes_rotation
from hiertcn.items.table import ItemTable
from hiertcn.training.checkpoints import save_weights
from hiertcn.training.item_continuity import continue_table
from hiertcn.training.item_inference import embed_items
from models.graphsage import GraphSAGE, GraphSAGEConfig, load_graphsage

ITEMS, DIM = 60, 8


def rotation(seed=0, dim=DIM):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


def unit(rows=ITEMS, seed=1, dim=DIM):
    vectors = np.random.default_rng(seed).normal(size=(rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def neighborhoods(items=ITEMS, seed=2):
    rows = np.random.default_rng(seed).integers(0, items, (items, 3)).astype(np.int32)
    return Neighborhoods(rows, np.full((items, 3), 1 / 3, np.float32), WalkOptions(top=3))


def written_encoder(directory, items=ITEMS, seed=3):
    torch.manual_seed(seed)
    encoder = GraphSAGE(GraphSAGEConfig(items=items, feature_dim=0, dim=DIM, hidden=10)).eval()
    directory.mkdir()
    write_json(directory / "config.json", encoder.config.to_dict())
    write_json(directory / "curve.json", {"train_loss": [2.0, 1.0]})
    save_weights(encoder, directory / "model.safetensors")
    return encoder


def test_a_turned_table_is_turned_back():
    then, turn = unit(), rotation()
    now = (then @ turn.T).astype(np.float32)
    found = procrustes_rotation(now, then)
    np.testing.assert_allclose(found, turn, atol=1e-5)
    drift = measure_drift(now, then, found, aligned=True)
    assert drift.aligned_cosine == pytest.approx(1, abs=1e-5)
    assert drift.neighbor_overlap == 1 and drift.cosine < 0.9
    with pytest.raises(InputError, match="the same items in the same width"):
        procrustes_rotation(now, then[:, :-1])


def test_the_rotation_is_orthogonal_and_no_other_is_better():
    now, then = unit(seed=4), unit(seed=5)
    found = procrustes_rotation(now, then)
    np.testing.assert_allclose(found @ found.T, np.eye(DIM), atol=1e-12)
    best = np.linalg.norm(now @ found - then)
    for seed in range(30):
        # Small turns away from it, and any others.
        near = found @ np.linalg.qr(np.eye(DIM) + 0.05 * rotation(seed))[0]
        for other in (near, rotation(seed)):
            assert np.linalg.norm(now @ other - then) >= best


def test_neighbor_overlap_by_hand():
    then = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]], np.float32)
    now = then[[0, 2, 1, 3]]
    drift = measure_drift(now, then, np.eye(2), aligned=False, neighbors=1)
    # Then 0-1 and 2-3 were pairs; now 0-2 and 1-3 are.
    assert drift.neighbor_overlap == 0 and drift.items == 4


def test_an_aligned_encoder_embeds_near_the_earlier_table(tmp_path):
    encoder, around = written_encoder(tmp_path / "encoder"), neighborhoods()
    before = embed_items(encoder, None, around)
    moved = before @ rotation() + 0.05 * unit(seed=6)
    # The earlier table is of fewer items, and ends in a popularity prior that must not matter.
    known = ITEMS - 9
    prior = np.full((known, 1), 7.0)
    table = ItemTable.write(tmp_path / "table", np.hstack([moved[:known], prior]), "float32")
    kept = continue_table(encoder, None, around, table, tmp_path / "encoder", align=False)
    np.testing.assert_array_equal(embed_items(encoder, None, around), before)
    drift = continue_table(encoder, None, around, table, tmp_path / "encoder", align=True)
    assert kept.cosine == drift.cosine < 0.5 < 0.95 < drift.aligned_cosine
    after = embed_items(load_graphsage(tmp_path / "encoder"), None, around)
    cosine = (after[:known] * moved[:known]).sum(1) / np.linalg.norm(moved[:known], axis=1)
    assert cosine.mean() == pytest.approx(drift.aligned_cosine, abs=1e-5)
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-5)
    curve = read_json(tmp_path / "encoder" / "curve.json")
    assert curve["drift"] == drift.to_dict() and curve["train_loss"] == [2.0, 1.0]
    write_report(tmp_path / "report.html", encoder_curve=curve)
    page = (tmp_path / "report.html").read_text()
    assert "Item vectors since the serving release" in page and "vectors rotated" in page
    assert f"{drift.cosine:.4g}" in page and f"{drift.aligned_cosine:.4g}" in page


def test_tables_of_another_width_are_not_compared(tmp_path, caplog):
    encoder = written_encoder(tmp_path / "encoder")
    table = ItemTable.write(tmp_path / "table", unit(dim=DIM), "float32")
    again = continue_table(encoder, None, neighborhoods(), table, tmp_path / "encoder", align=True)
    assert again is None and "cannot be compared" in caplog.text
    assert "drift" not in read_json(tmp_path / "encoder" / "curve.json")
