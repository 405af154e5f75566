"""Table 1 against a slow count by hand."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiertcn.errors import InputError
from hiertcn.events.ingest import IngestOptions, ingest
from hiertcn.events.statistics import log_statistics

_START_S = 1_767_225_600


def test_statistics_are_those_of_a_slow_count(tmp_path):
    rng = np.random.default_rng(3)
    users = rng.integers(0, 9, 200)
    times = rng.choice(200_000, 200, replace=False)
    shown = [[f"i{n}" for n in range(rng.integers(1, 6))] for _ in users]
    log = pa.table(
        {
            "user_id": users,
            "item_id": rng.integers(0, 30, 200),
            "timestamp": _START_S + times,
            "impressions": shown,
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    limits = {"min_item_interactions": 0, "min_user_interactions": 0}
    ingest(str(tmp_path / "log.parquet"), tmp_path / "o", options=IngestOptions(**limits))

    sessions = []
    for user in range(9):
        last = None
        for place in np.argsort(times):
            if users[place] != user:
                continue
            if last is None or times[place] - last > 3600:
                sessions.append((user, []))
            sessions[-1][1].append(len(shown[place]))
            last = times[place]
    events = [len(counts) for _, counts in sessions]
    per_user = np.bincount([user for user, _ in sessions])

    statistics = log_statistics(tmp_path / "o/events", session_gap_s=3600)
    assert statistics.users == 9
    assert statistics.items == len(np.unique(log["item_id"]))
    assert statistics.interactions == 200
    assert statistics.impressions == sum(map(len, shown))
    assert statistics.sessions == len(sessions)
    for spread, values in [
        (statistics.impressions_per_event, [len(items) for items in shown]),
        (statistics.impressions_per_session, [sum(counts) for _, counts in sessions]),
        (statistics.events_per_session, events),
        (statistics.sessions_per_user, per_user),
        (statistics.events_per_user, np.bincount(users)),
    ]:
        assert spread is not None
        assert (spread.mean, spread.std) == pytest.approx((np.mean(values), np.std(values)))


def test_a_pause_of_exactly_the_gap_does_not_end_a_session(tmp_path):
    log = {"user_id": ["a"] * 3, "item_id": ["b"] * 3, "timestamp": [0, 1800, 3601]}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    options = IngestOptions(min_item_interactions=0, min_user_interactions=0, timestamp_unit="s")
    statistics = ingest(str(tmp_path / "log.parquet"), tmp_path / "o", options=options).statistics
    assert statistics.sessions == 2
    assert statistics.impressions is None


def test_no_events_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read as an events folder"):
        log_statistics(tmp_path)
