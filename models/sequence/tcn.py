"""TCN: the paper's single-level convolutional baseline, 6 blocks of 128 filters (section 4.2.3).

The network of models/tcn.py over the whole history, dilations 1 to 32, with start tokens as the
session indicator.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from models.head import make_head
from models.sequence.config import HeadedConfig
from models.sequence.flat import FlatNetwork
from models.sequence.tokens import Windows
from models.tcn import TCN, PackedLayout


@dataclass(frozen=True, kw_only=True)
class FlatTCNConfig(HeadedConfig):
    """The shape of a flat TCN; defaults are the paper's. ``dropout`` follows every convolution."""

    network: ClassVar[str] = "TCN"

    filters: int = 128
    blocks: int = 6
    kernel: int = 5


class FlatTCN(FlatNetwork):
    """The single-level TCN."""

    def __init__(self, config: FlatTCNConfig) -> None:
        super().__init__(config)
        self.tcn = TCN(
            config.item_dim,
            config.filters,
            config.kernel,
            [2**block for block in range(config.blocks)],
            config.dropout,
        )
        self.head = make_head(config.head, config.filters, config.item_dim, config.dropout)

    @property
    def receptive_field(self) -> int:
        """Newest tokens that one ``u`` can depend on; with so many items windows change nothing."""
        return self.tcn.receptive_field

    @property
    def piece(self) -> int:
        """Evaluation reads about as many new items as old ones."""
        return self.receptive_field

    def embed_tokens(self, x: Tensor, windows: Windows, state: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FlatNetwork.embed_tokens`."""
        return self.head(self.tcn(x, PackedLayout(windows.lengths))), state
