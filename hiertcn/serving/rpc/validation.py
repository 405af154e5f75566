"""The rules a request must keep, and the sentence that names the field that breaks one."""

import time
from collections.abc import Sequence
from typing import Final

from hiertcn.errors import InputError
from hiertcn.items.attribute_filters import AttributeFilter
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.log.event_log import LoggedInteraction
from hiertcn.serving.records.record import idempotency_hash

DEFAULT_K: Final = 10
MAX_K: Final = 1000
MAX_LISTED_ITEMS: Final = 10_000
MAX_INTERACTIONS: Final = 10_000
MAX_ID_BYTES: Final = 512
MAX_FUTURE_US: Final = 86_400_000_000
MIN_TIME_US: Final = 100_000_000_000_000
"""In March 1973. Until the year 5138, seconds and milliseconds since 1970 are smaller numbers."""

MAX_FILTERS: Final = 16
MAX_FILTER_VALUES: Final = 1000


def checked_user_id(user_id: str, field: str = "user_id") -> str:
    """The id itself.

    Raises:
        InputError: it is empty or too long.
    """
    return checked_text(user_id, field)


def checked_k(request: pb.RecommendRequest) -> int:
    """How many items are asked for.

    Raises:
        InputError: ``k`` is out of bounds.
    """
    k = request.k if request.HasField("k") else DEFAULT_K
    if not 1 <= k <= MAX_K:
        raise InputError(f"k is {k}; expected 1 to {MAX_K} items")
    return k


def checked_items(item_ids: Sequence[str], field: str) -> list[str]:
    """The ids as a list.

    Raises:
        InputError: there are too many, or one is empty or too long.
    """
    if len(item_ids) > MAX_LISTED_ITEMS:
        raise InputError(
            f"{field} lists {len(item_ids)} items; expected at most {MAX_LISTED_ITEMS}, so split "
            "the request"
        )
    items = list(item_ids)
    # One pass in C over all ids; the slow one only runs to name the bad one.
    if items and not (all(items) and max(map(len, items)) * 4 <= MAX_ID_BYTES):
        for place, item in enumerate(items):
            checked_text(item, f"{field}[{place}]")
    return items


def checked_filters(filters: Sequence[pb.Filter]) -> tuple[AttributeFilter, ...]:
    """The filters as the items' attributes take them.

    Raises:
        InputError: there are too many, or one names no column, no condition or too many values;
            its place is named.
    """
    if len(filters) > MAX_FILTERS:
        raise InputError(f"filters lists {len(filters)}; expected at most {MAX_FILTERS}")
    return tuple(_checked_filter(given, f"filters[{place}]") for place, given in enumerate(filters))


def _checked_filter(given: pb.Filter, field: str) -> AttributeFilter:
    checked = AttributeFilter(
        column=checked_text(given.column, f"{field}.column"),
        any_of=_checked_values(given.any_of, f"{field}.any_of"),
        none_of=_checked_values(given.none_of, f"{field}.none_of"),
        min=checked_text(given.min, f"{field}.min") if given.HasField("min") else None,
        max=checked_text(given.max, f"{field}.max") if given.HasField("max") else None,
    )
    if not (checked.any_of or checked.none_of) and checked.min is None and checked.max is None:
        raise InputError(
            f"{field} has no condition on {checked.column!r}; expected any_of, none_of, min or max"
        )
    return checked


def _checked_values(values: Sequence[str], field: str) -> tuple[str, ...]:
    if len(values) > MAX_FILTER_VALUES:
        raise InputError(
            f"{field} lists {len(values)} values; expected at most {MAX_FILTER_VALUES}"
        )
    return tuple(checked_text(value, f"{field}[{place}]") for place, value in enumerate(values))


def checked_deadline_ms(request: pb.RecommendRequest) -> int:
    """The request's own deadline in milliseconds, 0 for none.

    Raises:
        InputError: it is negative.
    """
    if request.deadline_ms < 0:
        raise InputError(
            f"deadline_ms is {request.deadline_ms}; expected milliseconds, or 0 for none"
        )
    return request.deadline_ms


def checked_time_us(timestamp_us: int, field: str, now_us: int) -> int:
    """The time, or now for 0.

    Raises:
        InputError: it is negative, in another unit, or more than a day in the future.
    """
    if timestamp_us == 0:
        return now_us
    if timestamp_us < 0:
        raise InputError(
            f"{field} is {timestamp_us}; expected microseconds since 1970-01-01 UTC, or 0 for now"
        )
    if timestamp_us < MIN_TIME_US:
        raise InputError(
            f"{field} is {timestamp_us}, before March 1973 and so rather seconds or milliseconds; "
            f"expected microseconds since 1970-01-01 UTC (now is {now_us})"
        )
    if timestamp_us > now_us + MAX_FUTURE_US:
        raise InputError(
            f"{field} is {timestamp_us}, more than one day in the future; expected microseconds "
            f"since 1970-01-01 UTC (now is {now_us})"
        )
    return timestamp_us


def checked_interactions(interactions: Sequence[pb.Interaction]) -> list[LoggedInteraction]:
    """The interactions as the log takes them.

    Raises:
        InputError: there are none or too many, or one breaks a rule; its place is named.
    """
    if not interactions:
        raise InputError("interactions is empty; expected at least one")
    if len(interactions) > MAX_INTERACTIONS:
        raise InputError(
            f"interactions lists {len(interactions)}; expected at most {MAX_INTERACTIONS}, so "
            "split the request"
        )
    now_us = wall_clock_us()
    checked = []
    for place, interaction in enumerate(interactions):
        field = f"interactions[{place}]"
        key = interaction.idempotency_key
        kind = interaction.event_type
        checked.append(
            LoggedInteraction(
                user_id=checked_text(interaction.user_id, f"{field}.user_id"),
                item_id=checked_text(interaction.item_id, f"{field}.item_id"),
                timestamp_us=checked_time_us(
                    interaction.timestamp_us, f"{field}.timestamp_us", now_us
                ),
                received_us=now_us,
                key=idempotency_hash(checked_text(key, f"{field}.idempotency_key") if key else ""),
                event_type=checked_text(kind, f"{field}.event_type") if kind else "",
            )
        )
    return checked


def wall_clock_us() -> int:
    """Now, in microseconds since the epoch."""
    return time.time_ns() // 1000


def checked_text(text: str, field: str) -> str:
    """The text itself.

    Raises:
        InputError: it is empty or longer than an id.
    """
    if not text:
        raise InputError(f"{field} is empty; expected 1 to {MAX_ID_BYTES} bytes of text")
    # Four bytes is the longest UTF-8 character, so short texts need no encoding to be measured.
    if len(text) * 4 > MAX_ID_BYTES and (size := len(text.encode())) > MAX_ID_BYTES:
        raise InputError(f"{field} has {size} bytes; expected at most {MAX_ID_BYTES}")
    return text
