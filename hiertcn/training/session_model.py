"""What the training loop and offline scoring need from a session network.

``models/hiertcn.py`` is the network; the library never imports it. Anything with these members can
be trained, validated and ranked with.
"""

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


@runtime_checkable
class FoldsItems(Protocol):
    """A session network whose state needs a session's items, not only their mean."""

    def fold_items(self, state: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        """Fold closed sessions: ``[s, layers, hidden], [n, dim], [s] -> [s, layers, hidden]``."""
