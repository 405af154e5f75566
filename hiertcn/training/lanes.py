"""Turns a batch of item rows into the tensors a session model reads.

The only place where ids become embeddings in training: a batch from the generator holds item rows,
and one gather from the memory-mapped table per step makes it float32. Embeddings are inputs here,
never parameters.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiertcn.sessions.batches import SessionBatch

if TYPE_CHECKING:
    from hiertcn.items.table import ItemTable


@dataclass(frozen=True)
class LaneBatch:
    """One step of the generator as tensors: ``pieces`` of sessions, packed, slot by slot.

    Shapes:
        items: ``[n, item_dim]`` float32, the pieces' items one after another.
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
    batch: SessionBatch, table: "ItemTable", device: torch.device | str = "cpu"
) -> LaneBatch:
    """Gather the batch's embeddings and index arrays onto ``device``."""
    vectors = table.gather(batch.item_rows)
    n = len(batch.is_target)
    last = np.zeros(n, bool)
    last[np.cumsum(batch.lengths) - 1] = True
    targets = np.flatnonzero(batch.is_target)

    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    return LaneBatch(
        items=tensor(vectors[:n]),
        lengths=tensor(batch.lengths),
        inputs=tensor(np.flatnonzero(~last)),
        targets=tensor(targets),
        session_means=tensor(_session_means(batch, vectors)),
        lanes=tensor(batch.lane),
        reset=tensor(batch.reset),
        closes=tensor(batch.closes),
        slot_offsets=tuple(batch.slot_offsets.tolist()),
        target_rows=tensor(batch.item_rows[targets].astype(np.int64)),
        interactions=batch.interactions[targets],
    )


def _session_means(batch: SessionBatch, vectors: NDArray[Any]) -> NDArray[Any]:
    means = np.zeros((len(batch.lengths), vectors.shape[1]), np.float32)
    closing = np.flatnonzero(batch.closes)
    if len(closing) == 0:
        return means
    members = vectors[batch.member_rows]
    offsets = np.cumsum(batch.member_lengths) - batch.member_lengths
    means[closing] = np.add.reduceat(members, offsets, axis=0)
    means[closing] /= batch.member_lengths[:, None]
    return means
