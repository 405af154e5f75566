"""HierTCN (You et al., WWW 2019): a GRU over sessions above a TCN within the session.

The high level takes one GRU step per closed session on the mean of its item embeddings (Eq. 10).
The low level is a causal TCN over ``concat(item, user state)`` at every position of a session (Full
connection, Eq. 11), followed by the two-layer perceptron of Eq. 4, or a linear map, whose output
``u`` scores an item by the dot product with its embedding (Eq. 12). Learned tokens stand for the
item before a session's first and for the state before a user's first session.

Where the aggregate is made of inputs (a mean, plain or weighted), all GRU steps of a batch run
before all TCN positions, so the TCN sees every session of the batch at once. With the TCN's last
hidden vector as the aggregate the batch is worked off slot by slot. Item vectors are inputs, not
parameters; whether they are trained is hiertcn/training/item_vectors.py's.

Time gaps enter as ``log(1 + seconds) / 10``: to the GRU the pause before the session it folds, to
the TCN the same pause at the start token and the time since the item before at each item.

The type of each item's event enters as a learned vector beside the item, to the TCN alone: a
session's mean says nothing of types.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.files import read_json, write_json
from hiertcn.training.checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_weights, save_weights
from hiertcn.training.lanes import LaneBatch
from hiertcn.training.session_model import SessionContext
from models.dropout import Dropout
from models.gru import GRUCell, StackedGRU
from models.head import make_head
from models.hiertcn_config import HierTCNConfig as HierTCNConfig
from models.scoring_terms import ScoringTerms
from models.session_layouts import LayoutName, make_layout
from models.step_norm import StepNorm
from models.tcn import TCN, CausalConv, TCNBlock

_NORM_STEPS: Final = 32
_EVENT_TYPE_DIM: Final = 8


class HierTCN(nn.Module):
    """The two-level network.

    Parts that serving exports: ``gru`` (:class:`models.gru.StackedGRU`), ``tcn``
    (:class:`models.tcn.TCN`), ``head`` (:func:`models.head.make_head`), ``start_item [item_dim]``,
    ``start_state [gru_layers, hidden]`` and ``terms`` (:class:`models.scoring_terms.ScoringTerms`,
    None where the configuration names none).

    Args:
        config: the shape.
        layout: how the TCN holds sessions, see :func:`models.session_layouts.make_layout`; changes
            nothing but speed and memory.
    """

    def __init__(self, config: HierTCNConfig, layout: LayoutName = "auto") -> None:
        super().__init__()
        self.config, self.layout = config, layout
        gaps = int(config.time_gaps)
        aggregate_dim = config.filters if config.aggregate == "last" else config.item_dim
        self.start_item = nn.Parameter(torch.zeros(config.item_dim))
        self.start_state = nn.Parameter(torch.zeros(config.gru_layers, config.hidden))
        self.gru = StackedGRU(
            aggregate_dim + gaps, config.hidden, config.gru_layers, config.dropout
        )
        self.gru_norm: StepNorm | None = None
        if config.batch_norm:
            self.gru_norm = StepNorm(3 * config.hidden, _NORM_STEPS)
        self.event_vectors: nn.Embedding | None = None
        if config.event_types:
            self.event_vectors = nn.Embedding(1 + len(config.event_types), _EVENT_TYPE_DIM)
        types = _EVENT_TYPE_DIM if config.event_types else 0
        self.tcn = TCN(
            config.item_dim + config.hidden + gaps + types,
            config.filters,
            config.kernel,
            [2**block for block in range(config.tcn_blocks)],
            config.dropout,
            _NORM_STEPS if config.batch_norm else 0,
        )
        self.head = make_head(config.head, config.filters, config.item_dim)
        self.item_scores: nn.Linear | None = None
        if config.aggregate == "weighted":
            self.item_scores = nn.Linear(config.item_dim, 1, bias=False)
        self.input_dropout = Dropout(config.input_dropout)
        self.terms = ScoringTerms(config.terms) if config.terms else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew; the ones that read items are scaled by ``sqrt(item_dim)``.

        The layers' own initialisation assumes inputs of unit variance, but item vectors have unit
        *norm*. Without the factor the first epochs are spent on growing those weights: on
        online_retail the validation MRR after 200 steps is .059 instead of .083.
        """
        for part in self.modules():
            if isinstance(part, GRUCell | CausalConv | StepNorm | nn.Linear | nn.Embedding):
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
            if self.item_scores is not None:
                # All items weigh the same until something is learnt.
                self.item_scores.weight.zero_()
            if self.config.aggregate != "last":
                first_cell.input_weight[:item_dim].mul_(scale)
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

    @property
    def reads_context(self) -> bool:
        """Whether :meth:`encode` and :meth:`fold_items` need the context of what they read."""
        return self.config.time_gaps or self.config.batch_norm or bool(self.config.event_types)

    @property
    def event_types(self) -> tuple[str, ...]:
        """The types that a context's codes count from 1; see ``HierTCNConfig.event_types``."""
        return self.config.event_types

    def gru_step(self, state: Tensor, session_mean: Tensor) -> Tensor:
        """Fold one closed session into the user state (Eq. 10), of the mean aggregate alone.

        Args:
            state: ``[batch, gru_layers, hidden]`` float, before the session.
            session_mean: ``[batch, item_dim]`` float, mean embedding of the session's items.

        Returns:
            ``[batch, gru_layers, hidden]``, after the session.

        Raises:
            InputError: the configured aggregate is no mean, or more than it is read.
        """
        config = self.config
        if config.aggregate != "mean" or config.time_gaps or config.batch_norm:
            raise InputError(
                f"a HierTCN with aggregate {config.aggregate!r}, time_gaps {config.time_gaps} and "
                f"batch_norm {config.batch_norm} does not fold a mean; expected 'mean', False and "
                "False"
            )
        after: Tensor = self.gru(state, session_mean)
        return after

    def fold_items(
        self, state: Tensor, items: Tensor, lengths: Tensor, context: SessionContext | None = None
    ) -> Tensor:
        """Fold closed sessions, whatever the aggregate.

        Args:
            state: ``[sessions, gru_layers, hidden]`` float, before the sessions.
            items: ``[n, item_dim]`` float, one session after another.
            lengths: ``[sessions]`` int64.
            context: of the items; required where :attr:`reads_context`.

        Returns:
            ``[sessions, gru_layers, hidden]``.
        """
        if self.config.aggregate == "last":
            hidden = self._hidden(items, lengths, state[:, -1], context)
            aggregate = hidden.index_select(0, (lengths + 1).cumsum(0) - 1)
        else:
            owner = torch.repeat_interleave(
                torch.arange(len(lengths), device=lengths.device), lengths
            )
            aggregate = self._mean(items, owner, lengths)
        gaps = None if context is None else context.session_gaps_us
        steps = None if context is None else context.steps
        return self._step(state, self._with_gaps(aggregate, gaps), steps)

    def encode(
        self,
        items: Tensor,
        lengths: Tensor,
        user_state: Tensor,
        context: SessionContext | None = None,
    ) -> Tensor:
        """Return the dynamic user embedding at every position (Eq. 11, 4).

        Args:
            items: ``[n, item_dim]`` float, the sessions' items one session after another.
            lengths: ``[sessions]`` int64, items per session (zero allowed), summing to ``n``.
            user_state: ``[sessions, hidden]`` float, the GRU's top layer before each session.
            context: of the items; required where :attr:`reads_context`.

        Returns:
            ``[n + sessions, item_dim]``: a session of ``L`` items yields ``L + 1`` rows. Row ``i``
            has seen its first ``i`` items, so row 0 predicts the first item and row ``L`` the next,
            unseen one.
        """
        u: Tensor = self.head(self._hidden(items, lengths, user_state, context))
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
        if self.config.aggregate == "last":
            return self._forward_by_slot(batch, state)
        before, state = self._fold_sessions(batch, state)
        items = batch.items.index_select(0, batch.inputs)
        context = None
        if self.reads_context:
            context = SessionContext(
                batch.gaps_us.index_select(0, batch.inputs),
                batch.session_gaps_us,
                batch.skipped,
                batch.steps,
                batch.event_types.index_select(0, batch.inputs),
            )
        u = self.encode(items, batch.lengths - 1, before, context)
        return u.index_select(0, batch.targets), state

    def _hidden(
        self, items: Tensor, lengths: Tensor, user_state: Tensor, context: SessionContext | None
    ) -> Tensor:
        """Return the TCN's output at every position, ``[n + sessions, filters]``."""
        if self.reads_context and context is None:
            raise InputError(
                f"HierTCNConfig.time_gaps is {self.config.time_gaps}, batch_norm "
                f"{self.config.batch_norm} and event_types {self.config.event_types}; expected the "
                "sessions' context beside their items"
            )
        skipped = None if context is None else context.skipped
        layout = make_layout(self.layout, lengths + 1, skipped)
        is_item = layout.position > 0
        place = is_item.cumsum(0)
        rows = torch.cat([self.start_item.unsqueeze(0), self.input_dropout(items)])
        inputs = rows.index_select(0, place * is_item)
        states = user_state.index_select(0, layout.session)
        if self.config.connection == "init":
            states = states * ~is_item.unsqueeze(1)
        channels = [inputs, states]
        if context is not None and self.config.time_gaps:
            pauses = context.session_gaps_us.index_select(0, layout.session)
            gaps = torch.cat([context.gaps_us.new_zeros(1), context.gaps_us]).index_select(0, place)
            channels.append(_gap_feature(torch.where(is_item, gaps, pauses)))
        if context is not None and self.event_vectors is not None:
            types = torch.cat([context.event_types.new_zeros(1), context.event_types])
            channels.append(self.event_vectors(types.index_select(0, place * is_item)))
        hidden: Tensor = self.tcn(torch.cat(channels, dim=1), layout)
        return hidden

    def _mean(self, items: Tensor, owner: Tensor, lengths: Tensor) -> Tensor:
        """Return the plain or weighted mean of each session's items, ``[sessions, item_dim]``."""
        sessions = len(lengths)
        if self.item_scores is None:
            weights = items.new_ones(len(items), 1)
        else:
            scores = self.item_scores(items)
            index = owner.unsqueeze(1)
            most = scores.new_full((sessions, 1), -torch.inf).scatter_reduce(
                0, index, scores.detach(), "amax"
            )
            weights = torch.exp(scores - most.index_select(0, owner))
        total = weights.new_zeros(sessions, 1).index_add(0, owner, weights)
        summed = items.new_zeros(sessions, items.shape[1]).index_add(0, owner, items * weights)
        # A session without a known item has no weight at all.
        mean: Tensor = self.input_dropout(summed / torch.where(total > 0, total, 1.0))
        return mean

    def _with_gaps(self, aggregate: Tensor, session_gaps_us: Tensor | None) -> Tensor:
        if not self.config.time_gaps:
            return aggregate
        if session_gaps_us is None:
            raise InputError("HierTCNConfig.time_gaps is True; expected the sessions' context")
        return torch.cat([aggregate, _gap_feature(session_gaps_us)], dim=1)

    def _project(
        self, aggregate: Tensor, steps: Tensor | None, counts: Tensor | None = None
    ) -> Tensor:
        """Return what the GRU's first layer makes of its input, ``[sessions, 3 * hidden]``."""
        projected = self.gru.project(aggregate)
        if self.gru_norm is None:
            return projected
        if steps is None:
            raise InputError("HierTCNConfig.batch_norm is True; expected the sessions' context")
        normed: Tensor = self.gru_norm(projected, steps, counts)
        return normed

    def _step(
        self,
        state: Tensor,
        aggregate: Tensor,
        steps: Tensor | None,
        counts: Tensor | None = None,
    ) -> Tensor:
        return self.gru.step_from_projection(state, self._project(aggregate, steps, counts))

    def _fold_sessions(self, batch: LaneBatch, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the top-layer state before each piece ``[pieces, hidden]``, and the new state."""
        if self.config.aggregate == "weighted":
            members = batch.all_items.index_select(0, batch.member_rows)
            aggregate = self._mean(members, batch.member_owner, batch.lengths)
        else:
            aggregate = self.input_dropout(batch.session_means)
        projected = self._project(
            self._with_gaps(aggregate, batch.session_gaps_us), batch.steps, batch.closes
        )
        before = []
        for low, high in pairwise(batch.slot_offsets):
            current = self._current(batch, state, low, high)
            before.append(current[:, -1])
            after = self.gru.step_from_projection(current, projected[low:high])
            state = self._advance(batch, state, current, after, low, high)
        return torch.cat(before), state

    def _forward_by_slot(self, batch: LaneBatch, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run the TCN of a slot before the GRU step that reads its last hidden vector.

        A later piece of a cut session has the receptive field's context, so its last hidden vector
        is the whole session's.
        """
        ends = batch.lengths.cumsum(0).tolist()
        rows = [0, *ends]
        outputs = []
        for low, high in pairwise(batch.slot_offsets):
            lengths = batch.lengths[low:high]
            current = self._current(batch, state, low, high)
            held = slice(rows[low], rows[high])
            context = SessionContext(
                batch.gaps_us[held],
                batch.session_gaps_us[low:high],
                batch.skipped[low:high],
                batch.steps[low:high],
                batch.event_types[held],
            )
            hidden = self._hidden(batch.items[held], lengths, current[:, -1], context)
            last = (lengths + 1).cumsum(0) - 1
            aggregate = self._with_gaps(hidden.index_select(0, last), context.session_gaps_us)
            after = self._step(current, aggregate, context.steps, batch.closes[low:high])
            state = self._advance(batch, state, current, after, low, high)
            # A piece's last output predicts what only a later piece asks for.
            is_asked = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            is_asked[last] = False
            outputs.append(hidden[is_asked])
        u: Tensor = self.head(torch.cat(outputs).index_select(0, batch.targets))
        return u, state

    def _current(self, batch: LaneBatch, state: Tensor, low: int, high: int) -> Tensor:
        """Return the states before the pieces of a slot."""
        given = state.index_select(0, batch.lanes[low:high])
        return torch.where(batch.reset[low:high, None, None], self.start_state.unsqueeze(0), given)

    def _advance(
        self, batch: LaneBatch, state: Tensor, current: Tensor, after: Tensor, low: int, high: int
    ) -> Tensor:
        """Return the lanes' states after a slot, of which only closing pieces took a step."""
        after = torch.where(batch.closes[low:high, None, None], after, current)
        return state.index_copy(0, batch.lanes[low:high], after)


def _gap_feature(gaps_us: Tensor) -> Tensor:
    """Return ``log(1 + seconds) / 10 [n, 1]``: 0.7 for twenty minutes, 1.6 for four months."""
    return (torch.log1p(gaps_us.clamp(min=0).float() * 1e-6) * 0.1).unsqueeze(1)


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
