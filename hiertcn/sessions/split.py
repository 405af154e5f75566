"""Splits a log into training, validation and test: sessions by time, or users by their id.

By time (the paper's warm start, section 4.2.1) the limits are quantiles of the sessions' start
times, so the parts hold given shares of sessions and none sees the future of another. A session
belongs wholly to the part in which its first interaction falls, even if it runs past the limit;
what its user did before is always input.

By user (the paper's cold start) every user is wholly in one part, decided by a hash of its id and
the seed: the part of a user does not depend on the rest of the log, so it stays the same when the
log grows, and shares are met as nearly as chance allows. Training must then see the sessions of the
training users alone, at any time.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.items.hashing import xxh64
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
    _check_shares(validation_fraction, test_fraction)
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


@dataclass(frozen=True, kw_only=True)
class UserSplit:
    """Users of each part: int64 indices into the store's users, ascending, each user in one part.

    Attributes:
        training: users whose sessions are learnt.
        validation: users that choices are made by.
        test: users that the result is reported for.
    """

    training: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


def split_by_user(
    store: SessionStore,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> UserSplit:
    """Return the parts of the paper's cold start, 80/10/10 by default.

    Args:
        store: the log; its user ids decide.
        validation_fraction: share of users to expect in validation.
        test_fraction: share of users to expect in test.
        seed: another seed gives an independent split, 0 to 2**64 - 1.

    Raises:
        InputError: a share is not between 0 and 1, together they leave nothing to train on, or a
            part is empty because the log has too few users.
    """
    _check_shares(validation_fraction, test_fraction)
    # 53 bits fill a float64's mantissa: a uniform number in [0, 1).
    place = (xxh64(store.user_ids, seed) >> np.uint64(11)).astype(np.float64) / 2**53
    is_test = place < test_fraction
    is_validation = ~is_test & (place < test_fraction + validation_fraction)
    parts = {
        "training": np.flatnonzero(~is_test & ~is_validation),
        "validation": np.flatnonzero(is_validation),
        "test": np.flatnonzero(is_test),
    }
    for name, users in parts.items():
        if len(users) == 0:
            raise InputError(
                f"none of the {len(place)} users of {store.directory} falls into {name} with the "
                f"shares {validation_fraction} and {test_fraction} and the seed {seed}; give a log "
                "of more users, or larger shares"
            )
    return UserSplit(**parts)


def _check_shares(validation_fraction: float, test_fraction: float) -> None:
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


def _nearest(before: NDArray[np.int64], sessions: float) -> int:
    """Return the distinct time before which the number of sessions is closest to ``sessions``."""
    return int(np.abs(before - sessions).argmin())
