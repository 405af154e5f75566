"""HierGRU and HRNN: a GRU over sessions above a GRU within the session.

HierGRU is HierTCN with a GRU in the place of the TCN: the upper level reads the mean of a session's
items, and its state is an input at every position (section 4.2.3).

HRNN (Quadrana et al., RecSys 2017) reads the lower level's last state instead of the mean, so it
must follow a user's sessions one after another. Its upper state begins the session (``Init``, by
``tanh(W c + b)``, in every layer) and in the variant ``All`` is an input at every position too. The
upper state before a user's first session is zero, as there.

Both read items multiplied by ``sqrt(item_dim)``: item vectors have about unit length, and layers
expect inputs of unit variance.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from hiertcn.training.lanes import LaneBatch
from models.dropout import Dropout
from models.gru import StackedGRU
from models.head import make_head
from models.sequence.config import HeadedConfig
from models.sequence.flat import WHOLE
from models.sequence.recurrent import PackedGRU


@dataclass(frozen=True, kw_only=True)
class _TwoGRUs(HeadedConfig):
    """The shape of two stacked GRUs; defaults are the paper's.

    ``hidden`` and ``layers`` are those of both levels. ``dropout`` is applied to the upper level's
    candidate activation and to every output of the lower level.
    """

    hidden: int = 128
    layers: int = 4


@dataclass(frozen=True, kw_only=True)
class HierGRUConfig(_TwoGRUs):
    """The shape of a HierGRU."""

    network: ClassVar[str] = "HierGRU"


@dataclass(frozen=True, kw_only=True)
class HRNNConfig(_TwoGRUs):
    """The shape of an HRNN; ``feeds_every_position`` is the variant All, else it is Init."""

    network: ClassVar[str] = "HRNN"

    feeds_every_position: bool = False


class _Hierarchy(nn.Module):
    """What both share: tokens, the lower GRU, and slots of a batch."""

    def __init__(self, config: _TwoGRUs, input_dim: int) -> None:
        super().__init__()
        self.config = config
        self._scale = math.sqrt(config.item_dim)
        self.start_item = nn.Parameter(torch.randn(config.item_dim) / self._scale)
        self.session_gru = PackedGRU(input_dim, config.hidden, config.layers, config.dropout)
        self.head = make_head(config.head, config.hidden, config.item_dim, config.dropout)
        self.input_dropout = Dropout(config.input_dropout)

    @property
    def receptive_field(self) -> int:
        """All earlier items of a session."""
        return WHOLE

    def initial_state(self, batch: int) -> Tensor:
        """Return the state before a user's first session, ``[batch, layers, hidden]``."""
        raise NotImplementedError

    def _tokens(self, items: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Put a start token before each session's items; return tokens and their session."""
        sessions = torch.arange(len(lengths), device=lengths.device)
        session = torch.repeat_interleave(sessions, lengths + 1)
        places = torch.arange(len(items), device=items.device)
        places = places + 1 + torch.repeat_interleave(sessions, lengths)
        tokens = self.start_item.expand(len(session), -1).index_copy(
            0, places, self.input_dropout(items)
        )
        return tokens * self._scale, session

    def _before(self, batch: LaneBatch, state: Tensor, slot: slice) -> Tensor:
        """Return the states before a slot's pieces, ``[pieces, layers, hidden]``."""
        fresh = self.initial_state(slot.stop - slot.start)
        carried = state.index_select(0, batch.lanes[slot])
        return torch.where(batch.reset[slot, None, None], fresh, carried)

    def _advance(
        self, batch: LaneBatch, state: Tensor, slot: slice, before: Tensor, after: Tensor
    ) -> Tensor:
        """Return the lanes' states with ``after`` where a piece of the slot closes its session."""
        after = torch.where(batch.closes[slot, None, None], after, before)
        return state.index_copy(0, batch.lanes[slot], after)


def _slots(batch: LaneBatch) -> list[slice]:
    return [slice(low, high) for low, high in pairwise(batch.slot_offsets)]


class HierGRU(_Hierarchy):
    """HierTCN with a lower GRU."""

    def __init__(self, config: HierGRUConfig) -> None:
        super().__init__(config, config.item_dim + config.hidden)
        self.start_state = nn.Parameter(0.1 * torch.randn(config.layers, config.hidden))
        self.gru = StackedGRU(config.item_dim, config.hidden, config.layers, config.dropout)

    def initial_state(self, batch: int) -> Tensor:
        """Return the learned start state for ``batch`` users."""
        return self.start_state.expand(batch, -1, -1)

    def gru_step(self, state: Tensor, session_mean: Tensor) -> Tensor:
        """Fold closed sessions (Eq. 10): ``[s, layers, hidden], [s, item_dim] -> state``."""
        after: Tensor = self.gru(state, self.input_dropout(session_mean) * self._scale)
        return after

    def encode(self, items: Tensor, lengths: Tensor, user_state: Tensor) -> Tensor:
        """Return ``u`` at every position, see :meth:`models.hiertcn.HierTCN.encode`."""
        tokens, session = self._tokens(items, lengths)
        x = torch.cat([tokens, user_state.index_select(0, session)], dim=1)
        out, _ = self.session_gru(x, lengths + 1, self._zeros(len(lengths)))
        u: Tensor = self.head(out)
        return u

    def forward(self, batch: LaneBatch, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step of the generator, see :meth:`models.hiertcn.HierTCN.forward`."""
        tops = []
        for slot in _slots(batch):
            before = self._before(batch, state, slot)
            tops.append(before[:, -1])
            after = self.gru_step(before, batch.session_means[slot])
            state = self._advance(batch, state, slot, before, after)
        items = batch.items.index_select(0, batch.inputs)
        u = self.encode(items, batch.lengths - 1, torch.cat(tops))
        return u.index_select(0, batch.targets), state

    def _zeros(self, sessions: int) -> Tensor:
        config = self.config
        return self.start_item.new_zeros(sessions, config.layers, config.hidden)


class HRNN(_Hierarchy):
    """Hierarchical RNN, Init or All."""

    config: HRNNConfig

    def __init__(self, config: HRNNConfig) -> None:
        feeds = config.hidden if config.feeds_every_position else 0
        super().__init__(config, config.item_dim + feeds)
        self.user_gru = StackedGRU(config.hidden, config.hidden, config.layers, config.dropout)
        self.init = nn.Linear(config.hidden, config.layers * config.hidden)
        self.init_dropout = Dropout(config.dropout)

    def initial_state(self, batch: int) -> Tensor:
        """Return zeros for ``batch`` users."""
        return self.start_item.new_zeros(batch, self.config.layers, self.config.hidden)

    def fold_items(self, state: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        """Fold closed sessions, see :class:`hiertcn.training.session_model.FoldsItems`."""
        _, last = self._run(items, lengths, state[:, -1])
        after: Tensor = self.user_gru(state, last[:, -1])
        return after

    def gru_step(self, state: Tensor, session_mean: Tensor) -> Tensor:
        """Refuse: a mean does not hold what the lower level made of the session."""
        raise NotImplementedError("HRNN folds a session's items, not their mean; use fold_items")

    def encode(self, items: Tensor, lengths: Tensor, user_state: Tensor) -> Tensor:
        """Return ``u`` at every position, see :meth:`models.hiertcn.HierTCN.encode`."""
        out, _ = self._run(items, lengths, user_state)
        u: Tensor = self.head(out)
        return u

    def forward(self, batch: LaneBatch, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step of the generator, see :meth:`models.hiertcn.HierTCN.forward`."""
        rows = [0, *batch.lengths.cumsum(0).tolist()]
        outputs = []
        for slot in _slots(batch):
            lengths = batch.lengths[slot]
            before = self._before(batch, state, slot)
            items = batch.items[rows[slot.start] : rows[slot.stop]]
            out, last = self._run(items, lengths, before[:, -1])
            state = self._advance(batch, state, slot, before, self.user_gru(before, last[:, -1]))
            # A piece's last output predicts what only a later piece asks for.
            is_asked = torch.ones(len(out), dtype=torch.bool, device=out.device)
            is_asked[(lengths + 1).cumsum(0) - 1] = False
            outputs.append(out[is_asked])
        return self.head(torch.cat(outputs).index_select(0, batch.targets)), state

    def _run(self, items: Tensor, lengths: Tensor, user_state: Tensor) -> tuple[Tensor, Tensor]:
        x, session = self._tokens(items, lengths)
        if self.config.feeds_every_position:
            x = torch.cat([x, user_state.index_select(0, session)], dim=1)
        start = torch.tanh(self.init(user_state))
        start = self.init_dropout(start).view(len(lengths), self.config.layers, -1)
        out, last = self.session_gru(x, lengths + 1, start)
        return out, last
