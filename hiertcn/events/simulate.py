"""A simulated event log with the statistics of the HierTCN paper's Table 1, at any size.

Users are simulated in blocks of fixed size, each with a random generator of its own, and their
events stream into one partition per day: memory does not grow with the number of users. Sequence
matters in it (within a session interest moves to the topic that follows), and so does the user's
past (a session opens near the slowly drifting long-term interest). The oracle's ranking of every
choice is written beside the log, so a report can say how far from the best possible a model is.
"""

import datetime
import logging
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.events.columns import EVENT_TYPE, IMPRESSIONS, ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.events.partitions import PartitionWriter, date_text
from hiertcn.events.simulated_behavior import BlockOfEvents, Moments, simulate_users
from hiertcn.events.simulated_world import build_world, catalogue_table, item_ids
from hiertcn.files import whole_directory

_log = logging.getLogger(__name__)

_DAY_US = 86_400_000_000
# Part of what a seed means: another block size would be another log.
_USERS_PER_BLOCK = 8192
_WORLD_STREAM, _CATALOGUE_STREAM, _USERS_STREAM = range(3)


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """How much to simulate; the defaults give about 190,000 events.

    Attributes:
        users, items: how many; ids are ``u0000000...`` and ``i0000000...``.
        days: length of the log in days from ``start_date`` (UTC).
        seed: the same options give the same log.
        start_date: first day, ``YYYY-MM-DD``.
        topics: latent topics (at most ``items``).
        image_dim: length of each item's image vector.
        sessions_per_user, interactions_per_session, impressions_per_interaction: mean and
            standard deviation of counts that are at least 1; the paper's Table 1 by default.

    Raises:
        InputError: a field is out of range.
    """

    users: int = 20_000
    items: int = 2_000
    days: int = 30
    seed: int = 0
    start_date: str = "2026-01-01"
    topics: int = 24
    image_dim: int = 32
    sessions_per_user: Moments = field(default_factory=lambda: Moments(mean=3.9, std=4.7))
    interactions_per_session: Moments = field(default_factory=lambda: Moments(mean=2.4, std=3.0))
    impressions_per_interaction: Moments = field(default_factory=lambda: Moments(mean=9.8, std=8.6))

    def __post_init__(self) -> None:
        least = {"users": 1, "items": 2, "days": 1, "seed": 0, "topics": 2, "image_dim": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value < minimum:
                raise InputError(
                    f"simulation option {name} is {value}; expected a whole number of at least "
                    f"{minimum}"
                )
        try:
            first_day = datetime.date.fromisoformat(self.start_date)
            first_day + datetime.timedelta(days=self.days)
        except (ValueError, OverflowError):
            raise InputError(
                f"simulation option start_date is {self.start_date!r}; expected a date as "
                "YYYY-MM-DD"
            ) from None


@dataclass(frozen=True)
class SimulationSummary:
    """What was written, and where."""

    output: Path
    events: int
    users: int
    items: int
    impressions: int
    first_us: int
    last_us: int


def simulate(output: Path, options: SimulationOptions) -> SimulationSummary:
    """Write a simulated log to the folder ``output``, whole or not at all.

    Layout::

        events/date=YYYY-MM-DD/part-0.parquet  user_id, item_id, timestamp, event_type, impressions
        items.parquet                          item_id, title, category, price, image
        oracle/date=YYYY-MM-DD/part-0.parquet  user_id, item_id, timestamp, rank, candidates

    ``rank`` (int32) is that of the chosen item among its ``candidates`` (int32) impressions by
    the true choice probabilities, ties counted against it. About 50,000 events/s on one core.

    Raises:
        InputError: the disk is full.
    """
    output = Path(output)
    world = build_world(
        _generator(options, _WORLD_STREAM), items=options.items, topics=options.topics
    )
    ids = item_ids(options.items)
    start_day = datetime.date.fromisoformat(options.start_date)
    start_us = (start_day - datetime.date(1970, 1, 1)).days * _DAY_US
    events = impressions = 0
    first_us, last_us = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    with (
        whole_directory(output) as aside,
        tqdm(total=options.users, desc="simulate", unit="user", mininterval=2) as progress,
    ):
        pq.write_table(
            catalogue_table(
                _generator(options, _CATALOGUE_STREAM), world, image_dim=options.image_dim
            ),
            aside / "items.parquet",
        )
        with (
            PartitionWriter(aside / "events") as event_writer,
            PartitionWriter(aside / "oracle") as oracle_writer,
        ):
            for first_user in range(0, options.users, _USERS_PER_BLOCK):
                users = min(_USERS_PER_BLOCK, options.users - first_user)
                block = simulate_users(
                    _generator(options, _USERS_STREAM, first_user // _USERS_PER_BLOCK),
                    world,
                    users=users,
                    days=options.days,
                    sessions=options.sessions_per_user,
                    interactions=options.interactions_per_session,
                    impressions=options.impressions_per_interaction,
                )
                for day, table, oracle in _by_day(block, first_user, ids, start_us):
                    event_writer.add(date_text(start_day, day), table)
                    oracle_writer.add(date_text(start_day, day), oracle)
                events += len(block.user)
                impressions += len(block.impressions)
                first_us = min(first_us, start_us + int(block.time_us.min()))
                last_us = max(last_us, start_us + int(block.time_us.max()))
                progress.update(users)
    _log.info("wrote %d simulated events of %d users to %s", events, options.users, output)
    return SimulationSummary(
        output=output,
        events=events,
        users=options.users,
        items=options.items,
        impressions=impressions,
        first_us=first_us,
        last_us=last_us,
    )


def _generator(options: SimulationOptions, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(options.seed, spawn_key=stream))


def _by_day(
    block: BlockOfEvents, first_user: int, ids: pa.Array, start_us: int
) -> list[tuple[int, pa.Table, pa.Table]]:
    order = np.argsort(block.time_us, kind="stable")
    sizes = np.diff(block.impression_offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    place = np.repeat(block.impression_offsets[:-1][order] - offsets[:-1], sizes)
    shown = block.impressions[place + np.arange(offsets[-1])]

    user = pa.array([f"u{number:07d}" for number in (first_user + block.user[order]).tolist()])
    item = ids.take(pa.array(block.item[order]))
    time = pa.array(start_us + block.time_us[order]).cast(pa.timestamp("us", tz="UTC"))
    events = pa.table(
        {
            USER_ID: user,
            ITEM_ID: item,
            TIMESTAMP: time,
            EVENT_TYPE: pa.array(["click"] * len(order)),
            IMPRESSIONS: pa.ListArray.from_arrays(
                pa.array(offsets.astype(np.int32)), ids.take(pa.array(shown))
            ),
        }
    )
    oracle = pa.table(
        {
            USER_ID: user,
            ITEM_ID: item,
            TIMESTAMP: time,
            "rank": pa.array(block.oracle_rank[order]),
            "candidates": pa.array(sizes.astype(np.int32)),
        }
    )
    day = block.time_us[order] // _DAY_US
    days, first = np.unique(day, return_index=True)
    ends = np.append(first[1:], len(order))
    return [
        (int(number), events.slice(begin, end - begin), oracle.slice(begin, end - begin))
        for number, begin, end in zip(days, first.tolist(), ends.tolist(), strict=True)
    ]
