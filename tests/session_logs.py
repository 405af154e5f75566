"""Small logs for tests, written through the real ingest layout and the real session builder."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hiertcn.items.index import IdIndex
from hiertcn.items.table import ItemTable
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.store import SessionStore

START_US = 1_767_225_600_000_000
MINUTE_US = 60_000_000
DAY_US = 24 * 60 * MINUTE_US


def write_events(directory: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows (user_id, item_id, timestamp in us, maybe impressions) as ingest lays them out."""
    days: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        moment = datetime.datetime.fromtimestamp(row["timestamp"] / 1e6, datetime.UTC)
        days.setdefault(moment.date().isoformat(), []).append(row)
    fields = [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("timestamp", pa.timestamp("us", "UTC")),
    ]
    if rows and "event_type" in rows[0]:
        fields.append(("event_type", pa.string()))
    if rows and "impressions" in rows[0]:
        fields.append(("impressions", pa.list_(pa.string())))
    for day, of_day in days.items():
        of_day.sort(key=lambda row: (row["user_id"], row["timestamp"]))
        folder = directory / f"date={day}"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(of_day, pa.schema(fields)), folder / "part-0.parquet")
    return directory


def write_store(
    directory: Path,
    users: Sequence[Sequence[Sequence[int]]],
    items: int,
    event_types: Sequence[str | None] = (),
) -> SessionStore:
    """Cut a store whose user ``u`` has the sessions ``users[u]``, each a list of item rows.

    Sessions of a user are a day apart, their items a minute; users start a second apart, so that
    all session starts differ. Given ``event_types``, the interactions take them in turn.
    """
    rows = [
        {
            "user_id": f"u{user:06d}",
            "item_id": f"i{item}",
            "timestamp": START_US + user * 1_000_000 + session * DAY_US + place * MINUTE_US,
        }
        for user, sessions in enumerate(users)
        for session, session_items in enumerate(sessions)
        for place, item in enumerate(session_items)
    ]
    if event_types:
        for number, row in enumerate(rows):
            row["event_type"] = event_types[number % len(event_types)]
    index = IdIndex.build([f"i{item}" for item in range(items)], directory / "index")
    build_sessions(write_events(directory / "events", rows), index, directory / "store")
    return SessionStore.open(directory / "store")


def random_users(
    rng: np.random.Generator, *, users: int, items: int, sessions: int = 6, length: int = 8
) -> list[list[list[int]]]:
    """Draw users whose next item mostly follows the one before, so that it can be learnt."""
    drawn = []
    for _ in range(users):
        item = int(rng.integers(items))
        of_user = []
        for _ in range(int(rng.integers(1, sessions + 1))):
            session = []
            for _ in range(int(rng.integers(1, length + 1))):
                item = (item + 1) % items if rng.random() < 0.9 else int(rng.integers(items))
                session.append(item)
            of_user.append(session)
        drawn.append(of_user)
    return drawn


def write_table(directory: Path, items: int, dim: int, seed: int = 0) -> ItemTable:
    """Write random unit vectors of width ``dim - 1`` and a popularity coordinate."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(items, dim)).astype(np.float32)
    vectors[:, :-1] /= np.linalg.norm(vectors[:, :-1], axis=1, keepdims=True)
    vectors[:, -1] *= 0.1
    return ItemTable.write(directory, vectors, "float32")
