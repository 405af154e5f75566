"""What a loss asks for: the next item at each position, or one further ahead in the session."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiertcn.sessions.store import SessionStore
from hiertcn.training.item_vectors import ItemVectors


class Targets(Protocol):
    """What the loss needs of a batch; a `hiertcn.training.lanes.LaneBatch` has it."""

    @property
    def items(self) -> Tensor:
        """Item vectors, ``[n, dim]`` float."""

    @property
    def targets(self) -> Tensor:
        """Rows of ``items`` that are predicted, ``[targets]`` int64."""

    @property
    def target_rows(self) -> Tensor:
        """Their item rows, ``[targets]`` int64."""

    @property
    def interactions(self) -> NDArray[np.int64]:
        """Their places in the session store, int64 ``[targets]``."""

    @property
    def pool_targets(self) -> NDArray[np.int64]:
        """Item rows that may join the pool, int64 ``[m]``: the targets of all ranks."""


@dataclass(frozen=True)
class _TargetsAhead:
    items: Tensor
    targets: Tensor
    target_rows: Tensor
    interactions: NDArray[np.int64]
    pool_targets: NDArray[np.int64]


def targets_ahead(
    batch: Targets, store: SessionStore, vectors: ItemVectors, distance: int
) -> tuple[Tensor, Targets]:
    """Return the items ``distance`` places after the batch's targets, within their sessions.

    Args:
        batch: the targets.
        store: their session store.
        vectors: the item vectors.
        distance: places, at least 1.

    Returns:
        ``[m]`` int64, which targets have such an item, and what to ask of their embeddings.
        ``interactions`` stay those of the batch: a request is made when the next item is unknown.
    """
    places = batch.interactions
    offsets = store.session_offsets
    ends = offsets[np.searchsorted(offsets, places, side="right")]
    index = np.flatnonzero(places + distance < ends)
    rows = store.item_rows[places[index] + distance].astype(np.int64)
    device = batch.target_rows.device
    return torch.from_numpy(index).to(device), _TargetsAhead(
        items=vectors.gather(rows),
        targets=torch.arange(len(index), device=device),
        target_rows=torch.from_numpy(rows).to(device),
        interactions=places[index],
        pool_targets=batch.pool_targets,
    )
