"""Dropout whose random numbers cost little on a CPU.

``torch.nn.Dropout`` draws 64 random bits for each value it may drop, which on a CPU is a fifth of a
whole training step of HierTCN. Eight bits decide as well.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Zero a share of the values while training and scale the others up, as `torch.nn.Dropout`.

    On a CPU the share is the nearest of ``1/256, 2/256, ..., 255/256``, and the scale is that
    share's, so that the expectation stays the input. Draws from torch's default generator.

    Args:
        share: of the values, in [0, 1).
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[...]`` float to the same shape; the identity in evaluation."""
        if not self.training or not self.share:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.share)
        dropped = min(max(round(256 * self.share), 1), 255)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        is_kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        # Bytes become floats several times as fast as bools do.
        factor = is_kept.view(torch.uint8).to(x.dtype).mul_(256 / (256 - dropped))
        return x * factor

    def extra_repr(self) -> str:
        """Return what the printed module says."""
        return f"share={self.share}"
