"""Replay held-out interactions through a running sidecar, as a user's day would reach it.

For every interaction, in the order of time: ask for recommendations as of that moment (the
impressions as candidates where the log has them, else the whole catalogue), see where the item
that the user then chose stands, and record the interaction. Costs two gRPC calls an interaction;
one caller, so the latencies are those of an idle service.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from tqdm import tqdm

from hiertcn.events import columns
from hiertcn.serving.client import Interaction, RecommenderClient

K = 10


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """What the replay saw; latencies in milliseconds.

    Recall@10 and MRR@10 are over the requests whose chosen item the release has; what it has not
    (the pipeline's filters dropped it, or it is new) can never be recommended.
    ``recall_at_10_all`` counts those as misses. ``random_recall_at_10`` is what guessing among the
    same candidates would reach.
    """

    requests: int
    known_targets: int
    candidates: str
    recall_at_10: float
    mrr_at_10: float
    random_recall_at_10: float
    recall_at_10_all: float
    fallbacks: int
    recorded: int
    recommend_p50_ms: float
    recommend_p99_ms: float
    record_p50_ms: float
    record_p99_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class _Step:
    user_id: str
    item_id: str
    timestamp_us: int
    impressions: list[str] | None


def replay(
    address: str, events: Path, *, since_us: int, max_interactions: int, catalogue: int
) -> ReplayResult:
    """Replay the interactions of ``events`` (an ingested folder) from ``since_us`` on.

    ``catalogue`` is the number of items the release ranks, for the chance level. The first
    ``max_interactions`` in time order are replayed, so that what one interaction teaches is there
    when the user's next one comes.

    Raises:
        ServingError: the sidecar is gone.
    """
    steps = _read(events, since_us, max_interactions)
    ranks: list[int] = []
    chance: list[float] = []
    recommend_ms: list[float] = []
    record_ms: list[float] = []
    fallbacks = recorded = 0
    with RecommenderClient(address) as client:
        for step in tqdm(steps, desc="replaying", unit="interaction", mininterval=2):
            pool = None
            if step.impressions:
                pool = list(dict.fromkeys([*step.impressions, step.item_id]))
            start = time.perf_counter()
            reply = client.recommend(
                step.user_id, k=K, candidates=pool, timestamp_us=step.timestamp_us
            )
            recommend_ms.append((time.perf_counter() - start) * 1e3)
            fallbacks += reply.fallback

            start = time.perf_counter()
            result = client.record(
                [Interaction(step.user_id, step.item_id, timestamp_us=step.timestamp_us)]
            )
            record_ms.append((time.perf_counter() - start) * 1e3)
            recorded += result.accepted
            if result.unknown_items:
                continue
            shown = [item.item_id for item in reply.items]
            ranks.append(shown.index(step.item_id) + 1 if step.item_id in shown else 0)
            pool_size = len(pool) - len(reply.unknown_items) if pool else catalogue
            chance.append(min(1.0, K / pool_size))
    hits = sum(rank > 0 for rank in ranks)
    return ReplayResult(
        requests=len(steps),
        known_targets=len(ranks),
        candidates="impressions" if any(s.impressions for s in steps) else "catalogue",
        recall_at_10=hits / max(1, len(ranks)),
        mrr_at_10=_mean([1 / rank if rank else 0.0 for rank in ranks]),
        random_recall_at_10=_mean(chance),
        recall_at_10_all=hits / max(1, len(steps)),
        fallbacks=fallbacks,
        recorded=recorded,
        recommend_p50_ms=_percentile(recommend_ms, 50),
        recommend_p99_ms=_percentile(recommend_ms, 99),
        record_p50_ms=_percentile(record_ms, 50),
        record_p99_ms=_percentile(record_ms, 99),
    )


def _read(events: Path, since_us: int, max_interactions: int) -> list[_Step]:
    dataset = ds.dataset(events, format="parquet", partitioning="hive")
    wanted = [columns.USER_ID, columns.ITEM_ID, columns.TIMESTAMP]
    if columns.IMPRESSIONS in dataset.schema.names:
        wanted.append(columns.IMPRESSIONS)
    since = pa.scalar(since_us, pa.timestamp("us", tz="UTC"))
    table = dataset.to_table(columns=wanted, filter=pc.field(columns.TIMESTAMP) >= since)
    # A stable sort: interactions of one instant keep the log's order.
    order = pc.sort_indices(table, sort_keys=[(columns.TIMESTAMP, "ascending")])
    return list(_steps(table.take(order[:max_interactions])))


def _steps(table: pa.Table) -> Iterator[_Step]:
    times = table[columns.TIMESTAMP].cast(pa.int64()).to_pylist()
    shown: list[list[str] | None] = (
        table[columns.IMPRESSIONS].to_pylist()
        if columns.IMPRESSIONS in table.column_names
        else [None] * table.num_rows
    )
    users = table[columns.USER_ID].to_pylist()
    items = table[columns.ITEM_ID].to_pylist()
    for user, item, timestamp_us, impressions in zip(users, items, times, shown, strict=True):
        yield _Step(user, item, timestamp_us, impressions)


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _percentile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
