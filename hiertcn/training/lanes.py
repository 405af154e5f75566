"""Turns a batch of item rows into the tensors a session model reads.

A batch from the generator holds item rows, and one gather per step makes them float32 vectors.
Where the vectors are trained, everything made of them here stays in the step's graph.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiertcn.items.table import ItemTable
from hiertcn.sessions.batches import SessionBatch
from hiertcn.training.item_vectors import ItemVectors, as_vectors


@dataclass(frozen=True)
class LaneBatch:
    """One step of the generator as tensors: ``pieces`` of sessions, packed, slot by slot.

    Shapes:
        items: ``[n, item_dim]`` float32, the pieces' items one after another.
        item_rows: ``[n]`` int64, their item rows.
        lengths: ``[pieces]`` int64, items per piece, all >= 1.
        inputs: ``[n - pieces]`` int64, rows of ``items`` the TCN reads: all but each piece's last,
            which only a later piece could use.
        targets: ``[targets]`` int64, rows of ``items`` that are predicted; the others are context.
        session_means: ``[pieces, item_dim]`` float32, mean over the *whole* session a piece closes;
            zero where it closes none.
        lanes: ``[pieces]`` int64. reset, closes: ``[pieces]`` bool.
        slot_offsets: pieces of slot ``k`` are ``slot_offsets[k]:slot_offsets[k + 1]``; the lanes of
            one slot are distinct.
        target_rows: ``[targets]`` int64, item rows of the targets.
        interactions: ``[targets]`` int64, their places in the session store.
    """

    items: Tensor
    item_rows: Tensor
    lengths: Tensor
    inputs: Tensor
    targets: Tensor
    session_means: Tensor
    lanes: Tensor
    reset: Tensor
    closes: Tensor
    slot_offsets: tuple[int, ...]
    target_rows: Tensor
    interactions: NDArray[Any]


def to_tensors(
    batch: SessionBatch, table: ItemTable | ItemVectors, device: torch.device | str = "cpu"
) -> LaneBatch:
    """Gather the batch's embeddings and index arrays onto ``device``."""
    vectors = as_vectors(table, device).gather(batch.item_rows)
    n = len(batch.is_target)
    last = np.zeros(n, bool)
    last[np.cumsum(batch.lengths) - 1] = True
    targets = np.flatnonzero(batch.is_target)
    item_rows = batch.item_rows.astype(np.int64)

    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return LaneBatch(
        items=vectors[:n],
        item_rows=tensor(item_rows[:n]),
        lengths=tensor(batch.lengths),
        inputs=tensor(np.flatnonzero(~last)),
        targets=tensor(targets),
        session_means=_session_means(batch, vectors),
        lanes=tensor(batch.lane),
        reset=tensor(batch.reset),
        closes=tensor(batch.closes),
        slot_offsets=tuple(batch.slot_offsets.tolist()),
        target_rows=tensor(item_rows[targets]),
        interactions=batch.interactions[targets],
    )


def _session_means(batch: SessionBatch, vectors: Tensor) -> Tensor:
    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(vectors.device)

    closing = np.flatnonzero(batch.closes)
    owner = tensor(np.repeat(closing, batch.member_lengths))
    share = tensor(np.repeat(np.float32(1.0) / batch.member_lengths, batch.member_lengths))
    members = vectors.index_select(0, tensor(batch.member_rows)) * share.float().unsqueeze(1)
    means = vectors.new_zeros(len(batch.lengths), vectors.shape[1])
    return means.index_add(0, owner, members)
