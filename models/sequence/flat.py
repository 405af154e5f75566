"""The base of networks that read a user's history as one sequence without a hierarchy.

Training cuts a history into pieces with context (see hiertcn/sessions/batches.py), evaluation into
the same ones, so ``u`` is the same in both. Item vectors are multiplied by ``sqrt(item_dim)``: they
have about unit length, and layers expect inputs of unit variance.
"""

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hiertcn.errors import InputError
from hiertcn.sessions.store import SessionStore
from hiertcn.training.item_vectors import ItemVectors
from hiertcn.training.lanes import LaneBatch
from hiertcn.training.whole_history import history_store
from models.dropout import Dropout
from models.sequence.config import NetworkConfig
from models.sequence.tokens import Windows, request_windows

WHOLE: Final = 1 << 40
"""As a number of items: more than any history has."""


class FlatNetwork(nn.Module):
    """A causal network over tokens.

    Subclasses say how much history a window has, and map tokens to user embeddings. A network that
    carries a state from piece to piece says so by its :meth:`initial_state`.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.item_dim = config.item_dim
        self.start_item = nn.Parameter(torch.randn(config.item_dim) / math.sqrt(config.item_dim))
        self.input_dropout = Dropout(config.input_dropout)
        self._starts: NDArray[np.bool_] | None = None

    @property
    def receptive_field(self) -> int:
        """Earlier items that a piece brings along; at least 1 unless a state is carried."""
        raise NotImplementedError

    @property
    def piece(self) -> int:
        """Items after which evaluation begins a new window."""
        raise NotImplementedError

    def initial_state(self, batch: int) -> Tensor:
        """Return the state before a user's first item, ``[batch, layers, hidden]``."""
        return self.start_item.new_zeros(batch, 0, 0)

    def embed_tokens(self, x: Tensor, windows: Windows, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``u`` after every token.

        Args:
            x: ``[tokens, item_dim]`` float, scaled to unit variance.
            windows: how the tokens lie.
            state: ``[windows, layers, hidden]`` before the windows.

        Returns:
            ``[tokens, item_dim]``, and the state after the windows.
        """
        raise NotImplementedError

    def embed_states(self, state: Tensor) -> Tensor:
        """Return ``u`` of carried states, ``[n, layers, hidden] -> [n, item_dim]``."""
        raise NotImplementedError

    def learn_from(self, store: SessionStore, end_us: int) -> SessionStore:
        """See :class:`hiertcn.training.whole_history.HistoryModel`."""
        starts = np.zeros(len(store.item_rows), np.bool_)
        starts[store.session_offsets[:-1]] = True
        self._starts = starts
        return history_store(store, end_us)

    @torch.inference_mode()
    def embed_requests(
        self,
        store: SessionStore,
        vectors: ItemVectors,
        session: NDArray[np.int64],
        interaction: NDArray[np.int64],
    ) -> Tensor:
        """See :class:`hiertcn.training.whole_history.HistoryModel`; unknown rows are skipped."""
        asked = request_windows(
            store,
            len(vectors),
            session,
            interaction,
            piece=self.piece,
            context=self.receptive_field,
        )
        windows = Windows.of(
            asked.counts, asked.starts, self.start_item.device, asked.ends_with_start
        )
        x = self._tokens(vectors.gather(asked.rows), windows)
        u, _ = self.embed_tokens(x, windows, self.initial_state(len(asked.counts)))
        return u.index_select(0, asked.token(windows))

    def forward(self, batch: LaneBatch, state: Tensor) -> tuple[Tensor, Tensor]:
        """Run one step of the mini-batch generator over the store of :meth:`learn_from`.

        Args:
            batch: pieces of histories.
            state: ``[lanes, layers, hidden]`` float, carried from the step before.

        Returns:
            ``u [targets, item_dim]`` in the batch's packed order, and the lanes' next state.
        """
        device = batch.items.device
        lengths = batch.lengths.cpu().numpy()
        starts = self._session_starts(batch, lengths)
        if state.shape[1] == 0:
            windows = Windows.of(lengths, starts, device)
            u, _ = self.embed_tokens(self._tokens(batch.items, windows), windows, state)
            return u.index_select(0, windows.before.index_select(0, batch.targets)), state
        rows = np.concatenate([[0], np.cumsum(lengths)])
        before = []
        for low, high in zip(batch.slot_offsets[:-1], batch.slot_offsets[1:], strict=True):
            part = slice(int(rows[low]), int(rows[high]))
            windows = Windows.of(lengths[low:high], starts[part], device)
            lanes = batch.lanes[low:high]
            current = torch.where(
                batch.reset[low:high, None, None],
                self.initial_state(high - low),
                state.index_select(0, lanes),
            )
            x = self._tokens(batch.items[part], windows)
            u, after = self.embed_tokens(x, windows, current)
            state = state.index_copy(0, lanes, after)
            # What comes before a window's first item was the piece before.
            both = torch.cat([u, self.embed_states(current)])
            place = windows.before
            before.append(both.index_select(0, torch.where(place < 0, len(u) - 1 - place, place)))
        return torch.cat(before).index_select(0, batch.targets), state

    def _tokens(self, items: Tensor, windows: Windows) -> Tensor:
        rows = torch.cat([self.start_item.unsqueeze(0), self.input_dropout(items)])
        return rows.index_select(0, windows.item + 1) * math.sqrt(self.item_dim)

    def _session_starts(self, batch: LaneBatch, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
        if self._starts is None:
            raise InputError(
                f"{self.config.network} does not know where sessions start; make the batches from "
                "the store that learn_from returns"
            )
        ends = np.cumsum(lengths)
        targets = batch.targets.cpu().numpy()
        # The last row of a piece is always a target, and its rows are consecutive in the store.
        last = np.asarray(batch.interactions)[np.searchsorted(targets, ends - 1)]
        rows = np.repeat(last - ends + 1, lengths) + np.arange(int(lengths.sum()))
        starts: NDArray[np.bool_] = self._starts[rows]
        return starts
