"""A recommendation request on its way to its answer, and the answer."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.items.attribute_filters import AttributeFilter
from hiertcn.items.texts import Texts
from hiertcn.serving.ranking.item_filters import Allowed
from hiertcn.serving.records.fold import Sessions
from hiertcn.serving.records.record import UserRecord

_NO_ROWS: Final = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recommendation:
    """A ranked reply: ids and scores best first, all of one release."""

    release: int
    item_ids: list[str]
    scores: list[float]
    unknown_items: list[str]
    fallback: bool


@dataclass(kw_only=True, slots=True, eq=False)
class RecommendationRequest:
    """What is asked, and what has been found out on the way to the answer.

    Attributes:
        user_id: for whom.
        k: how many items.
        candidates: items to rank; None for the catalogue.
        exclude: items never to return.
        timestamp_us: as of when.
        exclude_seen: leave out what the user has interacted with.
        filters: what items must pass.
        models_until: when to stop waiting for the models, in seconds of ``time.monotonic``.
        answer: the reply, once it is known.
        key: the store's key of the user.
        allowed: what passes the filters, None without any.
        rows: int64 ``[candidates]``, -1 where one is not to be ranked; None until looked up.
        excluded: int64 ``[n]``, rows never to return, where the catalogue is searched.
        unknown: the listed items that the release does not know, in their order.
        base: revision of the stored record, None if there is none.
        is_repaired: whether the record was damaged, and has been made again if that can be done.
        record: the user's record under the release; None until it is read.
        cut: the sessions of the record.
        trace: what a tracer knows the request by.
        came: when it came, in seconds of ``time.perf_counter``.
    """

    user_id: str
    k: int
    candidates: Texts | None
    exclude: Sequence[str]
    timestamp_us: int
    exclude_seen: bool = False
    filters: Sequence[AttributeFilter] = ()
    models_until: float | None = None

    answer: "asyncio.Future[Recommendation]" = field(init=False)
    key: bytes = field(init=False)
    allowed: Allowed | None = field(init=False, default=None)
    rows: NDArray[np.int64] | None = field(init=False, default=None)
    excluded: NDArray[np.int64] = field(init=False, default_factory=lambda: _NO_ROWS)
    unknown: dict[str, None] = field(init=False, default_factory=dict)
    base: int | None = field(init=False, default=None)
    is_repaired: bool = field(init=False, default=False)
    record: UserRecord | None = field(init=False, default=None)
    cut: Sessions = field(init=False)
    trace: Any = field(init=False, default=None)
    came: float = field(init=False, default_factory=time.perf_counter)

    @property
    def user(self) -> UserRecord:
        """The record, once it is read."""
        assert self.record is not None
        return self.record


def fail(requests: Sequence[RecommendationRequest], error: Exception) -> None:
    """Answer requests with an error, those that have no answer yet."""
    for request in requests:
        if not request.answer.done():
            request.answer.set_exception(error)
