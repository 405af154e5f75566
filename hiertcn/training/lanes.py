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
        pool_targets: ``[any]`` int64, the targets' rows of all ranks' batches at this step, from
            which shared negatives are drawn.
        interactions: ``[targets]`` int64, their places in the session store.
        gaps_us: ``[n]`` int64, time since the item before in the session; 0 for its first.
        session_gaps_us: ``[pieces]`` int64, time from the user's session before to this one; -1 for
            a user's first.
        skipped: ``[pieces]`` int64, items of the session before the piece's first row.
        steps: ``[pieces]`` int64, sessions of the user before the piece's.
        event_types: ``[n]`` int64, see ``SessionStore.event_types``.
        all_items: ``[n + extra, item_dim]`` float32, ``items`` and what only a session's aggregate
            needs: the earlier items of cut sessions.
        member_rows: ``[members]`` int64, rows of ``all_items`` of all items of the sessions that
            close, one after another.
        member_owner: ``[members]`` int64, the piece that closes each one's session.
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
    pool_targets: NDArray[Any]
    interactions: NDArray[Any]
    gaps_us: Tensor
    session_gaps_us: Tensor
    skipped: Tensor
    steps: Tensor
    event_types: Tensor
    all_items: Tensor
    member_rows: Tensor
    member_owner: Tensor


def to_tensors(
    batch: SessionBatch, table: ItemTable | ItemVectors, device: torch.device | str = "cpu"
) -> LaneBatch:
    """Gather the batch's embeddings and index arrays onto ``device``."""
    n = len(batch.is_target)
    vectors, means = as_vectors(table, device).gather_sessions(batch)
    item_rows = batch.item_rows[:n].astype(np.int64)
    target_rows = item_rows[batch.targets]

    device = torch.device(device)
    on_cpu = device.type == "cpu"

    def tensor(array: NDArray[Any]) -> Tensor:
        # A dozen calls of to() take longer than the rest of a small batch.
        return torch.from_numpy(array) if on_cpu else torch.from_numpy(array).to(device)

    return LaneBatch(
        items=vectors[:n],
        item_rows=tensor(item_rows),
        lengths=tensor(batch.lengths),
        inputs=tensor(batch.inputs),
        targets=tensor(batch.targets),
        session_means=means,
        lanes=tensor(batch.lane),
        reset=tensor(batch.reset),
        closes=tensor(batch.closes),
        slot_offsets=tuple(batch.slot_offsets.tolist()),
        target_rows=tensor(target_rows),
        pool_targets=target_rows,
        interactions=batch.interactions[batch.targets],
        gaps_us=tensor(batch.gaps_us),
        session_gaps_us=tensor(batch.session_gaps_us),
        skipped=tensor(batch.skipped),
        steps=tensor(batch.steps),
        event_types=tensor(batch.event_types),
        all_items=vectors,
        member_rows=tensor(batch.member_rows),
        member_owner=tensor(batch.member_owner),
    )
