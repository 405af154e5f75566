"""The co-interaction query: from events to item pairs per day, as one Ibis expression.

Each user's events are numbered in order of time. A pair's two places are at most
``max_followers`` apart, so they lie in one block of that many places or in neighboring ones: the
events are joined by user and block, which offers at most ``2 * max_followers`` partners to an
event however long a user's history is. Only events with a neighbor inside the window take part.
This takes a third of the time of collecting each event's followers into a list.

Events of one user at one instant are ordered by ``(a x) mod p``, ``x`` a hash of the item and ``a``
one of user and second, then by item: the same on every engine, whatever the order of rows, and the
cap samples a large basket fairly.
"""

from typing import Any, Final

import ibis
import numpy as np
import pyarrow as pa

from hiertcn.events.columns import ITEM_ID, USER_ID
from hiertcn.graph.engine import GraphEngine
from hiertcn.graph.options import GraphOptions

DAY: Final = "day"
SOURCE: Final = "source"
TARGET: Final = "target"
COUNT: Final = "count"
US_PER_DAY: Final = 86_400_000_000

_PRIME: Final = 2**31 - 1
_HEX: Final = "0123456789abcdef"
_DIGITS: Final = 5


def co_interactions(event: ibis.Table, options: GraphOptions) -> ibis.Table:
    """Return the pairs per day: day, source, target, count.

    Args:
        event: as :func:`plain_events` or :func:`coded_events` return it.
        options: ``window_s`` and ``max_followers``.

    ``day`` (int64, days since 1970-01-01 UTC) is that of the pair's later event, ``source <
    target`` in the items' order. An item paired with itself is no edge.
    """
    window_us = round(options.window_s * 1e6)
    span = options.max_followers
    order = ibis.window(group_by=event.user, order_by=[event.at, event.tie, event["item"]])
    placed = event.select(
        "user",
        "item",
        "at",
        place=ibis.row_number().over(order).cast("int64"),
        leads=event.at.lead().over(order) <= event.at + window_us,
        follows=event.at.lag().over(order) >= event.at - window_us,
    )
    earlier = placed.filter(placed.leads)
    earlier = earlier.mutate(block=earlier.place // span)
    later = placed.filter(placed.follows)
    later = ibis.union(
        later.mutate(block=later.place // span),
        later.filter(later.place >= span).mutate(block=later.place // span - 1),
    )
    later = later.select("user", "block", item_2="item", at_2="at", place_2="place")
    pair = earlier.inner_join(
        later,
        [
            earlier.user == later.user,
            earlier.block == later.block,
            later.place_2 > earlier.place,
            later.place_2 <= earlier.place + span,
            later.at_2 <= earlier.at + window_us,
            later.item_2 != earlier["item"],
        ],
    )
    ordered = pair.select(
        **{
            DAY: (pair.at_2 // US_PER_DAY).cast("int64"),
            SOURCE: ibis.least(pair["item"], pair.item_2),
            TARGET: ibis.greatest(pair["item"], pair.item_2),
        }
    )
    return ordered.group_by(DAY, SOURCE, TARGET).agg(**{COUNT: ordered.count()})


def plain_events(events: ibis.Table, since_us: int) -> ibis.Table:
    """Return what :func:`co_interactions` needs, with ids as they are.

    Args:
        events: as :meth:`GraphEngine.read_events` returns them.
        since_us: earlier events are left out; microseconds since 1970-01-01 UTC.
    """
    event = events.filter(events.at >= since_us)
    event = event.select("at", user=event[USER_ID], item=event[ITEM_ID])
    tie = _tie(_hash(event.user), _hash(event["item"]), event.at)
    return event.mutate(tie=tie)


def coded_events(
    engine: GraphEngine, events: ibis.Table, since_us: int
) -> tuple[ibis.Table, pa.Array]:
    """Like :func:`plain_events`, with a number for each id, and the items' ids by number.

    Items are numbered in the order of their texts, so that pairs of numbers sort as their texts
    do. Holds one chunk's distinct item ids in memory.
    """
    event = events.filter(events.at >= since_us)
    distinct = event.select(ITEM_ID).distinct()
    ids = distinct.order_by(ITEM_ID).to_pyarrow()[ITEM_ID].combine_chunks()
    items = engine.table(pa.table({ITEM_ID: ids, "item": np.arange(len(ids), dtype=np.int32)}))
    items = engine.keep("items", items.mutate(item_hash=_hash(items[ITEM_ID])))
    users = event.select(USER_ID).distinct()
    users = engine.keep(
        "users",
        users.mutate(user=ibis.row_number().cast("int32"), user_hash=_hash(users[USER_ID])),
    )
    coded = event.inner_join(items, ITEM_ID).inner_join(users, USER_ID)
    coded = coded.select("user", "item", "at", tie=_tie(coded.user_hash, coded.item_hash, coded.at))
    return coded, ids


def _hash(text: Any) -> Any:
    """20 bits of MD5 as a number: what DuckDB and Spark both compute."""
    digest = text.hexdigest("md5")
    value: Any = ibis.literal(0, "int64")
    for place in range(_DIGITS):
        digit = ibis.literal(_HEX).find(digest.substr(place, 1)).cast("int64")
        value = value * 16 + digit
    return value


def _tie(user_hash: Any, item_hash: Any, at: Any) -> Any:
    factor = (user_hash + at // 1_000_000) % (_PRIME - 1) + 1
    return ((item_hash + 1) * factor) % _PRIME
