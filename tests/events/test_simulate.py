"""The simulated log: its moments, its determinism, its oracle, and that its sequence matters."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from hiertcn.errors import InputError
from hiertcn.events.ingest import IngestOptions, ingest
from hiertcn.events.simulate import SimulationOptions, simulate
from hiertcn.events.simulated_behavior import Moments
from hiertcn.events.statistics import log_statistics

_SMALL = SimulationOptions(users=300, items=60, days=5, seed=7)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("simulated") / "log"
    simulate(output, SimulationOptions())
    return output


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.parquet"))
    }


def test_moments_are_those_of_the_papers_table(log):
    statistics = log_statistics(log / "events")
    assert statistics.users == 20_000
    for spread, mean, std in [
        (statistics.sessions_per_user, 3.9, 4.7),
        (statistics.events_per_session, 2.4, 3.0),
        (statistics.impressions_per_event, 9.8, 8.6),
        (statistics.events_per_user, 9.7, 13.4),
    ]:
        assert spread is not None
        assert spread.mean == pytest.approx(mean, rel=0.06)
        assert spread.std == pytest.approx(std, rel=0.12)


def test_same_seed_same_log_other_seed_other_log(tmp_path):
    simulate(tmp_path / "a", _SMALL)
    simulate(tmp_path / "b", _SMALL)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")
    simulate(tmp_path / "c", SimulationOptions(users=300, items=60, days=5, seed=8))
    assert _hashes(tmp_path / "a") != _hashes(tmp_path / "c")


def test_layout_and_types(tmp_path):
    options = SimulationOptions(users=50, items=20, days=3, start_date="2025-12-31", image_dim=5)
    summary = simulate(tmp_path / "log", options)
    assert {path.name for path in (tmp_path / "log").iterdir()} == {
        "events",
        "items.parquet",
        "oracle",
    }
    days = {path.name for path in (tmp_path / "log/events").iterdir()}
    assert days <= {"date=2025-12-31", "date=2026-01-01", "date=2026-01-02"}
    events = pq.ParquetFile(next((tmp_path / "log/events").rglob("*.parquet"))).schema_arrow
    assert events.names == ["user_id", "item_id", "timestamp", "event_type", "impressions"]
    assert events.field("timestamp").type == pa.timestamp("us", tz="UTC")
    items = pq.read_table(tmp_path / "log/items.parquet")
    assert items.column_names == ["item_id", "title", "category", "price", "image"]
    assert {len(image) for image in items["image"].to_pylist()} == {5}
    oracle = ds.dataset(tmp_path / "log/oracle").to_table()
    assert oracle.column_names == ["user_id", "item_id", "timestamp", "rank", "candidates"]
    assert oracle.schema.field("rank").type == pa.int32()
    assert len(oracle) == summary.events


def test_events_lie_in_their_days_and_choices_among_distinct_impressions(log):
    start = np.datetime64("2026-01-01")
    for path in sorted((log / "events").rglob("*.parquet"))[::9]:
        table = pq.ParquetFile(path).read()
        dates = table["timestamp"].to_numpy().astype("datetime64[D]")
        assert set(dates) == {np.datetime64(path.parent.name.removeprefix("date="))}
        assert dates.min() >= start
        assert dates.max() < start + 30
        for item, shown in zip(
            table["item_id"].to_pylist(), table["impressions"].to_pylist(), strict=True
        ):
            assert item in shown
            assert len(set(shown)) == len(shown)


def test_the_oracle_beats_chance_and_knows_the_number_of_candidates(log):
    keys = ["user_id", "timestamp"]
    oracle = ds.dataset(log / "oracle").to_table().sort_by([(key, "ascending") for key in keys])
    events = ds.dataset(log / "events").to_table().sort_by([(key, "ascending") for key in keys])
    assert oracle["item_id"].equals(events["item_id"])
    candidates = oracle["candidates"].to_numpy()
    rank = oracle["rank"].to_numpy()
    assert candidates.tolist() == pc.list_value_length(events["impressions"]).to_pylist()
    assert (rank >= 1).all()
    assert (rank <= candidates).all()
    mean_reciprocal = np.cumsum(1 / np.arange(1, 500)) / np.arange(1, 500)
    chance = mean_reciprocal[candidates - 1].mean()
    assert np.mean(1 / rank) > chance + 0.2


def test_what_comes_next_depends_on_order_and_on_the_users_past(log):
    items = pq.read_table(log / "items.parquet")
    categories = np.array(
        [int(text.removeprefix("category-")) for text in items["category"].to_pylist()]
    )
    events = (
        ds.dataset(log / "events")
        .to_table()
        .sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    )
    item = np.array([int(text[1:]) for text in events["item_id"].to_pylist()])
    user = np.array([int(text[1:]) for text in events["user_id"].to_pylist()])
    seconds = events["timestamp"].cast(pa.int64()).to_numpy() / 1e6
    category = categories[item]
    same_user = user[1:] == user[:-1]
    same_session = same_user & (np.diff(seconds) <= 1800)

    topics = category.max() + 1
    steps = np.zeros((topics, topics))
    np.add.at(steps, (category[:-1][same_session], category[1:][same_session]), 1)
    steps /= steps.sum(axis=1, keepdims=True)
    # Forward, one topic follows most often, and it is not the topic itself.
    successor = steps.argmax(axis=1)
    assert (successor != np.arange(topics)).mean() > 0.9
    forward = steps[np.arange(topics), successor].mean()
    backward = steps[successor, np.arange(topics)].mean()
    assert forward > 0.2
    assert forward > 3 * backward

    # A session's first item shares its topic with the user's first event far above chance.
    first_of_user = np.concatenate([[0], np.flatnonzero(~same_user) + 1])
    opens = np.flatnonzero(same_user & ~same_session) + 1
    home = category[first_of_user[np.searchsorted(first_of_user, opens, side="right") - 1]]
    chance = np.square(np.bincount(category) / len(category)).sum()
    assert (category[opens] == home).mean() > 2 * chance


def test_default_limits_leave_a_healthy_log(log, tmp_path):
    summary = ingest(
        str(log / "events"),
        tmp_path / "ingested",
        items_url=str(log / "items.parquet"),
        options=IngestOptions(),
    )
    assert summary.rejected == {}
    assert summary.events > 80_000
    assert summary.users > 4_000
    assert summary.items > 1_000


@pytest.mark.parametrize(
    "options",
    [
        {"users": 1, "items": 2, "days": 1},
        {"users": 40, "items": 2, "days": 1, "topics": 50},
        {"users": 5, "items": 30, "days": 1, "sessions_per_user": Moments(mean=60.0, std=5.0)},
        {"users": 5, "items": 30, "days": 400, "interactions_per_session": Moments(mean=1, std=0)},
    ],
    ids=str,
)
def test_extreme_sizes(tmp_path, options):
    summary = simulate(tmp_path / "log", SimulationOptions(**options))
    events = ds.dataset(tmp_path / "log/events").to_table()
    assert len(events) == summary.events >= options["users"]
    day_us = 86_400 * 10**6
    assert summary.last_us - 1_767_225_600 * 10**6 < options["days"] * day_us


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"users": 0}, "users is 0"),
        ({"items": 1}, "items is 1"),
        ({"days": 0}, "days is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"start_date": "soon"}, "start_date is 'soon'"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(InputError, match=match):
        SimulationOptions(**options)
