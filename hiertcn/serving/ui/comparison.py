"""What the web page shows of a user: sessions, and three rankings side by side, of one release.

HierTCN's list is the engine's own answer. Beside it stand what it must beat: MV, the dot product
with the mean vector of the session at hand (the paper's baseline), and popularity as the fallback
ranks it, live interactions first.
"""

import asyncio
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import ServingError
from hiertcn.serving.ranking.engine import Engine
from hiertcn.serving.ranking.ranking import Ranked, rank_catalogue, rank_catalogue_by_popularity
from hiertcn.serving.records import fold
from hiertcn.serving.records.record import NEVER_US
from hiertcn.serving.releases.serving_release import ServingRelease

MOST_SESSIONS: Final = 20
MOST_SUGGESTED: Final = 24

_ATTEMPTS: Final = 3
_NONE: Final[NDArray[np.int64]] = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Session:
    """Items of one session, oldest first: ``item_rows`` ``[n]`` at ``timestamps_us`` ``[n]``."""

    item_rows: NDArray[np.int32]
    timestamps_us: NDArray[np.int64]
    is_open: bool


async def user_view(
    engine: Engine, user_id: str, *, k: int, now_us: int, exclude_seen: bool
) -> dict[str, Any]:
    """A user's sessions and the three lists of ``k`` items, as JSON values.

    Args:
        engine: answers for HierTCN.
        user_id: for whom.
        k: length of a list.
        now_us: as of when.
        exclude_seen: leave out of every list what the user has interacted with.

    Raises:
        ServingError: releases changed faster than one could be compared.
    """
    for _ in range(_ATTEMPTS):
        with engine.release.held() as release:
            found = await engine.recommend(
                user_id,
                k=k,
                candidates=None,
                exclude=(),
                timestamp_us=now_us,
                exclude_seen=exclude_seen,
            )
            view = await engine.user(user_id)
            if found.release != release.number or (view and view.release is not release):
                continue
            seen = fold.seen_rows(view.record) if exclude_seen and view else _NONE
            sessions: list[Session] = []
            if view is not None:
                sessions = cut(*fold.history(view.record), gap_us=release.gap_us, now_us=now_us)
            newest = sessions[-1] if sessions else None
            by_mean = (
                await asyncio.to_thread(_ranked_by_mean, release, newest.item_rows, seen, k)
                if newest is not None
                else Ranked(_NONE, np.empty(0, np.float32))
            )
            popular = rank_catalogue_by_popularity(release, seen, k, now_us)
            rows = release.item_rows(found.item_ids)
            scores = np.asarray(found.scores, np.float32)
            folded_until_us = view.record.folded_until_us if view is not None else NEVER_US
            return {
                "user_id": user_id,
                "known": view is not None,
                "release": release.number,
                "now_us": now_us,
                "gap_us": release.gap_us,
                "folded_until_us": None if folded_until_us == NEVER_US else folded_until_us,
                "sessions": [
                    _session(release, session) for session in reversed(sessions[-MOST_SESSIONS:])
                ],
                "older_sessions": max(0, len(sessions) - MOST_SESSIONS),
                "lists": {
                    "hiertcn": {
                        "items": _items(release, rows, scores),
                        "fallback": found.fallback,
                    },
                    "mv": {
                        "items": _items(release, by_mean.places, by_mean.scores),
                        "of": None
                        if newest is None
                        else "open session"
                        if newest.is_open
                        else "last session",
                    },
                    "popularity": {"items": _items(release, popular.places, popular.scores)},
                },
            }
    raise ServingError("the release changed while the lists were made; ask again")


def suggested_users(release: ServingRelease) -> list[str]:
    """Ids of the release's users who were active last, newest first, and of others after them."""
    snapshot = release.snapshot
    starts, ends = snapshot.history_offsets[:-1], snapshot.history_offsets[1:]
    active = np.flatnonzero(ends > starts)
    last_us = snapshot.history_timestamps_us[ends[active] - 1]
    newest = active[np.argsort(-last_us, kind="stable")[:MOST_SUGGESTED]]
    others = np.setdiff1d(np.arange(min(2 * MOST_SUGGESTED, len(ends))), newest)
    rows = np.concatenate([newest, others])[:MOST_SUGGESTED]
    return snapshot.users.ids(rows) if len(rows) else []


def cut(
    item_rows: NDArray[np.int32],
    timestamps_us: NDArray[np.int64],
    *,
    gap_us: int,
    now_us: int,
) -> list[Session]:
    """Interactions ``[n]``, oldest first, as sessions; the last is open unless idle too long."""
    if not len(item_rows):
        return []
    breaks = np.flatnonzero(np.diff(timestamps_us) > gap_us) + 1
    sessions = [
        Session(item_rows=rows, timestamps_us=times_us, is_open=False)
        for rows, times_us in zip(
            np.split(item_rows, breaks), np.split(timestamps_us, breaks), strict=True
        )
    ]
    last = sessions[-1]
    if now_us - int(last.timestamps_us[-1]) <= gap_us:
        sessions[-1] = Session(
            item_rows=last.item_rows, timestamps_us=last.timestamps_us, is_open=True
        )
    return sessions


def _ranked_by_mean(
    release: ServingRelease, rows: NDArray[np.int32], excluded: NDArray[np.int64], k: int
) -> Ranked:
    mean: NDArray[np.float32] = release.table.gather(rows).mean(axis=0, dtype=np.float32)
    return rank_catalogue(release, mean, excluded, k)


def _session(release: ServingRelease, session: Session) -> dict[str, Any]:
    rows = session.item_rows.astype(np.int64)
    return {
        "open": session.is_open,
        "items": [
            {"item_id": item_id, "title": title, "timestamp_us": timestamp_us}
            for item_id, title, timestamp_us in zip(
                release.items.ids(rows),
                _titles(release, rows),
                session.timestamps_us.tolist(),
                strict=True,
            )
        ],
    }


def _items(
    release: ServingRelease, rows: NDArray[np.int64], scores: NDArray[np.float32]
) -> list[dict[str, Any]]:
    if not len(rows):
        return []
    return [
        # JSON has no infinity, which is what a score that is not a number ranks as.
        {"item_id": item_id, "title": title, "score": score if math.isfinite(score) else None}
        for item_id, title, score in zip(
            release.items.ids(rows), _titles(release, rows), scores.tolist(), strict=True
        )
    ]


def _titles(release: ServingRelease, rows: NDArray[np.int64]) -> list[str | None]:
    titles: list[str | None] = [None] * len(rows)
    if release.attributes is None:
        return titles
    # Items that came after the release have no row in its attributes.
    known = np.flatnonzero(rows < len(release.attributes))
    for place, title in zip(known.tolist(), release.attributes.titles(rows[known]), strict=True):
        titles[place] = title
    for place in np.flatnonzero(rows >= release.overlay.first_row).tolist():
        titles[place] = release.overlay.title(int(rows[place]))
    return titles
