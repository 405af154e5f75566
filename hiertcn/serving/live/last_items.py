"""Which item each user was at, for those who read a log and no records."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from hiertcn.serving.live.recent_interactions import BEGAN, KnownItems
from hiertcn.serving.log.tail import LoggedArrival

_MOST_USERS: Final = 100_000


class LastItems:
    """The last items of the users seen last, at most 100,000 of them (20 MB)."""

    def __init__(self) -> None:
        self._last: OrderedDict[int, tuple[str, int]] = OrderedDict()
        self._since_us: int | None = None

    def before(
        self, interactions: Sequence[LoggedArrival], release: KnownItems
    ) -> list[str | None]:
        """Note interactions; return the item before each in its session.

        `BEGAN` where it began a session, None where that is not known: within a gap after the
        first interaction ever noted. One that comes late, in the order of time, follows nothing and
        is not noted, as are items that the release does not know.
        """
        rows = release.item_rows([one.item_id for one in interactions]).tolist()
        return [
            self._moved_on(one, release.gap_us) if row >= 0 else None
            for one, row in zip(interactions, rows, strict=True)
        ]

    def _moved_on(self, arrival: LoggedArrival, gap_us: int) -> str | None:
        if self._since_us is None:
            self._since_us = arrival.timestamp_us
        last = self._last.get(arrival.user)
        if last is not None and arrival.timestamp_us < last[1]:
            return None
        self._last[arrival.user] = arrival.item_id, arrival.timestamp_us
        self._last.move_to_end(arrival.user)
        if len(self._last) > _MOST_USERS:
            self._last.popitem(last=False)
        if last is not None and arrival.timestamp_us - last[1] <= gap_us:
            return last[0]
        return BEGAN if last or arrival.timestamp_us - self._since_us > gap_us else None
