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

from typing import Final

import ibis
import numpy as np
import pyarrow as pa

from hiertcn.events.columns import ITEM_ID, USER_ID
from hiertcn.graph.coded_log import NUMBER, CodedLog
from hiertcn.graph.engine import GraphEngine
from hiertcn.graph.options import GraphOptions

DAY: Final = "day"
SOURCE: Final = "source"
TARGET: Final = "target"
COUNT: Final = "count"
US_PER_DAY: Final = 86_400_000_000

_PRIME: Final = 2**31 - 1
_HASH_BITS: Final = 2**20 - 1


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
    """Return what :func:`co_interactions` needs, with item ids as they are; for Spark.

    Args:
        events: as :meth:`GraphEngine.read_events` returns them.
        since_us: earlier events are left out; microseconds since 1970-01-01 UTC.
    """
    event = events.filter(events.at >= since_us)
    event = event.select(
        "at",
        user=_xxhash64(event[USER_ID]),
        item=event[ITEM_ID],
        item_hash=_xxhash64(event[ITEM_ID]),
    )
    return _with_tie(event)


def coded_events(engine: GraphEngine, log: CodedLog, since_us: int) -> tuple[ibis.Table, pa.Array]:
    """Like :func:`plain_events`, with a number for each item, and the ids by number.

    Items are numbered in the order of their texts, so that pairs of numbers sort as their texts
    do.
    """
    ids, numbers, hashes = log.items.in_text_order()
    items = ibis.memtable(
        pa.table(
            {
                NUMBER: numbers,
                "item": np.arange(len(ids), dtype=np.int32),
                "item_hash": hashes.view(np.int64),
            }
        )
    )
    event = engine.read_events(log.files)
    event = event.filter(event.at >= since_us)
    event = event.inner_join(items, NUMBER).select("user", "item", "at", "item_hash")
    return _with_tie(event), ids


@ibis.udf.scalar.builtin(name="xxhash64")  # type: ignore[untyped-decorator]
def _xxhash64(text: str) -> int:  # type: ignore[empty-body]
    """Spark's own function: XXH64 with seed 42."""


def _with_tie(event: ibis.Table) -> ibis.Table:
    # 20 bits of each hash, so that the product fits.
    factor = ((event.user & _HASH_BITS) + event.at // 1_000_000) % (_PRIME - 1) + 1
    return event.mutate(tie=(((event.item_hash & _HASH_BITS) + 1) * factor) % _PRIME)
