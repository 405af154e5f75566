"""The temporal convolutional network of the paper (HierTCN Eq. 5-7) over sessions of a batch.

How sessions lie in memory, packed or padded, is models/session_layouts.py's; the networks here work
on either, with the same weights.

A block is two causal dilated convolutions with ReLU and a residual connection (Bai et al. 2018),
projected where the widths differ. Weight normalisation is left out, as in the paper (section
4.2.1). Batch normalisation per time step (section 3.5.3) is an option.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.dropout import Dropout
from models.session_layouts import PackedLayout as PackedLayout
from models.step_norm import StepNorm


class CausalConv(nn.Module):
    """Causal dilated convolution of Eq. 7 with a bias.

    ``weight [kernel, in_channels, out_channels]``: tap ``j`` multiplies the position ``dilation *
    j`` steps back (so tap 0 is the newest), and ``bias [out_channels]``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.weight = nn.Parameter(torch.empty(kernel, in_channels, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and bias uniformly, bounded by ``1/sqrt(fan in)``."""
        kernel, in_channels, _ = self.weight.shape
        bound = 1.0 / math.sqrt(kernel * in_channels)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Convolve what ``layout`` laid, ``[..., in_channels] -> [..., out_channels]``."""
        return layout.convolve(x, self.weight, self.bias, self.dilation)


class TCNBlock(nn.Module):
    """Two causal convolutions of one dilation with a residual connection.

    ``relu(residual(x) + dropout(relu(second(dropout(relu(first(x)))))))``; ``residual`` is the
    identity where the widths agree, else a product without bias. With ``norm_steps`` each
    convolution is followed by a :class:`StepNorm` of as many steps.
    """

    def __init__(
        self,
        in_channels: int,
        filters: int,
        kernel: int,
        dilation: int,
        dropout: float,
        norm_steps: int = 0,
    ) -> None:
        super().__init__()
        self.dilation = dilation
        self.first = CausalConv(in_channels, filters, kernel, dilation)
        self.second = CausalConv(filters, filters, kernel, dilation)
        self.residual: nn.Module = (
            nn.Identity() if in_channels == filters else nn.Linear(in_channels, filters, bias=False)
        )
        self.dropout = Dropout(dropout)
        self.norms = nn.ModuleList(
            StepNorm(filters, norm_steps) for _ in range(2 if norm_steps else 0)
        )

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Map what ``layout`` laid, ``[..., in_channels] -> [..., filters]``."""
        out = x
        for number, convolution in enumerate((self.first, self.second)):
            out = convolution(out, layout)
            if self.norms:
                rows = self.norms[number](layout.pack(out), layout.step)
                out = layout.lay(rows)
            out = self.dropout(torch.relu(out))
        return torch.relu(self.residual(x) + out)


class TCN(nn.Module):
    """A stack of blocks whose dilations grow with depth.

    Args:
        in_channels: width of the input.
        filters: width of every block.
        kernel: taps per convolution.
        dilations: one per block; the paper's are ``2 ** block``.
        dropout: share of activations dropped after each convolution while training.
        norm_steps: time steps with batch statistics of their own; 0 for no normalisation.
    """

    def __init__(
        self,
        in_channels: int,
        filters: int,
        kernel: int,
        dilations: Sequence[int],
        dropout: float = 0.0,
        norm_steps: int = 0,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.blocks = nn.ModuleList(
            TCNBlock(
                in_channels if block == 0 else filters,
                filters,
                kernel,
                dilation,
                dropout,
                norm_steps,
            )
            for block, dilation in enumerate(dilations)
        )

    @property
    def receptive_field(self) -> int:
        """How many newest positions, the current one included, an output can depend on."""
        return 1 + sum(
            2 * (self.kernel - 1) * block.dilation
            for block in self.blocks
            if isinstance(block, TCNBlock)
        )

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Map ``[positions, in_channels]`` to ``[positions, filters]``, both packed."""
        x = layout.lay(x)
        for block in self.blocks:
            x = block(x, layout)
        return layout.pack(x)
