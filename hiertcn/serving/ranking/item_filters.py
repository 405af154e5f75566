"""Which items of a release pass a request's filters; the answer to the same filters is kept.

Filters repeat (a shop has so many categories), so the newest answers stay in at most 64 MiB:
a byte an item each, and the rows of those that were searched one by one.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.items.attribute_filters import AttributeFilter
from hiertcn.items.attributes import ItemAttributes

_MOST_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Allowed:
    """The items that pass: ``mask`` bool ``[items]``."""

    mask: NDArray[np.bool_]

    @cached_property
    def count(self) -> int:
        """How many."""
        return int(np.count_nonzero(self.mask))

    def passes(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows pass, bool ``[n]``; items newer than the mask do not."""
        beyond = rows >= len(self.mask)
        if not beyond.any():
            return self.mask[rows]
        return self.mask[np.where(beyond, 0, rows)] & ~beyond

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Their rows, int64 ``[count]``, ascending."""
        return np.flatnonzero(self.mask)


class ItemFilters:
    """The filters of one release; safe to share between threads.

    Args:
        attributes: of the release, None where it was published without any.
        most_bytes: memory of the answers kept.
    """

    def __init__(self, attributes: ItemAttributes | None, *, most_bytes: int = _MOST_BYTES) -> None:
        self._attributes = attributes
        self._most = max(1, most_bytes // max(1, len(attributes or ())))
        self._kept: OrderedDict[tuple[AttributeFilter, ...], Allowed] = OrderedDict()
        self._lock = threading.Lock()

    def kept(self, filters: Sequence[AttributeFilter]) -> Allowed | None:
        """The answer, if these were asked before and it is still kept."""
        key = tuple(filters)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
        return found

    def allowed(self, filters: Sequence[AttributeFilter]) -> Allowed:
        """The items that pass every filter, of which there is at least one.

        Raises:
            InputError: the release has no attributes, or a filter names a column that is not
                among them or values that are none of the column's; the filter's place is named.
        """
        found = self.kept(filters)
        if found is not None:
            return found
        if self._attributes is None:
            raise InputError(
                f"filters[0].column is {filters[0].column!r} but the serving release has no item "
                "attributes; publish one with this version and an items file"
            )
        passing = [
            self._attributes.passing(condition, f"filters[{place}]")
            for place, condition in enumerate(filters)
        ]
        found = Allowed(reduce(np.logical_and, passing))
        with self._lock:
            self._kept[tuple(filters)] = found
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return found
