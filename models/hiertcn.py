"""HierTCN (You et al., WWW 2019): a GRU over sessions above a TCN within the session.

The high level takes one GRU step per closed session on the mean of its item embeddings (Eq. 10).
The low level is a causal TCN over ``concat(item, user state)`` at every position of a session (Full
connection, Eq. 11), followed by the two-layer perceptron of Eq. 4, whose output ``u`` scores an
item by the dot product with its embedding (Eq. 12). Learned tokens stand for the item before a
session's first and for the state before a user's first session.

Because the aggregate is a mean of inputs, all GRU steps of a batch run before all TCN positions,
so the TCN sees every session of the batch at once. Item embeddings are inputs, not parameters:
they stay frozen, as in the paper's production setting.

Not here: Init connection, last-hidden aggregation, batch normalisation, one-hot items.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.files import read_json, write_json
from hiertcn.training.checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_weights, save_weights
from hiertcn.training.lanes import LaneBatch
from models.gru import GRUCell, StackedGRU
from models.scoring_terms import ScoringTerms
from models.tcn import TCN, CausalConv, PackedLayout, TCNBlock


@dataclass(frozen=True, kw_only=True)
class HierTCNConfig:
    """The shape of a HierTCN; defaults are the paper's (section 4.2.3).

    ``item_dim`` is the width of the item table, its popularity coordinate included. ``dropout`` is
    applied to the GRU's candidate activation and after each convolution. ``terms`` names the memory
    and freshness features that are scored beside the dot product (models/scoring_terms.py).

    Raises:
        InputError: a size is not positive, or ``dropout`` is outside [0, 1).
    """

    item_dim: int
    hidden: int = 128
    gru_layers: int = 4
    tcn_blocks: int = 4
    kernel: int = 5
    filters: int = 128
    dropout: float = 0.0
    terms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("item_dim", "hidden", "gru_layers", "tcn_blocks", "kernel", "filters"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"HierTCNConfig.{name} is {value!r}; expected a whole number >= 1")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"HierTCNConfig.dropout is {self.dropout}; expected 0 <= dropout < 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return {**asdict(self), "terms": list(self.terms)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HierTCNConfig":
        """Rebuild a configuration from ``to_dict``'s result.

        Raises:
            InputError: a field is unknown, missing or out of range.
        """
        try:
            return cls(**{**values, "terms": tuple(values.get("terms", ()))})
        except TypeError as error:
            raise InputError(
                f"the model configuration does not describe a HierTCN ({error}); expected the "
                f"fields {', '.join(cls.__dataclass_fields__)}: retrain or restore config.json"
            ) from None


class HierTCN(nn.Module):
    """The two-level network.

    Parts that serving exports: ``gru`` (:class:`models.gru.StackedGRU`), ``tcn``
    (:class:`models.tcn.TCN`), ``head`` (Linear, ReLU, Linear), ``start_item [item_dim]``,
    ``start_state [gru_layers, hidden]`` and ``terms`` (:class:`models.scoring_terms.ScoringTerms`,
    None where the configuration names none).
    """

    def __init__(self, config: HierTCNConfig) -> None:
        super().__init__()
        self.config = config
        self.start_item = nn.Parameter(torch.zeros(config.item_dim))
        self.start_state = nn.Parameter(torch.zeros(config.gru_layers, config.hidden))
        self.gru = StackedGRU(config.item_dim, config.hidden, config.gru_layers, config.dropout)
        self.tcn = TCN(
            config.item_dim + config.hidden,
            config.filters,
            config.kernel,
            [2**block for block in range(config.tcn_blocks)],
            config.dropout,
        )
        self.head = nn.Sequential(
            nn.Linear(config.filters, config.filters),
            nn.ReLU(),
            nn.Linear(config.filters, config.item_dim),
        )
        self.terms = ScoringTerms(config.terms, config.item_dim) if config.terms else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew; the ones that read items are scaled by ``sqrt(item_dim)``.

        The layers' own initialisation assumes inputs of unit variance, but item vectors have unit
        *norm*. Without the factor the first epochs are spent on growing those weights: on
        online_retail the validation MRR after 200 steps is .059 instead of .083.
        """
        for part in self.modules():
            if isinstance(part, GRUCell | CausalConv | nn.Linear):
                part.reset_parameters()
        if self.terms is not None:
            self.terms.reset_parameters()
        item_dim = self.config.item_dim
        scale = math.sqrt(item_dim)
        nn.init.normal_(self.start_item, std=1.0 / scale)
        nn.init.normal_(self.start_state, std=0.1)
        first_cell, first_block = self.gru.cells[0], self.tcn.blocks[0]
        assert isinstance(first_cell, GRUCell) and isinstance(first_block, TCNBlock)
        with torch.no_grad():
            first_cell.input_weight.mul_(scale)
            first_block.first.weight[:, :item_dim].mul_(scale)
            if isinstance(first_block.residual, nn.Linear):
                first_block.residual.weight[:, :item_dim].mul_(scale)

    @property
    def receptive_field(self) -> int:
        """Newest positions of a session (start token included) that one ``u`` can depend on."""
        return self.tcn.receptive_field

    def initial_state(self, batch: int) -> Tensor:
        """Return the start state for ``batch`` users, ``[batch, gru_layers, hidden]``."""
        return self.start_state.expand(batch, -1, -1)

    def gru_step(self, state: Tensor, session_mean: Tensor) -> Tensor:
        """Fold one closed session into the user state (Eq. 10).

        Args:
            state: ``[batch, gru_layers, hidden]`` float, before the session.
            session_mean: ``[batch, item_dim]`` float, mean embedding of the session's items.

        Returns:
            ``[batch, gru_layers, hidden]``, after the session.
        """
        after: Tensor = self.gru(state, session_mean)
        return after

    def encode(self, items: Tensor, lengths: Tensor, user_state: Tensor) -> Tensor:
        """Return the dynamic user embedding at every position (Eq. 11, 4).

        Args:
            items: ``[n, item_dim]`` float, the sessions' items one session after another.
            lengths: ``[sessions]`` int64, items per session (zero allowed), summing to ``n``.
            user_state: ``[sessions, hidden]`` float, the GRU's top layer before each session.

        Returns:
            ``[n + sessions, item_dim]``: a session of ``L`` items yields ``L + 1`` rows. Row ``i``
            has seen its first ``i`` items, so row 0 predicts the first item and row ``L`` the next,
            unseen one.
        """
        layout = PackedLayout(lengths + 1)
        is_item = layout.position > 0
        rows = torch.cat([self.start_item.unsqueeze(0), items])
        inputs = rows.index_select(0, is_item.cumsum(0) * is_item)
        channels = torch.cat([inputs, user_state.index_select(0, layout.session)], dim=1)
        u: Tensor = self.head(self.tcn(channels, layout))
        return u

    def forward(self, batch: LaneBatch, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step of the mini-batch generator.

        Args:
            batch: packed pieces of sessions, see :class:`hiertcn.training.lanes.LaneBatch`.
            state: ``[lanes, gru_layers, hidden]`` float, carried from the step before.

        Returns:
            ``u [targets, item_dim]``, one row per target of the batch in its packed order, and the
            lanes' state after the batch, still attached to this step's graph.
        """
        before, state = self._fold_sessions(batch, state)
        u = self.encode(batch.items.index_select(0, batch.inputs), batch.lengths - 1, before)
        return u.index_select(0, batch.targets), state

    def _fold_sessions(self, batch: LaneBatch, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the top-layer state before each piece ``[pieces, hidden]``, and the new state."""
        projected = self.gru.project(batch.session_means)
        start = self.start_state.unsqueeze(0)
        before = []
        for low, high in pairwise(batch.slot_offsets):
            lanes = batch.lanes[low:high]
            current = torch.where(
                batch.reset[low:high, None, None], start, state.index_select(0, lanes)
            )
            before.append(current[:, -1])
            after = self.gru.step_from_projection(current, projected[low:high])
            after = torch.where(batch.closes[low:high, None, None], after, current)
            state = state.index_copy(0, lanes, after)
        return torch.cat(before), state


def save_hiertcn(model: HierTCN, directory: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``directory`` (created if absent)."""
    write_json(directory / CONFIG_FILE, model.config.to_dict())
    save_weights(model, directory / WEIGHTS_FILE)


def load_hiertcn(directory: Path) -> HierTCN:
    """Rebuild the model that :func:`save_hiertcn` or training wrote, in evaluation mode.

    Raises:
        InputError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    model = HierTCN(HierTCNConfig.from_dict(read_json(directory / CONFIG_FILE)))
    load_weights(model, directory / WEIGHTS_FILE)
    return model.eval()
