"""Every user's state over all closed sessions, computed by the very model that will serve it.

Users are sorted by how many closed sessions they have and advance together, most sessions first:
each step takes the next session of all users of a block that still have one, as one batch through
the exported ``gru_step``. So no product is spent on padding, and memory is bounded by a block of
``batch`` users and ``_GATHER_ROWS`` item vectors a thread, whatever the log's size; states and
histories go straight into the snapshot's memory-mapped files. Blocks are independent, so as many
threads as asked compute one each: with 512 users a block's activations stay in a core's cache,
where one session took 20 us of processor time against 25 us with 4096.

A session is closed if its last interaction is at or before ``watermark - gap``; only a user's last
session can be open. All earlier ones are closed by the session that follows them. The snapshot
keeps each user's last ``HISTORY`` interactions, more only where the open session is longer. Beside
it lie the live counts of the last six hours (``live_windows.py``) and, where the model has scoring
terms, the transitions of the whole log: fresher than those that the model was trained with, which
may not see the sessions it is tested on.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.items.gathering import gather_sessions
from hiertcn.items.table import ItemTable
from hiertcn.serving.live.live_followers import ReleasedTransitions
from hiertcn.serving.live.live_windows import MinuteCounts
from hiertcn.serving.records.gru_step import GruStep
from hiertcn.serving.records.snapshot import (
    LIVE_COUNTS,
    LIVE_TRANSITIONS,
    NEVER_US,
    TRANSITIONS,
    SnapshotArrays,
    new_snapshot,
)
from hiertcn.sessions.memory import HISTORY
from hiertcn.sessions.store import SessionStore, ranges
from hiertcn.sessions.transitions import count_transitions

_log = logging.getLogger(__name__)

_GATHER_ROWS: Final = 65_536
"""Item vectors gathered at once: 32 MB at 128 float32."""

_HISTORY_USERS: Final = 16_384
"""Users whose histories are copied at once: 26 MB of places at 200 interactions each."""


@dataclass(frozen=True, kw_only=True)
class BackfillSummary:
    """What the backfill did; ``steps`` counts ``gru_step`` calls."""

    users: int
    closed_sessions: int
    open_sessions: int
    steps: int


def backfill_states(
    store: SessionStore,
    table: ItemTable,
    gru_step: Path,
    start_state: NDArray[np.float32],
    output: Path,
    *,
    batch: int = 512,
    dtype: str = "float32",
    threads: int = 1,
    with_transitions: bool = False,
) -> BackfillSummary:
    """Write the state snapshot of all users of ``store`` to ``output``, whole or not at all.

    Args:
        store: all sessions up to the watermark.
        table: item vectors ``[items, dim]`` that ``gru_step`` was trained with.
        gru_step: the exported ONNX file.
        start_state: float32 ``[layers, hidden]``, the state before a first session.
        output: folder of the snapshot, see ``hiertcn.serving.records.snapshot``.
        batch: users advanced together.
        dtype: of the stored states, float32 or float16 (half the size, 3 significant digits).
        threads: blocks computed at the same time, each on one thread of onnxruntime.
        with_transitions: whether to count which items follow which, for a model with scoring
            terms.

    Raises:
        InputError: the store refers to items beyond the table, or the model, the start state and
            the table disagree in shape.
    """
    if batch < 1:
        raise InputError(f"batch is {batch}; expected at least 1 user")
    if store.meta.items > len(table):
        raise InputError(
            f"the session store refers to {store.meta.items} items but the item table holds "
            f"{len(table)}; build both from one item index"
        )
    model = GruStep(gru_step, start_state, table.dim)
    sessions = _Sessions.of(store)
    order = np.argsort(-sessions.closed_counts, kind="stable")
    history_starts, history_offsets = sessions.histories(store)
    closed_total = int(sessions.closed_counts.sum())
    steps = 0

    def block_of(users: NDArray[np.int64]) -> tuple[int, int]:
        block, counts = np.tile(start_state, (len(users), 1, 1)), sessions.closed_counts[users]
        for number in range(int(counts[0])):
            # Sorted by falling counts, those that still have a session are the first ones.
            active = int(np.searchsorted(-counts, -number, side="left"))
            means = session_means(
                store, table, store.user_offsets[users[:active]] + np.int64(number)
            )
            block[:active] = model(block[:active], means)
        snapshot.states[users] = block
        return int(counts[0]), int(counts.sum())

    with (
        new_snapshot(
            output,
            users=store.user_ids,
            state_shape=(start_state.shape[0], start_state.shape[1]),
            dtype=dtype,
            history_offsets=history_offsets,
            watermark_us=store.meta.watermark_us,
            gap_us=store.meta.gap_us,
        ) as snapshot,
        tqdm(total=closed_total, desc="sessions", unit="session", mininterval=2) as progress,
    ):
        snapshot.folded_until_us[:] = sessions.last_closed_us(store)
        _copy_histories(store, history_starts, history_offsets, snapshot)
        MinuteCounts.of(store).save(snapshot.directory / LIVE_COUNTS)
        ReleasedTransitions.of(store).save(snapshot.directory / LIVE_TRANSITIONS)
        if with_transitions:
            count_transitions(store, len(table)).save(snapshot.directory / TRANSITIONS)
        blocks = (order[first : first + batch] for first in range(0, store.meta.users, batch))
        with ThreadPoolExecutor(threads, thread_name_prefix="backfill") as pool:
            for calls, folded in pool.map(block_of, blocks):
                steps += calls
                progress.update(folded)
    summary = BackfillSummary(
        users=store.meta.users,
        closed_sessions=closed_total,
        open_sessions=len(sessions.open_sessions),
        steps=steps,
    )
    _log.info(
        "wrote %s: states of %d users over %d closed sessions, %d sessions open",
        output,
        summary.users,
        summary.closed_sessions,
        summary.open_sessions,
    )
    return summary


def session_means(
    store: SessionStore, table: ItemTable, sessions: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Mean item vector of each session (the AGG of Eq. 10), float32 ``[sessions, dim]``."""
    starts = store.session_offsets[sessions]
    counts = store.session_offsets[sessions + 1] - starts
    means = np.zeros((len(sessions), table.dim), np.float32)
    ends = np.cumsum(counts)
    low = 0
    while low < len(sessions):
        # At least one session a round, so one longer than the limit still goes through.
        before = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + _GATHER_ROWS, side="right")))
        chunk = counts[low:high]
        rows = np.asarray(store.item_rows[ranges(starts[low:high], chunk)])
        bad = gather_sessions(
            table.vectors,
            rows,
            chunk,
            np.ones(len(chunk), np.bool_),
            chunk,
            np.empty((len(rows), table.dim), np.float32),
            means[low:high],
        )
        if bad >= 0:
            raise InputError(
                f"the session store refers to item row {rows[bad]}; expected 0 to {len(table) - 1}"
            )
        low = high
    return means


@dataclass(frozen=True)
class _Sessions:
    """Which sessions are closed: ``closed_counts [users]``, and who has an open one."""

    closed_counts: NDArray[np.int64]
    open_users: NDArray[np.int64]
    open_sessions: NDArray[np.int64]

    @classmethod
    def of(cls, store: SessionStore) -> "_Sessions":
        counts = np.diff(store.user_offsets)
        last = store.user_offsets[1:] - 1
        last_us = store.timestamps_us[store.session_offsets[last + 1] - 1]
        is_open = last_us > store.meta.watermark_us - store.meta.gap_us
        return cls(counts - is_open, np.flatnonzero(is_open), last[is_open])

    def last_closed_us(self, store: SessionStore) -> NDArray[np.int64]:
        """Time of each user's last interaction in a closed session, ``NEVER_US`` if none."""
        last = store.user_offsets[:-1] + self.closed_counts
        times = store.timestamps_us[np.maximum(store.session_offsets[last] - 1, 0)]
        return np.where(self.closed_counts > 0, times, NEVER_US)

    def histories(self, store: SessionStore) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First interaction of each user's history ``[users]``, and the offsets ``[users + 1]``."""
        user_starts = store.session_offsets[store.user_offsets]
        starts = np.maximum(user_starts[1:] - HISTORY, user_starts[:-1])
        # Folding an open session needs all of it, however long it is.
        open_starts = store.session_offsets[self.open_sessions]
        starts[self.open_users] = np.minimum(starts[self.open_users], open_starts)
        return starts, np.concatenate([[0], np.cumsum(user_starts[1:] - starts)])


def _copy_histories(
    store: SessionStore,
    starts: NDArray[np.int64],
    offsets: NDArray[np.int64],
    snapshot: SnapshotArrays,
) -> None:
    for first in range(0, len(starts), _HISTORY_USERS):
        block = starts[first : first + _HISTORY_USERS]
        bounds = offsets[first : first + len(block) + 1]
        places = ranges(block, np.diff(bounds))
        target = slice(int(bounds[0]), int(bounds[-1]))
        snapshot.history_item_rows[target] = store.item_rows[places]
        snapshot.history_timestamps_us[target] = store.timestamps_us[places]
