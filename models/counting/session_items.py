"""Training sessions as sets of items that remember where each item stood last."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hiertcn.sessions.store import SessionStore


@dataclass(frozen=True)
class SessionItems:
    """The distinct known items of each session, by ascending time of the session's end.

    Attributes:
        offsets: int64 ``[sessions + 1]``; sessions without a known item are left out.
        rows: int32 ``[n]``, by last place in the session.
        place: int64 ``[n]``, last place of the item in its session, from 0, unknown items counted.
        end_us: int64 ``[sessions]``, time of the session's last interaction.
    """

    offsets: NDArray[np.int64]
    rows: NDArray[np.int32]
    place: NDArray[np.int64]
    end_us: NDArray[np.int64]


def distinct_items(training: SessionStore, items: int) -> SessionItems:
    """Return the items below ``items`` of every training session, each once."""
    rows = training.item_rows
    lengths = np.diff(training.session_offsets)
    ends_us = training.timestamps_us[training.session_offsets[1:] - 1]
    newest_last = np.argsort(ends_us, kind="stable")
    recency = np.empty(len(lengths), np.int64)
    recency[newest_last] = np.arange(len(lengths))

    session = np.repeat(recency, lengths)
    place = np.arange(len(rows)) - np.repeat(training.session_offsets[:-1], lengths)
    order = np.lexsort((place, rows, session))
    last = np.ones(len(order), np.bool_)
    last[:-1] = (np.diff(rows[order]) != 0) | (np.diff(session[order]) != 0)
    kept = order[last]
    kept = kept[rows[kept] < items]
    kept = kept[np.lexsort((place[kept], session[kept]))]
    filled, counts = np.unique(session[kept], return_counts=True)
    return SessionItems(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        rows=np.asarray(rows[kept], np.int32),
        place=place[kept],
        end_us=ends_us[newest_last[filled]],
    )
