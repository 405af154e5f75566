"""Two ways to hold the sessions of a batch in memory, and causal convolutions over each.

Packed: sessions lie one after another in a single ``[positions, channels]`` array without padding.
Tap ``j`` of a convolution with dilation ``d`` is a dense product over only those positions that
have a predecessor ``d * j`` steps back *in their own session*, so no arithmetic is spent on padding
or on the zeros left of a session's start. On sessions of 2.4 interactions (the paper's Table 1)
that is about a third of the products of the padded form; on very long ones it is the same number
plus the cost of gathering rows.

Padded: ``[sessions, longest, channels]``, the usual form. Padding stands at a session's end, where
a causal convolution never carries it into a real position. A tap that reaches past the longest
session would multiply zeros alone and is left out.

Both give the same outputs to float tolerance. Taps are :class:`models.tcn.CausalConv`'s.
"""

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hiertcn.errors import InputError
from models.packed_convolution import Tap, packed_convolution

LayoutName = Literal["auto", "packed", "padded"]
LAYOUTS: Final = ("auto", "packed", "padded")


@dataclass(frozen=True)
class LayoutCost:
    """What one batch's sessions take.

    ``positions`` are real ones, ``held`` includes padding; ``bytes`` is the float32 input array.
    """

    positions: int
    held: int
    bytes: int

    @property
    def padding_share(self) -> float:
        """Share of the held positions that are padding."""
        return 1.0 - self.positions / max(self.held, 1)


class PackedLayout:
    """Where each packed position sits in its session, and which positions lie ``shift`` before it.

    Built once per batch and shared by all convolutions: blocks of different dilation ask for the
    same shifts.

    Args:
        lengths: ``[sessions]`` int64, positions per session; zero is allowed.
        skipped: ``[sessions]`` int64, earlier positions of each that are not held; None for none.
    """

    def __init__(self, lengths: Tensor, skipped: Tensor | None = None) -> None:
        self.lengths = lengths
        self.offsets = lengths.cumsum(0) - lengths
        self.session = torch.repeat_interleave(
            torch.arange(len(lengths), device=lengths.device), lengths
        )
        """``[positions]`` int64: the session of each position."""
        self.position = torch.arange(
            len(self.session), device=lengths.device
        ) - self.offsets.index_select(0, self.session)
        """``[positions]`` int64: 0-based place of each held position in its session."""
        self.step = self.position
        """``[positions]`` int64: the same with the skipped ones counted."""
        if skipped is not None:
            self.step = self.position + skipped.index_select(0, self.session)
        self.longest = int(lengths.max()) if len(lengths) else 0
        self._taps: dict[int, Tap | None] = {}

    def cost(self, channels: int) -> LayoutCost:
        """Return what inputs of that width take."""
        positions = len(self.position)
        return LayoutCost(positions, positions, positions * channels * 4)

    def lay(self, x: Tensor) -> Tensor:
        """Bring packed rows ``[positions, channels]`` into this layout."""
        return x

    def pack(self, x: Tensor) -> Tensor:
        """Undo :meth:`lay`."""
        return x

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        """Convolve laid rows causally; weights as in :class:`models.tcn.CausalConv`."""
        found = [self._tap(dilation * number) for number in range(1, len(weight))]
        taps = [tap for tap in found if tap is not None]
        if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return packed_convolution(x, weight, bias, taps)
        out = torch.addmm(bias, x, weight[0])
        for tap, of_tap in zip(taps, weight[1:], strict=False):
            out.index_add_(0, tap.to, x.index_select(0, tap.source) @ of_tap)
        return out

    def _tap(self, shift: int) -> Tap | None:
        """Return which positions have one ``shift`` before them; None where none has."""
        if shift not in self._taps:
            self._taps[shift] = Tap.of(self.position, shift) if shift < self.longest else None
        return self._taps[shift]


class PaddedLayout(PackedLayout):
    """Sessions padded to the longest; arguments as in :class:`PackedLayout`."""

    def __init__(self, lengths: Tensor, skipped: Tensor | None = None) -> None:
        super().__init__(lengths, skipped)
        self._places = self.session * self.longest + self.position

    def cost(self, channels: int) -> LayoutCost:
        """Return what inputs of that width take."""
        held = len(self.lengths) * self.longest
        return LayoutCost(len(self.position), held, held * channels * 4)

    def lay(self, x: Tensor) -> Tensor:
        """Pad rows ``[positions, channels]`` to ``[sessions, longest, channels]``."""
        sessions, channels = len(self.lengths), x.shape[1]
        padded = x.new_zeros(sessions * self.longest, channels).index_copy(0, self._places, x)
        return padded.view(sessions, self.longest, channels)

    def pack(self, x: Tensor) -> Tensor:
        """Return the real positions, ``[positions, channels]``."""
        return x.flatten(0, 1).index_select(0, self._places)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
        """Convolve ``[sessions, longest, channels]`` causally."""
        taps = max(1, min(len(weight), -(-self.longest // dilation)))
        if x.device.type == "cpu":
            # torch's convolution of few channels on a CPU is several times slower than products.
            out = F.linear(x, weight[0].T, bias)
            for tap in range(1, taps):
                shift = dilation * tap
                out[:, shift:] += x[:, :-shift] @ weight[tap]
            return out
        reach = dilation * (taps - 1)
        kernel = weight[:taps].flip(0).permute(2, 1, 0)
        past = F.pad(x.transpose(1, 2), (reach, 0))
        return F.conv1d(past, kernel, bias, dilation=dilation).transpose(1, 2)


def make_layout(name: str, lengths: Tensor, skipped: Tensor | None = None) -> PackedLayout:
    """Return the layout of that name; arguments as in :class:`PackedLayout`.

    ``auto`` packs on a CPU, where it is the faster one (benchmarks/training_speed.py), and pads on
    other devices, whose convolutions are made for it; there it is a guess that was not measured.

    Raises:
        InputError: there is no such layout.
    """
    if name not in LAYOUTS:
        raise InputError(f"the layout is {name!r}; expected one of {', '.join(LAYOUTS)}")
    if name == "auto":
        name = "packed" if lengths.device.type == "cpu" else "padded"
    kind = PackedLayout if name == "packed" else PaddedLayout
    return kind(lengths, skipped)
