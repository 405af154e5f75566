"""GRU: the paper's single-level recurrent baseline, 4 layers of 200 (section 4.2.3).

One GRU over all interactions of a user, with start tokens as the session indicator; the state is
carried from piece to piece, and back-propagation is truncated at the step.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from models.head import make_head
from models.sequence.config import HeadedConfig
from models.sequence.flat import WHOLE, FlatNetwork
from models.sequence.recurrent import PackedGRU
from models.sequence.tokens import Windows


@dataclass(frozen=True, kw_only=True)
class GRUConfig(HeadedConfig):
    """The shape of a GRU; defaults are the paper's. ``dropout`` acts on every layer's output."""

    network: ClassVar[str] = "GRU"

    hidden: int = 200
    layers: int = 4


class GRU(FlatNetwork):
    """The single-level GRU. Its state is every layer's hidden state after the last token."""

    def __init__(self, config: GRUConfig) -> None:
        super().__init__(config)
        self.gru = PackedGRU(config.item_dim, config.hidden, config.layers, config.dropout)
        self.head = make_head(config.head, config.hidden, config.item_dim, config.dropout)

    @property
    def receptive_field(self) -> int:
        """None: the state carries what came before a piece."""
        return 0

    @property
    def piece(self) -> int:
        """Evaluation reads a history in one go."""
        return WHOLE

    def initial_state(self, batch: int) -> Tensor:
        """Return zeros ``[batch, layers, hidden]``."""
        return self.start_item.new_zeros(batch, self.gru.layers, self.gru.hidden)

    def embed_tokens(self, x: Tensor, windows: Windows, state: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FlatNetwork.embed_tokens`."""
        out, after = self.gru(x, windows.lengths, state)
        return self.head(out), after

    def embed_states(self, state: Tensor) -> Tensor:
        """See :meth:`FlatNetwork.embed_states`."""
        u: Tensor = self.head(state[:, -1])
        return u
