"""What the training loop and offline scoring need from a session network.

``models/hiertcn.py`` is the network; the library never imports it. Anything with these members can
be trained, validated and ranked with.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from hiertcn.training.lanes import LaneBatch


class SessionModel(Protocol):
    """A user state per closed session, and a user embedding per position of the open one."""

    @property
    def receptive_field(self) -> int:
        """Newest positions of a session that one embedding can depend on."""

    def initial_state(self, batch: int) -> Tensor:
        """Return the start state, ``[batch, layers, hidden]``."""

    def gru_step(self, state: Tensor, session_mean: Tensor) -> Tensor:
        """Fold a closed session: ``[batch, layers, hidden], [batch, dim] -> state``."""

    def encode(self, items: Tensor, lengths: Tensor, user_state: Tensor) -> Tensor:
        """Embed every position: ``[n, dim], [s], [s, hidden] -> [n + s, dim]``."""

    def __call__(self, batch: LaneBatch, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``u [targets, dim]`` and the lanes' next state ``[lanes, layers, hidden]``."""


@dataclass(frozen=True)
class SessionContext:
    """What is known of sessions beside their items, packed as the items are.

    ``gaps_us`` int64 ``[n]``, microseconds since the item before in the session, 0 for its first;
    ``session_gaps_us`` int64 ``[sessions]``, from the end of the user's session before to the start
    of this one, -1 for a user's first; ``skipped`` int64 ``[sessions]``, earlier items of the
    session that were left out because nothing asked depends on them; ``steps`` int64
    ``[sessions]``, the user's sessions before; ``event_types`` int64 ``[n]``, 0 for none, else 1 +
    the place of the type among those of the model.
    """

    gaps_us: Tensor
    session_gaps_us: Tensor
    skipped: Tensor
    steps: Tensor
    event_types: Tensor


@runtime_checkable
class FoldsItems(Protocol):
    """A session network whose state needs a session's items, not only their mean."""

    def fold_items(self, state: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        """Fold closed sessions: ``[s, layers, hidden], [n, dim], [s] -> [s, layers, hidden]``."""


@runtime_checkable
class ReadsContext(Protocol):
    """A session network that may want the context of what it reads, as a last argument."""

    @property
    def reads_context(self) -> bool:
        """Whether it does."""

    @property
    def event_types(self) -> tuple[str, ...]:
        """The types that the context's codes count from 1; none where it reads none."""

    def encode(
        self,
        items: Tensor,
        lengths: Tensor,
        user_state: Tensor,
        context: SessionContext | None = None,
    ) -> Tensor:
        """See :meth:`SessionModel.encode`."""

    def fold_items(
        self, state: Tensor, items: Tensor, lengths: Tensor, context: SessionContext | None = None
    ) -> Tensor:
        """See :meth:`FoldsItems.fold_items`."""
