import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from models.session_layouts import PackedLayout, PaddedLayout
from models.step_norm import StepNorm
from models.tcn import TCN, CausalConv


def conv_padded(conv, x):
    """Convolve one session ``[length, in]`` with torch's convolution on a left-padded sequence."""
    left = (conv.kernel - 1) * conv.dilation
    weight = conv.weight.permute(2, 1, 0).flip(2)
    return F.conv1d(F.pad(x.T[None], (left, 0)), weight, conv.bias, dilation=conv.dilation)[0].T


def tcn_padded(tcn, x):
    for block in tcn.blocks:
        out = torch.relu(conv_padded(block.first, x))
        out = torch.relu(conv_padded(block.second, out))
        x = torch.relu(block.residual(x) + out)
    return x


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=5),
    kernel=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_packed_equals_padded(lengths, kernel, seed):
    torch.manual_seed(seed)
    tcn = TCN(6, 8, kernel, [1, 2, 4])
    x = torch.randn(sum(lengths), 6, requires_grad=True)
    packed = tcn(x, PackedLayout(torch.tensor(lengths)))
    padded = torch.cat([tcn_padded(tcn, part) for part in x.split(lengths) if len(part)] or [x[:0]])
    assert packed.shape == (sum(lengths), 8)
    if not len(padded):
        return
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)
    parameters = [x, *tcn.parameters()]
    direction = torch.randn_like(packed)
    ours = torch.autograd.grad((packed * direction).sum(), parameters)
    theirs = torch.autograd.grad((padded * direction).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_half_precision_takes_the_same_taps():
    torch.manual_seed(0)
    tcn, layout = TCN(6, 8, 3, [1, 2]), PackedLayout(torch.tensor([9, 1, 1, 4]))
    x = torch.randn(15, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = tcn(x, layout)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), tcn(x, layout), atol=0.05, rtol=0.05)


def test_equation_7_by_hand():
    conv = CausalConv(1, 1, kernel=3, dilation=2)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1, 1))
        conv.bias.fill_(0.5)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 7.0]).reshape(6, 1)
    out = conv(x, PackedLayout(torch.tensor([5, 1])))
    # x_t + 10 x_{t-2} + 100 x_{t-4} + 0.5, and the second session sees nothing of the first.
    assert out.flatten().tolist() == pytest.approx([1.5, 2.5, 13.5, 24.5, 135.5, 7.5])


@pytest.mark.parametrize(("kernel", "dilations", "field"), [(5, [1, 2, 4, 8], 121), (3, [1], 5)])
def test_receptive_field_is_exact(kernel, dilations, field):
    torch.manual_seed(0)
    tcn = TCN(2, 4, kernel, dilations).double()
    assert tcn.receptive_field == field
    x = torch.randn(field + 5, 2, dtype=torch.float64, requires_grad=True)
    # Without the non-linearity a path through every tap stays open.
    for parameter in tcn.parameters():
        parameter.data.abs_()
    out = tcn(x.abs(), PackedLayout(torch.tensor([len(x)])))
    (gradient,) = torch.autograd.grad(out[-1].sum(), x)
    touched = torch.nonzero(gradient.abs().sum(1)).flatten()
    assert int(touched[0]) == len(x) - field and len(touched) == field


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=5),
    norm_steps=st.sampled_from([0, 4]),
    seed=st.integers(0, 5),
)
def test_the_padded_layout_gives_the_packed_ones_outputs(lengths, norm_steps, seed):
    torch.manual_seed(seed)
    tcn = TCN(6, 8, 3, [1, 2, 4], norm_steps=norm_steps)
    x = torch.randn(sum(lengths), 6)
    given_ = torch.tensor(lengths)
    packed, padded = (tcn(x, layout(given_)) for layout in (PackedLayout, PaddedLayout))
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)
    cost = PaddedLayout(given_).cost(6)
    assert (cost.positions, cost.held) == (sum(lengths), len(lengths) * max(lengths))
    assert cost.bytes == cost.held * 24
    assert PackedLayout(given_).cost(6).padding_share == 0.0 or not x.numel()


def test_step_statistics_are_those_of_real_positions():
    torch.manual_seed(0)
    norm = StepNorm(3, steps=2, fewest=2)
    lengths = torch.tensor([3, 1, 2])
    x = torch.randn(6, 3)
    by_step = [x[[0, 3, 4]], x[[1, 2, 5]]]  # steps from 1 on share statistics
    out = norm(x, PackedLayout(lengths).step)
    for step, rows in enumerate(by_step):
        torch.testing.assert_close(norm.mean[step], rows.mean(0))
        torch.testing.assert_close(norm.variance[step], rows.var(0))
    expected = (x[3] - by_step[0].mean(0)) / torch.sqrt(
        by_step[0].var(0, unbiased=False) + norm.epsilon
    )
    torch.testing.assert_close(out[3], expected)
    norm.eval()
    alone = norm(x[:1], PackedLayout(torch.tensor([1])).step)
    torch.testing.assert_close(alone, norm(x, PackedLayout(lengths).step)[:1])


def test_rows_that_do_not_count_are_normalised_but_leave_no_trace():
    torch.manual_seed(0)
    x, step = torch.randn(12, 3), torch.zeros(12, dtype=torch.int64)
    counts = torch.arange(12) < 9
    one, other = StepNorm(3, steps=2, fewest=2), StepNorm(3, steps=2, fewest=2)
    out = one(x, step, counts)
    torch.testing.assert_close(out[:9], other(x[:9], step[:9]))
    torch.testing.assert_close(one.mean, other.mean)
    assert out[9:].isfinite().all()


def test_steps_too_few_or_never_seen_use_running_statistics():
    norm = StepNorm(2, steps=5, fewest=3)
    norm(torch.randn(4, 2) + 5.0, torch.zeros(4, dtype=torch.int64))
    assert norm.seen.tolist() == [True, False, False, False, False]
    held = norm.mean.clone()
    norm(torch.randn(4, 2), torch.arange(4))
    assert torch.equal(norm.mean, held)
    norm.eval()
    x = torch.ones(4, 2)
    out = norm(x, torch.arange(4))
    torch.testing.assert_close(out[3], out[0])
