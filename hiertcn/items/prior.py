"""An item's popularity as one more coordinate of the item table.

With it as the last coordinate of every item vector, a dot product can weigh popularity: what the
user's vector holds there is how much popularity counts for this user now.
"""

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hiertcn.errors import InputError

PRIOR_SCALE: Final = 0.25
"""Standard deviation of the prior: of the order of one coordinate of a unit vector."""


def unseen_prior(counts: ArrayLike, *, scale: float = PRIOR_SCALE) -> float:
    """Return the prior of one more item that was never interacted with, beside these counts.

    Args:
        counts: what :func:`popularity_prior` was given, [items].
        scale: what it was given.
    """
    logs = np.log1p(np.asarray(counts, np.float64))
    spread = float(logs.std()) if len(logs) else 0.0
    return 0.0 if spread == 0.0 else float(-logs.mean()) * scale / spread


def popularity_prior(counts: ArrayLike, *, scale: float = PRIOR_SCALE) -> NDArray[np.float32]:
    """Return the standardized logarithm of interaction counts, float32 [items].

    Args:
        counts: interactions per item (decayed or not), [items], 0 or more.
        scale: standard deviation of the result; its mean is 0.

    If all counts are equal the prior is 0 everywhere.

    Raises:
        InputError: a count is negative or not a number.
    """
    logs = np.asarray(counts, np.float64)
    bad = ~(logs >= 0) | np.isinf(logs)
    if bad.any():
        raise InputError(
            f"the interaction count of item row {int(bad.argmax())} is {logs[bad.argmax()]}; "
            "expected a number of 0 or more"
        )
    logs = np.log1p(logs)
    spread = float(logs.std()) if len(logs) else 0.0
    if spread == 0.0:
        return np.zeros(len(logs), np.float32)
    prior: NDArray[np.float64] = (logs - logs.mean()) * (scale / spread)
    return prior.astype(np.float32)
