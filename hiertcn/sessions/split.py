"""Splits sessions by time into training, validation and test.

The limits are quantiles of the sessions' start times, so the parts hold given shares of sessions
and none sees the future of another. A session belongs wholly to the part in which its first
interaction falls, even if it runs past the limit; what its user did before is always input.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.sessions.store import SessionStore


@dataclass(frozen=True, kw_only=True)
class Split:
    """Limits in microseconds since the epoch, UTC.

    Training: sessions starting before ``validation_start_us``; validation: from it to before
    ``test_start_us``; test: from that on.
    """

    validation_start_us: int
    test_start_us: int

    def to_dict(self) -> dict[str, int]:
        """Return the limits as JSON-ready values."""
        return asdict(self)


def split_by_time(
    store: SessionStore, validation_fraction: float = 0.1, test_fraction: float = 0.1
) -> Split:
    """Return the limits that put about the given shares of sessions into validation and test.

    Sessions that start at the same time stay together, so shares are met as nearly as ties allow;
    where many do, the limits move to later distinct times until every part has a session.

    Raises:
        InputError: a share is not between 0 and 1, together they leave nothing to train on, or
            fewer than three distinct start times cannot fill three parts.
    """
    for name, value in (
        ("validation_fraction", validation_fraction),
        ("test_fraction", test_fraction),
    ):
        if not 0.0 < value < 1.0:
            raise InputError(f"{name} is {value}; expected a share between 0 and 1")
    if validation_fraction + test_fraction >= 1.0:
        raise InputError(
            f"validation_fraction {validation_fraction} and test_fraction {test_fraction} leave "
            "nothing to train on; expected a sum below 1"
        )
    starts, counts = np.unique(store.session_starts_us(), return_counts=True)
    if len(starts) < 3:
        raise InputError(
            f"the sessions of {store.directory} start at {len(starts)} distinct times; expected at "
            "least 3 to split them into training, validation and test: give a longer log"
        )
    before = np.cumsum(counts) - counts
    total = int(counts.sum())
    validation = _nearest(before, (1.0 - validation_fraction - test_fraction) * total)
    test = _nearest(before, (1.0 - test_fraction) * total)
    validation = min(max(validation, 1), len(starts) - 2)
    test = min(max(test, validation + 1), len(starts) - 1)
    return Split(validation_start_us=int(starts[validation]), test_start_us=int(starts[test]))


def _nearest(before: NDArray[np.int64], sessions: float) -> int:
    """Return the distinct time before which the number of sessions is closest to ``sessions``."""
    return int(np.abs(before - sessions).argmin())
