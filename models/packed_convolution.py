"""A causal convolution over packed sessions with a backward of its own, for a CPU.

Autograd makes of each tap two gathers, a product and a scatter, and on the way back a zeroed array
of the input's size for each of them. Written out, the way back adds into one array, and where most
positions have the predecessor a tap asks for, shifted views take the place of gathers.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHIFTS_FROM: Final = 0.75
"""Share of positions with a predecessor from which a masked product of all costs less."""


@dataclass(frozen=True)
class Tap:
    """Which positions have a predecessor ``shift`` places before them in their own session.

    Shapes:
        to, source: ``[pairs]`` int64, ``source = to - shift``.
        mask: ``[positions - shift, 1]`` float, 1 where position ``shift + row`` is in ``to``; None
            where so few are that gathering them costs less.
    """

    shift: int
    to: Tensor
    source: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, position: Tensor, shift: int) -> "Tap":
        """Return the tap for positions numbered within their sessions, ``[positions]`` int64."""
        has_one = position >= shift
        to = torch.nonzero(has_one).squeeze(1)
        mask = None
        if len(to) >= _SHIFTS_FROM * (len(position) - shift):
            mask = has_one[shift:].float().unsqueeze(1)
        return cls(shift, to, to - shift, mask)


def packed_convolution(x: Tensor, weight: Tensor, bias: Tensor, taps: list[Tap]) -> Tensor:
    """Convolve packed sessions causally (HierTCN Eq. 7).

    Args:
        x: ``[positions, in_channels]`` float32.
        weight: ``[kernel, in_channels, out_channels]`` float32; tap 0 multiplies the position
            itself.
        bias: ``[out_channels]`` float32.
        taps: of the weights 1, 2, ...; those without one have no pair at all.

    Returns:
        ``[positions, out_channels]``, differentiable once.
    """
    out: Tensor = _PackedConvolution.apply(x, weight, bias, taps)  # type: ignore[no-untyped-call]
    return out


class _PackedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, taps: list[Tap]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.taps = taps
        out = torch.addmm(bias, x, weight[0])
        for tap, of_tap in zip(taps, weight[1:], strict=False):
            if tap.mask is None:
                out.index_add_(0, tap.to, x.index_select(0, tap.source) @ of_tap)
            else:
                out[tap.shift :].addmm_(x[: -tap.shift] * tap.mask, of_tap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (given,) = gradients
        x, weight = ctx.saved_tensors
        of_x, of_weight = given @ weight[0].T, torch.zeros_like(weight)
        torch.mm(x.T, given, out=of_weight[0])
        for tap, of_tap, result in zip(ctx.taps, weight[1:], of_weight[1:], strict=False):
            if tap.mask is None:
                masked = given.index_select(0, tap.to)
                of_x.index_add_(0, tap.source, masked @ of_tap.T)
                torch.mm(x.index_select(0, tap.source).T, masked, out=result)
            else:
                masked = given[tap.shift :] * tap.mask
                of_x[: -tap.shift].addmm_(masked, of_tap.T)
                torch.mm(x[: -tap.shift].T, masked, out=result)
        return of_x, of_weight, given.sum(0), None
