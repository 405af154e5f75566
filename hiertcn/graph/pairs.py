"""The co-interaction query: from events to item pairs per day, as one Ibis expression.

DuckDB and Spark run it; ``coded_pairs`` finds the same pairs without a query.

Each user's events are numbered in order of time. A pair's two places are at most
``max_followers`` apart, so they lie in one block of that many places or in neighboring ones: the
events are joined by user and block, which offers at most ``2 * max_followers`` partners to an
event however long a user's history is. Only events with a neighbor inside the window take part.
This takes a third of the time of collecting each event's followers into a list.

Events of one user at one instant are ordered by ``(a x) mod p``, ``x`` a hash of the item and ``a``
one of user and second, then by item: the same on every engine, whatever the order of rows, and the
cap samples a large basket fairly.
"""

from typing import Final

import ibis

from hiertcn.events.columns import ITEM_ID, USER_ID
from hiertcn.graph.options import GraphOptions

DAY: Final = "day"
SOURCE: Final = "source"
TARGET: Final = "target"
COUNT: Final = "count"
US_PER_DAY: Final = 86_400_000_000

PRIME: Final = 2**31 - 1
"""``p`` in the order within an instant."""

HASH_BITS: Final = 2**20 - 1
"""Of each hash 20 bits go into the order within an instant, so that the product fits."""


def co_interactions(event: ibis.Table, options: GraphOptions) -> ibis.Table:
    """Return the pairs per day: day, source, target, count.

    Args:
        event: as :func:`plain_events` returns it.
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
    """Return what :func:`co_interactions` needs.

    Args:
        events: user_id, item_id and ``at``, int64 microseconds since 1970-01-01 UTC.
        since_us: earlier events are left out; microseconds since 1970-01-01 UTC.
    """
    event = events.filter(events.at >= since_us)
    event = event.select(
        "at",
        user=_xxhash64(event[USER_ID]),
        item=event[ITEM_ID],
        item_hash=_xxhash64(event[ITEM_ID]),
    )
    factor = ((event.user & HASH_BITS) + event.at // 1_000_000) % (PRIME - 1) + 1
    return event.mutate(tie=(((event.item_hash & HASH_BITS) + 1) * factor) % PRIME)


@ibis.udf.scalar.builtin(name="xxhash64")  # type: ignore[untyped-decorator]
def _xxhash64(text: str) -> int:  # type: ignore[empty-body]
    """XXH64 with seed 42, as Spark calls it."""
