"""Whole histories as token sequences: items, and a start token before each session's first.

The start token is the session indicator that the paper gives its single-level models (section
4.2.3): it marks where a session begins, and it is where that session's first item is predicted
from, so that these networks too know that a new session has begun.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiertcn.sessions.store import SessionStore, ranges


@dataclass(frozen=True)
class Windows:
    """Stretches of histories, one after another, as tokens.

    Shapes:
        lengths: ``[windows]`` int64, tokens per window, each >= 1.
        item: ``[tokens]`` int64, the item a token reads, counted over all windows, or -1 for a
            start token.
        position: ``[tokens]`` int64, items before the token in its window.
        before: ``[n]`` int64, the token before each item; ``-1 - window`` where the window begins
            with the item itself.
    """

    lengths: Tensor
    item: Tensor
    position: Tensor
    before: Tensor

    @classmethod
    def of(
        cls,
        counts: NDArray[np.int64],
        starts: NDArray[np.bool_],
        device: torch.device | str,
        ends_with_start: NDArray[np.bool_] | None = None,
    ) -> "Windows":
        """Lay out windows.

        Args:
            counts: int64 ``[windows]``, items per window.
            starts: bool ``[n]``, the item is the first of its session.
            device: of the tensors.
            ends_with_start: bool ``[windows]``, a start token follows the last item.
        """
        window = np.repeat(np.arange(len(counts)), counts)
        last = np.zeros(len(counts), np.int64) if ends_with_start is None else ends_with_start
        offsets = np.concatenate([[0], np.cumsum(counts)])
        started = np.concatenate([[0], np.cumsum(starts)])
        added = np.concatenate([[0], np.cumsum(last)])
        lengths = counts + np.diff(started[offsets]) + last
        token_offsets = np.concatenate([[0], np.cumsum(lengths)])
        # A token per item, and the start tokens up to it.
        place = np.arange(len(window)) + started[1:] + added[window]
        item = np.full(token_offsets[-1], -1)
        item[place] = np.arange(len(window))
        before = np.where(place > token_offsets[window], place - 1, -1 - window)
        of_token = np.repeat(np.arange(len(counts)), lengths)
        position = np.cumsum(item >= 0) - (item >= 0) - offsets[of_token]
        return cls(*(torch.from_numpy(a).to(device) for a in (lengths, item, position, before)))


@dataclass(frozen=True)
class RequestWindows:
    """What a request's ``u`` is computed from: windows of known items, shared by some requests.

    Shapes:
        rows: ``[n]`` int64 item rows, one window after another.
        counts: ``[windows]`` int64.
        starts: ``[n]`` bool; ends_with_start: ``[windows]`` bool, see :class:`Windows`.
        window: ``[requests]`` int64.
        place: ``[requests]`` int64, known items of the window before the request.
    """

    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    starts: NDArray[np.bool_]
    ends_with_start: NDArray[np.bool_]
    window: NDArray[np.int64]
    place: NDArray[np.int64]

    def token(self, windows: Windows) -> Tensor:
        """Return the token that each request is predicted from, int64 ``[requests]``."""
        ends = windows.lengths.cumsum(0) - 1
        device = ends.device
        window = torch.from_numpy(self.window).to(device)
        at_end = torch.from_numpy(self.place == self.counts[self.window]).to(device)
        offsets = np.cumsum(self.counts) - self.counts
        item = np.minimum(offsets[self.window] + self.place, max(len(self.rows) - 1, 0))
        last = ends.index_select(0, window)
        if len(self.rows) == 0:
            return last
        inside = windows.before.index_select(0, torch.from_numpy(item).to(device))
        return torch.where(at_end, last, inside)


def request_windows(
    store: SessionStore,
    known_items: int,
    session: NDArray[np.int64],
    interaction: NDArray[np.int64],
    *,
    piece: int,
    context: int,
) -> RequestWindows:
    """Find the windows of requests; which ones a request shares does not change its window.

    Only items below ``known_items`` count; a session without any leaves no start token. A history
    is cut after every ``piece`` known items, as in training, and a window adds up to ``context``
    earlier ones.

    Args:
        store: the histories.
        known_items: rows from here on are skipped.
        session: int64 ``[requests]``, the session of each request.
        interaction: int64 ``[requests]``, places in the store's columns.
        piece: known items per piece.
        context: at least 1 where a history is cut.
    """
    sessions, of_request = np.unique(session, return_inverse=True)
    last = np.zeros(len(sessions), np.int64)
    np.maximum.at(last, of_request, interaction)
    user = store.user_of_session(sessions)
    first = np.asarray(store.session_offsets)[np.asarray(store.user_offsets)[user]]

    # The known items of each asked session's user, up to the session's last request.
    places = ranges(first, last - first)
    owner = np.repeat(np.arange(len(sessions)), last - first)
    known = np.asarray(store.item_rows)[places] < known_items
    seen = np.concatenate([[0], np.cumsum(known)])
    raw_offsets = np.concatenate([[0], np.cumsum(last - first)])
    known_offsets = seen[raw_offsets]
    rank = (
        seen[raw_offsets[of_request] + interaction - first[of_request]] - known_offsets[of_request]
    )
    places, owner = places[known], owner[known]
    its_session = np.searchsorted(store.session_offsets, places, side="right") - 1
    starts = np.ones(len(places), np.bool_)
    starts[1:] = (np.diff(its_session) != 0) | (np.diff(owner) != 0)

    keys, window = np.unique(
        np.column_stack([of_request, rank // piece]), axis=0, return_inverse=True
    )
    window = window.reshape(-1)
    begin = np.maximum(keys[:, 1] * piece - context, 0)
    end = np.zeros(len(keys), np.int64)
    np.maximum.at(end, window, rank)
    chosen = ranges(known_offsets[keys[:, 0]] + begin, end - begin)
    final = known_offsets[keys[:, 0]] + end - 1
    asked = sessions[keys[:, 0]]
    if len(places):
        ends_with_start = (end == 0) | (its_session[np.maximum(final, 0)] != asked)
    else:
        ends_with_start = np.ones(len(keys), np.bool_)
    return RequestWindows(
        rows=np.asarray(store.item_rows)[places[chosen]].astype(np.int64),
        counts=end - begin,
        starts=starts[chosen],
        ends_with_start=ends_with_start,
        window=window,
        place=rank - begin[window],
    )
