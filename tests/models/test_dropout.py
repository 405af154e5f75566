import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.dropout import Dropout


@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.sampled_from([0.0, 0.01, 0.3, 0.97]))
def test_values_are_zeroed_or_scaled_alike(shape, share):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = Dropout(share)(x)
    out.sum().backward()
    factor = x.grad.numpy()
    np.testing.assert_allclose(out.detach().numpy(), x.detach().numpy() * factor)
    scale = 1.0 if share == 0.0 else 256 / (256 - round(256 * share))
    assert np.isin(factor, [0.0, scale]).all()


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9])
def test_the_mean_stays_and_the_share_is_near(share):
    torch.manual_seed(1)
    out = Dropout(share)(torch.ones(400, 1000))
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (out == 0).float().mean().item() == pytest.approx(share, abs=1 / 256)
    # No coordinate of the eight that share a random word is dropped more than others.
    of_coordinate = (out.view(-1, 8) == 0).float().mean(0)
    assert (of_coordinate - of_coordinate.mean()).abs().max() < 0.01


def test_draws_follow_torchs_seed_and_evaluation_drops_nothing():
    dropout, x = Dropout(0.5), torch.randn(50, 3)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    torch.testing.assert_close(dropout(x), first)
    assert not torch.equal(first, second)
    assert dropout.eval()(x) is x
    assert dropout.train()(x.bfloat16()).dtype == torch.bfloat16
