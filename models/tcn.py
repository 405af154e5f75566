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

from models.session_layouts import PackedLayout as PackedLayout


class StepNorm(nn.Module):
    """Batch normalisation with statistics of each time step of its own (section 3.5.3).

    Only real positions count, whatever the layout. Steps at and beyond ``steps`` share the last
    one's statistics. While training, a step with fewer than ``fewest`` positions in the batch uses
    its running statistics, which would otherwise be one session's own values; a step never seen
    uses those of the last one before it that was.

    Args:
        channels: width.
        steps: time steps with statistics of their own.
        momentum: share of a batch in the running statistics.
        fewest: see above.
    """

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def __init__(
        self, channels: int, steps: int, *, momentum: float = 0.1, fewest: int = 8
    ) -> None:
        super().__init__()
        self.momentum, self.fewest, self.epsilon = momentum, fewest, 1e-5
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.register_buffer("mean", torch.empty(steps, channels))
        self.register_buffer("variance", torch.empty(steps, channels))
        self.register_buffer("seen", torch.empty(steps, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget all statistics, and scale by 1."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.mean.zero_()
        self.variance.fill_(1.0)
        self.seen.zero_()

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Normalise what ``layout`` laid; shapes stay."""
        rows = layout.pack(x).float()
        step = layout.step.clamp(max=len(self.seen) - 1)
        mean, variance = self._running()
        if self.training:
            mean, variance = self._of_batch(rows, step, mean, variance)
        scale = self.weight * torch.rsqrt(variance + self.epsilon)
        shift = self.bias - mean * scale
        rows = rows * scale.index_select(0, step) + shift.index_select(0, step)
        return layout.lay(rows)

    def _running(self) -> tuple[Tensor, Tensor]:
        steps = torch.arange(len(self.seen), device=self.seen.device)
        last_seen = torch.where(self.seen, steps, 0).cummax(0).values
        return self.mean.index_select(0, last_seen), self.variance.index_select(0, last_seen)

    def _of_batch(
        self, rows: Tensor, step: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        count = torch.bincount(step, minlength=len(self.seen)).unsqueeze(1)
        divisor = count.clamp(min=1).to(rows.dtype)
        own_mean = torch.zeros_like(mean).index_add(0, step, rows) / divisor
        off = rows - own_mean.index_select(0, step)
        own_variance = torch.zeros_like(mean).index_add(0, step, off * off) / divisor
        enough = count >= self.fewest
        with torch.no_grad():
            share = torch.where(self.seen.unsqueeze(1), self.momentum, 1.0)
            unbiased = own_variance * divisor / (divisor - 1).clamp(min=1)
            for running, own in ((self.mean, own_mean), (self.variance, unbiased)):
                running.copy_(torch.where(enough, torch.lerp(running, own, share), running))
            self.seen |= enough.squeeze(1)
        return torch.where(enough, own_mean, mean), torch.where(enough, own_variance, variance)


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
        self.dropout = nn.Dropout(dropout)
        self.norms = nn.ModuleList(
            StepNorm(filters, norm_steps) for _ in range(2 if norm_steps else 0)
        )

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Map what ``layout`` laid, ``[..., in_channels] -> [..., filters]``."""
        out = x
        for number, convolution in enumerate((self.first, self.second)):
            out = convolution(out, layout)
            if self.norms:
                out = self.norms[number](out, layout)
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
