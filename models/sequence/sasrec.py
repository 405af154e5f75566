"""SASRec (Kang and McAuley, ICDM 2018): causal self-attention over the newest items of a history.

Items plus learned positions, blocks of attention and a two-layer perceptron, each ``x + dropout(
f(norm(x)))``, and a last normalisation; items are scored by the dot product with their own vectors.
Beyond the original: a start token per session, full softmax instead of one negative, and a history
longer than a window goes through overlapping ones, so that no interaction is left out of training.

Keys and values are padded to the longest window only inside the attention itself; everything else
is packed.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.dropout import Dropout
from models.sequence.config import NetworkConfig
from models.sequence.flat import FlatNetwork
from models.sequence.tokens import Windows


@dataclass(frozen=True, kw_only=True)
class SASRecConfig(NetworkConfig):
    """The shape of a SASRec; train with ``TrainOptions.max_length`` equal to ``piece``.

    Attributes:
        hidden: width of the blocks; items of another width are projected to and from it.
        blocks: number of blocks.
        heads: attention heads; divide ``hidden``.
        piece: items a window predicts. A window begins ``context`` items before them.
        context: see ``piece``.
    """

    network: ClassVar[str] = "SASRec"

    hidden: int = 64
    blocks: int = 2
    heads: int = 1
    piece: int = 200
    context: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden % self.heads:
            self._refuse("heads", self.heads, f"a divisor of hidden, {self.hidden}")


class SASRec(FlatNetwork):
    """The self-attentive network."""

    config: SASRecConfig

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config)
        width = config.hidden
        projected = config.item_dim != width
        self.read = nn.Linear(config.item_dim, width) if projected else nn.Identity()
        self.write = nn.Linear(width, config.item_dim) if projected else nn.Identity()
        # A window's last start token may follow all of its items.
        self.positions = nn.Parameter(0.1 * torch.randn(config.piece + config.context + 1, width))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            _Block(width, config.heads, config.dropout) for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(width)

    @property
    def receptive_field(self) -> int:
        """The context of a window."""
        return self.config.context

    @property
    def piece(self) -> int:
        """The items a window predicts."""
        return self.config.piece

    def embed_tokens(self, x: Tensor, windows: Windows, state: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FlatNetwork.embed_tokens`."""
        positions = self.positions.index_select(0, windows.position)
        x = self.dropout(self.read(x) + positions)
        padding = _Padding(windows.lengths)
        for block in self.blocks:
            x = block(x, padding)
        return self.write(self.norm(x)), state


class _Padding:
    """Where packed tokens lie in an array padded on the right, ``[windows * longest]``."""

    def __init__(self, lengths: Tensor) -> None:
        self.windows, self.longest = len(lengths), int(lengths.max())
        first = lengths.cumsum(0) - lengths
        shift = torch.arange(len(lengths), device=lengths.device) * self.longest - first
        tokens = torch.arange(int(lengths.sum()), device=lengths.device)
        self.place = tokens + torch.repeat_interleave(shift, lengths)

    def pad(self, x: Tensor) -> Tensor:
        """``[tokens, width] -> [windows, longest, width]``."""
        padded = x.new_zeros(self.windows * self.longest, x.shape[1])
        return padded.index_copy(0, self.place, x).view(self.windows, self.longest, -1)

    def unpad(self, x: Tensor) -> Tensor:
        """``[windows, longest, width] -> [tokens, width]``."""
        return x.reshape(self.windows * self.longest, -1).index_select(0, self.place)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), Dropout(dropout), nn.Linear(width, width)
        )
        self.dropout = Dropout(dropout)
        for layer in (self.queries_keys_values, self.mix):
            nn.init.normal_(layer.weight, std=1.0 / math.sqrt(width))
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, padding: _Padding) -> Tensor:
        """Map ``[tokens, width]`` to ``[tokens, width]``."""
        x = x + self.dropout(self._attend(self.attention_norm(x), padding))
        out: Tensor = x + self.dropout(self.feed_forward(self.forward_norm(x)))
        return out

    def _attend(self, x: Tensor, padding: _Padding) -> Tensor:
        padded = padding.pad(self.queries_keys_values(x))
        windows, longest, width = padded.shape
        split = padded.view(windows, longest, 3, self.heads, width // (3 * self.heads))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        # Padding lies on the right, where causal attention never looks from a real token.
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.mix(padding.unpad(mixed.transpose(1, 2)))
        return out
