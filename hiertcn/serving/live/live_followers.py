"""The newest transitions of everybody's sessions, kept for a release that serves.

What ``hiertcn.sessions.live_transitions`` reconstructs for any time, for the present: those of the
release's last hour, and what was recorded here since, in the order of arrival. The newest 262,144
are kept, linked by the item left (or the session's start), so one costs a microsecond to add and a
request reads those of its last items only. 20 bytes each and 8 an item.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.files import whole_directory
from hiertcn.sessions.live_transitions import (
    START,
    WINDOW_US,
    LiveTransitions,
    link,
    no_transitions,
    transitions_of,
)
from hiertcn.sessions.store import SessionStore

MOST: Final = 1 << 18


@dataclass(frozen=True, kw_only=True)
class ReleasedTransitions:
    """The transitions of the last hour of a log: the ``live_transitions`` part of a release.

    Attributes:
        left_rows: int32 ``[k]``, rows of the release, or `START`.
        followed_rows: int32 ``[k]``.
        times_us: int64 ``[k]``, ascending.
    """

    left_rows: NDArray[np.int32]
    followed_rows: NDArray[np.int32]
    times_us: NDArray[np.int64]

    @classmethod
    def of(cls, store: SessionStore) -> Self:
        """Take those that a request after the store's watermark can still reach."""
        left, followed, times_us = transitions_of(
            store, after_us=store.meta.watermark_us - WINDOW_US
        )
        order = np.argsort(times_us, kind="stable")[-MOST:]
        return cls(
            left_rows=left[order].astype(np.int32),
            followed_rows=followed[order].astype(np.int32),
            times_us=times_us[order],
        )

    def save(self, directory: Path) -> None:
        """Write the folder ``directory``, whole or not at all."""
        with whole_directory(directory) as folder:
            for name in self.__dataclass_fields__:
                np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: a file is missing or damaged, or the arrays do not fit together.
        """
        try:
            arrays: dict[str, Any] = {
                name: np.load(directory / f"{name}.npy", allow_pickle=False)
                for name in cls.__dataclass_fields__
            }
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"the live transitions of {directory} cannot be read ({error}); run "
                "backfill_user_states again"
            ) from None
        lengths = {array.shape for array in arrays.values()}
        if len(lengths) != 1 or arrays["times_us"].ndim != 1:
            raise InputError(
                f"the live transitions of {directory} have arrays of the shapes {sorted(lengths)}; "
                "expected one length, so run backfill_user_states again"
            )
        return cls(**arrays)


class LiveFollowers:
    """Transitions by the item left, the newest first. One thread at a time adds or reads.

    Args:
        items: length of the catalogue.
        before: the release's own; None where it brings none.
        most: how many are kept.
    """

    def __init__(
        self, items: int, before: ReleasedTransitions | None = None, most: int = MOST
    ) -> None:
        self.arrays: LiveTransitions = no_transitions()._replace(
            followers=np.zeros(most, np.int32),
            times_us=np.zeros(most, np.int64),
            before=np.zeros(most, np.int64),
            # Untouched pages of zeros take no memory.
            heads=np.zeros(items - START, np.int64),
        )
        self._count = 0
        nothing = np.empty(0, np.int64)
        # Even nothing: the first interaction must not wait for the compilation.
        self.add(nothing, nothing, nothing)
        if before is not None:
            self.add(before.left_rows, before.followed_rows, before.times_us)

    def widen(self, items: int) -> None:
        """Make room for items that came after the release."""
        more = max(0, items - START - len(self.arrays.heads))
        self.arrays = self.arrays._replace(heads=np.pad(self.arrays.heads, (0, more)))

    def add(
        self,
        left_rows: NDArray[np.integer[Any]],
        followed_rows: NDArray[np.integer[Any]],
        times_us: NDArray[np.int64],
    ) -> None:
        """Add transitions ``[n]`` that came together, the earliest first."""
        # What a log and other sidecars say of the last hours comes one after the other.
        order = np.argsort(times_us, kind="stable")[-len(self.arrays.followers) :]
        # One type of each, for numba compiles another function for every other.
        left_rows, followed_rows, times_us = (
            column[order].astype(np.int64) for column in (left_rows, followed_rows, times_us)
        )
        self._count = link(self.arrays, self._count, left_rows, followed_rows, times_us)
