"""Folds the closed sessions of many users together, each round in one call of ``gru_step``."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.serving.records import fold
from hiertcn.serving.records.record import UserRecord
from hiertcn.serving.releases.serving_release import ServingRelease
from hiertcn.serving.rpc.validation import wall_clock_us

_MAX_ROWS: Final = 1024


class VectorTable(Protocol):
    """Item vectors."""

    def gather(self, rows: NDArray[Any]) -> NDArray[np.float32]:
        """The vectors of rows ``[n]``, float32 ``[n, dim]``."""
        ...


class FoldingRelease(Protocol):
    """What folding needs of a release."""

    @property
    def gap_us(self) -> int:
        """Idle time that closes a session."""
        ...

    @property
    def table(self) -> VectorTable:
        """Its item vectors."""
        ...


NextStates = Callable[[NDArray[np.float32], NDArray[np.float32]], Awaitable[NDArray[np.float32]]]
"""``gru_step``: states ``[n, layers, hidden]`` and session means ``[n, dim]`` to the next."""


def settled_until_us(release: ServingRelease, recent: RecentInteractions) -> int:
    """The time as of which sessions may be folded without a request that asks for it.

    A gap before the newest interaction or the clock, whichever is earlier: a log that is replayed
    brings its own time, and interactions that arrive within half an hour are not late.
    """
    newest_us = max(recent.newest_us, release.watermark_us)
    return min(wall_clock_us(), newest_us) - release.gap_us


async def fold_closed(
    next_states: NextStates,
    release: FoldingRelease,
    records: Sequence[UserRecord],
    now_us: int,
) -> list[UserRecord]:
    """The records ``[n]`` with every session folded that is closed at ``now_us``.

    Round ``r`` takes the ``r``-th closed session of all users that have one, at most 1024 in a
    call, which is what ``gru_step`` takes. The records are of ``release``.

    Raises:
        ServingError: the model does not answer in time; nothing is lost, nothing was kept.
    """
    kept = list(records)
    cuts = [fold.sessions(record, gap_us=release.gap_us, now_us=now_us) for record in kept]
    for number in range(max((len(cut.closed) for cut in cuts), default=0)):
        active = [place for place, cut in enumerate(cuts) if len(cut.closed) > number]
        for first in range(0, len(active), _MAX_ROWS):
            places = active[first : first + _MAX_ROWS]
            sessions = [cuts[place].closed[number] for place in places]
            lengths = np.fromiter(map(len, sessions), np.int64, len(sessions))
            vectors = release.table.gather(np.concatenate(sessions))
            sums = np.add.reduceat(vectors, np.cumsum(lengths) - lengths, axis=0)
            states = await next_states(
                np.stack([kept[place].state for place in places]),
                (sums / lengths[:, None]).astype(np.float32),
            )
            for place, state in zip(places, states, strict=True):
                until_us = cuts[place].closed_until_us[number]
                kept[place] = fold.folded(kept[place], state, until_us)
    return kept
