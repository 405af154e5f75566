import json

import pytest
import torch

from hiertcn.errors import InputError
from models.hiertcn import HierTCN, HierTCNConfig, load_hiertcn, save_hiertcn

CONFIG = HierTCNConfig(item_dim=6, hidden=8, gru_layers=2, tcn_blocks=3, kernel=3, filters=10)


@pytest.fixture
def model():
    torch.manual_seed(3)
    return HierTCN(CONFIG).eval()


def test_every_position_has_a_row_and_the_first_sees_only_the_state(model):
    lengths = torch.tensor([3, 0, 2])
    items, state = torch.randn(5, 6), torch.randn(3, 8)
    u = model.encode(items, lengths, state)
    assert u.shape == (8, 6)
    start_only = model.encode(items[:0], torch.zeros(3, dtype=torch.int64), state)
    torch.testing.assert_close(u[[0, 4, 5]], start_only)


def test_no_row_depends_on_later_items(model):
    items, state = torch.randn(40, 6), torch.randn(1, 8)
    whole = model.encode(items, torch.tensor([40]), state)
    for seen in (0, 1, 7, 39):
        prefix = model.encode(items[:seen], torch.tensor([seen]), state)
        torch.testing.assert_close(prefix, whole[: seen + 1], atol=1e-6, rtol=1e-5)


def test_no_row_depends_on_the_other_sessions(model):
    lengths = torch.tensor([4, 1, 0, 9])
    items, state = torch.randn(14, 6), torch.randn(4, 8)
    together = model.encode(items, lengths, state).split((lengths + 1).tolist())
    for place, part in enumerate(items.split(lengths.tolist())):
        alone = model.encode(part, lengths[place : place + 1], state[place : place + 1])
        torch.testing.assert_close(alone, together[place], atol=1e-6, rtol=1e-5)


def test_the_state_reaches_every_position(model):
    items, lengths = torch.randn(9, 6), torch.tensor([9])
    state = torch.randn(1, 8)
    u, other = (model.encode(items, lengths, s) for s in (state, state + 0.5))
    assert ((u - other).abs().amax(1) > 1e-5).all()


def test_save_and_load_keep_scores(model, tmp_path):
    save_hiertcn(model, tmp_path)
    loaded = load_hiertcn(tmp_path)
    items, lengths, state = torch.randn(5, 6), torch.tensor([5]), torch.randn(1, 8)
    assert loaded.config == CONFIG
    assert torch.equal(model.encode(items, lengths, state), loaded.encode(items, lengths, state))
    before = torch.randn(2, 2, 8)
    mean = torch.randn(2, 6)
    assert torch.equal(model.gru_step(before, mean), loaded.gru_step(before, mean))


def test_damaged_files_are_refused(model, tmp_path):
    save_hiertcn(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is not a readable"):
        load_hiertcn(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden": 9}))
    with pytest.raises(InputError, match="does not fit the model"):
        load_hiertcn(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 9}))
    with pytest.raises(InputError, match="depth"):
        load_hiertcn(tmp_path)
    weights.unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not exist"):
        load_hiertcn(tmp_path)


@pytest.mark.parametrize(
    "field", [{"hidden": 0}, {"kernel": -1}, {"dropout": 1.0}, {"item_dim": 2.5}]
)
def test_sizes_are_checked(field):
    with pytest.raises(InputError, match=next(iter(field))):
        HierTCNConfig(**{"item_dim": 4, **field})
    assert HierTCNConfig.from_dict(CONFIG.to_dict()) == CONFIG
