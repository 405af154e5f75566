"""The temporal convolutional network of the paper (HierTCN Eq. 5-7) over packed sessions.

Sessions lie one after another in a single ``[positions, channels]`` array without padding. Tap
``j`` of a convolution with dilation ``d`` is a dense product over only those positions that have a
predecessor ``d * j`` steps back *in their own session*, so no arithmetic is spent on padding or on
the zeros left of a session's start. On sessions of 2.4 interactions (the paper's Table 1) that is
about a third of the products of the padded form; on very long ones it is the same number plus the
cost of gathering rows.

A block is two causal dilated convolutions with ReLU and a residual connection (Bai et al. 2018),
projected where the widths differ. Weight normalisation is left out, as in the paper (section
4.2.1). Batch normalisation per time step is not implemented here.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PackedLayout:
    """Where each packed position sits in its session, and which positions lie ``shift`` before it.

    Built once per batch and shared by all convolutions: blocks of different dilation ask for the
    same shifts.

    Args:
        lengths: ``[sessions]`` int64, positions per session; zero is allowed.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.offsets = lengths.cumsum(0) - lengths
        self.session = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths
        )
        """``[positions]`` int64: the session of each position."""
        self.position = torch.arange(
            len(self.session), device=lengths.device
        ) - self.offsets.index_select(0, self.session)
        """``[positions]`` int64: 0-based place of each position in its session."""
        self._longest = int(lengths.max()) if len(lengths) else 0
        self._shifts: dict[int, tuple[Tensor, Tensor] | None] = {}

    def shifted(self, shift: int) -> tuple[Tensor, Tensor] | None:
        """Return index pairs ``(to, from)`` with ``from = to - shift``, inside one session.

        None where no session is longer than ``shift``.
        """
        if shift not in self._shifts:
            self._shifts[shift] = self._find(shift)
        return self._shifts[shift]

    def _find(self, shift: int) -> tuple[Tensor, Tensor] | None:
        if shift >= self._longest:
            return None
        to = torch.nonzero(self.position >= shift).squeeze(1)
        return to, to - shift


class CausalConv(nn.Module):
    """Causal dilated convolution of Eq. 7 over packed sessions, with a bias.

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
        """Convolve, ``[positions, in_channels] -> [positions, out_channels]``."""
        taps = self.weight.unbind(0)
        out = torch.addmm(self.bias, x, taps[0])
        for tap in range(1, self.kernel):
            pairs = layout.shifted(self.dilation * tap)
            if pairs is None:
                break
            to, source = pairs
            out.index_add_(0, to, x.index_select(0, source) @ taps[tap])
        return out


class TCNBlock(nn.Module):
    """Two causal convolutions of one dilation with a residual connection.

    ``relu(residual(x) + dropout(relu(second(dropout(relu(first(x)))))))``; ``residual`` is the
    identity where the widths agree, else a product without bias.
    """

    def __init__(
        self, in_channels: int, filters: int, kernel: int, dilation: int, dropout: float
    ) -> None:
        super().__init__()
        self.dilation = dilation
        self.first = CausalConv(in_channels, filters, kernel, dilation)
        self.second = CausalConv(filters, filters, kernel, dilation)
        self.residual: nn.Module = (
            nn.Identity() if in_channels == filters else nn.Linear(in_channels, filters, bias=False)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, layout: PackedLayout) -> Tensor:
        """Map ``[positions, in_channels]`` to ``[positions, filters]``."""
        out = self.dropout(torch.relu(self.first(x, layout)))
        out = self.dropout(torch.relu(self.second(out, layout)))
        return torch.relu(self.residual(x) + out)


class TCN(nn.Module):
    """A stack of blocks whose dilations grow with depth.

    Args:
        in_channels: width of the input.
        filters: width of every block.
        kernel: taps per convolution.
        dilations: one per block; the paper's are ``2 ** block``.
        dropout: share of activations dropped after each convolution while training.
    """

    def __init__(
        self,
        in_channels: int,
        filters: int,
        kernel: int,
        dilations: Sequence[int],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.blocks = nn.ModuleList(
            TCNBlock(in_channels if block == 0 else filters, filters, kernel, dilation, dropout)
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
        """Map ``[positions, in_channels]`` to ``[positions, filters]``."""
        for block in self.blocks:
            x = block(x, layout)
        return x
