"""The served networks equal the trained one, whatever the padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hiertcn.errors import InputError
from models.head import HEADS, HeadName
from models.hiertcn import HierTCN, HierTCNConfig
from models.hiertcn_serving import GruStep, TcnCone


def _model(seed: int, blocks: int = 2, kernel: int = 3, head: HeadName = "perceptron") -> HierTCN:
    torch.manual_seed(seed)
    config = HierTCNConfig(
        item_dim=5,
        hidden=4,
        gru_layers=2,
        tcn_blocks=blocks,
        kernel=kernel,
        filters=7,
        head=head,
    )
    return HierTCN(config).eval()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    blocks=st.integers(1, 4),
    kernel=st.integers(1, 5),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    padding=st.integers(0, 9),
    head=st.sampled_from(HEADS),
)
def test_the_cone_is_the_last_position_of_encode(
    seed: int, blocks: int, kernel: int, lengths: list[int], padding: int, head: HeadName
) -> None:
    model = _model(seed, blocks, kernel, head)
    sessions = [torch.randn(length, 5) for length in lengths]
    state = torch.randn(len(lengths), 4)
    with torch.no_grad():
        every = model.encode(torch.cat(sessions), torch.tensor(lengths), state)
        expected = every[(torch.tensor(lengths) + 1).cumsum(0) - 1]
        # Whatever stands beyond a session's start must not matter, NaN included.
        newest_first = torch.full((len(lengths), max(lengths) + padding, 5), torch.nan)
        for row, items in enumerate(sessions):
            newest_first[row, : len(items)] = items.flip(0)
        got = TcnCone(model)(
            newest_first, torch.tensor(lengths, dtype=torch.int32).unsqueeze(1), state
        )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("told", ["cut", "whole"])
def test_a_session_may_be_cut_to_the_receptive_field(told: str) -> None:
    model = _model(0)
    items, state = torch.randn(60, 5), torch.randn(1, 4)
    kept = model.receptive_field
    length = torch.tensor([[kept if told == "cut" else 60]], dtype=torch.int32)
    with torch.no_grad():
        expected = model.encode(items, torch.tensor([60]), state)[-1:]
        got = TcnCone(model)(items.flip(0)[:kept].unsqueeze(0), length, state)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_step_is_the_models_and_keeps_its_weights() -> None:
    model = _model(1)
    state, mean = torch.randn(3, 2, 4), torch.randn(3, 5)
    with torch.no_grad():
        expected = model.gru_step(state, mean)
        step = GruStep(model)
        for weight in model.parameters():
            weight.zero_()
        torch.testing.assert_close(step(state, mean), expected)


def test_dilations_that_cannot_be_thinned_are_refused() -> None:
    model = _model(0)
    model.tcn.blocks = model.tcn.blocks[1:]
    with pytest.raises(InputError, match=r"dilations \[2\]"):
        TcnCone(model)
