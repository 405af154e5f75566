"""The embedding that each recent user was last ranked with: the best guess without the models.

In memory only, for one release at a time: at most 32,768 users, the least recently ranked leave
first, about 25 MB at 129 coordinates.
"""

from collections import OrderedDict
from typing import Final

import numpy as np
from numpy.typing import NDArray

_MOST: Final = 32_768


class LastEmbeddings:
    """User embeddings by user key; one thread uses it.

    Args:
        most: users to remember.
    """

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._release = 0
        self._kept: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def keep(self, release: int, key: bytes, u: NDArray[np.float32]) -> None:
        """Remember ``u [dim]``; one of another release than before makes all others forgotten."""
        if release != self._release:
            self._kept.clear()
            self._release = release
        # A copy, because a row of a batch would keep the whole batch alive.
        self._kept[key] = u.copy()
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def get(self, release: int, key: bytes) -> NDArray[np.float32] | None:
        """The user's last embedding ``[dim]`` under the release, None if it is not known."""
        return self._kept.get(key) if release == self._release else None

    def forget(self, key: bytes) -> None:
        """Drop a user's."""
        self._kept.pop(key, None)
