"""A log made ready for the tables: sessions, and item vectors that know nothing of the test part.

The cold start (section 4.2.1) learns from 80% of the users and asks about another 10%; the warm
start learns from the first two thirds of the sessions and asks about the last third. Item vectors
are made once for each, by GraphSAGE over the item graph of the training part alone, so no test
interaction is in the vectors it is asked with. Everything is kept in a folder and made only once.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests, build_requests
from hiertcn.events.columns import ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.events.ingest import IngestOptions, ingest
from hiertcn.events.simulate import SimulationOptions, simulate
from hiertcn.files import read_json, whole_directory, write_json
from hiertcn.graph.edges import build_edges
from hiertcn.graph.merge import merge_edges
from hiertcn.graph.options import GraphOptions
from hiertcn.graph.walks import importance_neighborhoods
from hiertcn.items.features import FeatureOptions, encode_features
from hiertcn.items.index import IdIndex
from hiertcn.items.prior import popularity_prior
from hiertcn.items.table import ItemTable
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.split import Split, split_by_time, split_by_user
from hiertcn.sessions.store import (
    EVENT_TYPES,
    IMPRESSION_OFFSETS,
    IMPRESSION_ROWS,
    ITEM_ROWS,
    SESSION_OFFSETS,
    TIMESTAMPS_US,
    USER_OFFSETS,
    SessionStore,
    StoreMeta,
    ranges,
)
from hiertcn.training.item_encoder import train_item_encoder
from hiertcn.training.item_encoder_options import ItemEncoderOptions
from hiertcn.training.item_inference import embed_items
from models.graphsage import GraphSAGE, GraphSAGEConfig

Start = Literal["cold", "warm"]

_WARM_TEST_SHARE: Final = 1 / 3
"""Two months of training and one of test, as in the paper."""
_VALIDATION_SHARE: Final = 0.1
_ALL_DAYS: Final = 36_600


@dataclass(frozen=True, kw_only=True)
class LogSource:
    """Where the log comes from; it decides the folder's contents.

    Attributes:
        events: CSV or parquet, a file, folder or URL; empty to simulate.
        items: items file or URL; empty for none.
        ingest: how to read and filter it.
        simulation: what to simulate, where no events are given.
        item_dim: width of the item vectors, without the popularity prior.
        encoder_epochs: most epochs of the item encoder.
    """

    events: str = ""
    items: str = ""
    ingest: IngestOptions = field(default_factory=IngestOptions)
    simulation: SimulationOptions = field(default_factory=SimulationOptions)
    item_dim: int = 64
    encoder_epochs: int = 5


@dataclass(frozen=True, kw_only=True)
class Log:
    """A log that was read: its sessions, its items, and the folder of both."""

    folder: Path
    source: LogSource
    store: SessionStore
    index: IdIndex

    @property
    def events(self) -> Path:
        """Folder of the ingested events, by day."""
        return self.folder / "snapshot" / "events"

    @property
    def statistics(self) -> dict[str, Any]:
        """What ingest counted: the paper's Table 1."""
        found: dict[str, Any] = read_json(self.folder / "snapshot" / "statistics.json")
        return found


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What one comparison learns from and asks about.

    Attributes:
        name: ``cold`` or ``warm``, with the share of the training data where it is not all.
        training: the sessions to learn from, in memory.
        split: within ``training``, where the sessions begin that training is stopped by.
        store: the whole log: histories at request time.
        requests: what is asked.
        table: item vectors made from the training part.
        note: what a reader of its tables must know.
    """

    name: str
    training: SessionStore
    split: Split
    store: SessionStore
    requests: Requests
    table: ItemTable
    note: str


def prepare_log(folder: Path, source: LogSource) -> Log:
    """Read or simulate the log, once.

    Raises:
        InputError: the folder holds another log, or the log cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.loads(json.dumps(asdict(source)))
    header = folder / "source.json"
    if header.exists() and read_json(header) != identity:
        raise InputError(
            f"{folder} holds the tables of another log or with other item vectors; give another "
            "folder, or delete it"
        )
    write_json(header, identity)
    events, items = source.events, source.items
    if not events:
        if not (folder / "simulated").exists():
            simulate(folder / "simulated", source.simulation)
        events = str(folder / "simulated" / "events")
        items = str(folder / "simulated" / "items.parquet")
    if not (folder / "snapshot").exists():
        ingest(events, folder / "snapshot", items_url=items or None, options=source.ingest)
    if not (folder / "sessions").exists():
        shutil.rmtree(folder / "item_index", ignore_errors=True)
        ids = duckdb.sql(
            f"SELECT DISTINCT {ITEM_ID} FROM "
            f"read_parquet('{folder}/snapshot/events/**/*.parquet') ORDER BY {ITEM_ID}"
        ).to_arrow_table()
        index = IdIndex.build(ids[ITEM_ID], folder / "item_index")
        build_sessions(
            folder / "snapshot" / "events",
            index,
            folder / "sessions",
            gap_s=source.ingest.session_gap_s,
        )
    return Log(
        folder=folder,
        source=source,
        store=SessionStore.open(folder / "sessions"),
        index=IdIndex.open(folder / "item_index"),
    )


def make_setting(
    log: Log, start: Start, *, max_requests: int, seed: int, training_share: float = 1.0
) -> Setting:
    """Return the cold or the warm start of a log.

    Args:
        log: what to split.
        start: ``cold`` by user, ``warm`` by time.
        max_requests: ask about a sample of at most this many interactions.
        seed: of the split by user, of the sample, and of the item encoder.
        training_share: learn from the users of this share alone (the paper's Table 5).
    """
    store = log.store
    owner = store.user_of_session(np.arange(store.meta.sessions))
    if start == "cold":
        users = split_by_user(store, seed=seed)
        chosen = np.zeros(store.meta.users, np.bool_)
        chosen[users.training] = True
        kept = chosen[owner]
        requests = build_requests(store, users=users.test, max_requests=max_requests, seed=seed)
        ids = store.user_ids.take(pa.array(users.training))

        def learnt(events: pa.Table) -> Any:
            return pc.is_in(events[USER_ID].cast(pa.large_string()), value_set=ids)

        note = (
            "cold start: learnt from 80% of the users, asked about another 10%; networks are "
            "stopped by the newest tenth of the training users' sessions"
        )
    else:
        test_start_us = split_by_time(store, _VALIDATION_SHARE, _WARM_TEST_SHARE).test_start_us
        kept = store.session_starts_us() < test_start_us
        requests = build_requests(store, test_start_us, max_requests=max_requests, seed=seed)

        def learnt(events: pa.Table) -> Any:
            limit = pa.scalar(test_start_us, pa.int64())
            times = events[TIMESTAMP].cast(pa.timestamp("us", "UTC")).cast(pa.int64())
            return pc.less(times, limit)

        note = (
            "warm start: learnt from the first two thirds of the sessions, asked about the last "
            "third; networks are stopped by the newest tenth of the training sessions"
        )
    table = _item_table(log, start, learnt, part_of(store, kept), seed)
    name: str = start
    if training_share < 1.0:
        rng = np.random.default_rng((seed, 5))
        kept = kept & (rng.random(store.meta.users) < training_share)[owner]
        name = f"{start} {training_share:.0%}"
        note += f"; from {training_share:.0%} of the training users"
    training = part_of(store, kept)
    stop = split_by_time(training, _VALIDATION_SHARE, _VALIDATION_SHARE)
    return Setting(
        name=name,
        training=training,
        split=Split(
            validation_start_us=stop.test_start_us,
            test_start_us=training.meta.watermark_us + 1,
        ),
        store=store,
        requests=requests,
        table=table,
        note=note,
    )


def part_of(store: SessionStore, kept: NDArray[np.bool_]) -> SessionStore:
    """Return the kept sessions, bool [sessions], as a store in memory; other users are left out.

    Raises:
        InputError: no session is kept.
    """
    sessions = np.flatnonzero(kept)
    if len(sessions) == 0:
        raise InputError(
            f"no session of {store.directory} is left to learn from; give a longer log"
        )
    starts = np.asarray(store.session_offsets[sessions])
    lengths = np.asarray(store.session_offsets[sessions + 1]) - starts
    interactions = ranges(starts, lengths)
    _, first = np.unique(store.user_of_session(sessions), return_index=True)
    columns: dict[str, NDArray[Any]] = {
        ITEM_ROWS: store.item_rows[interactions],
        TIMESTAMPS_US: store.timestamps_us[interactions],
        SESSION_OFFSETS: np.append(0, np.cumsum(lengths)),
        USER_OFFSETS: np.append(first, len(sessions)),
    }
    impressions = None
    if store.has_impressions:
        rows, counts = store.impressions(interactions)
        columns[IMPRESSION_ROWS], impressions = rows, len(rows)
        columns[IMPRESSION_OFFSETS] = np.append(0, np.cumsum(counts))
    if store.event_types is not None:
        columns[EVENT_TYPES] = store.event_types[interactions]
    meta = StoreMeta(
        users=len(first),
        sessions=len(sessions),
        interactions=len(interactions),
        items=store.meta.items,
        impressions=impressions,
        gap_us=store.meta.gap_us,
        watermark_us=int(columns[TIMESTAMPS_US].max()),
        event_types=store.meta.event_types,
    )
    return SessionStore(store.directory, meta, columns)


def _item_table(
    log: Log,
    start: Start,
    learnt: Callable[[pa.Table], Any],
    training: SessionStore,
    seed: int,
) -> ItemTable:
    """Return GraphSAGE's vectors over the graph of the learnt events, made once for each seed."""
    folder = log.folder / f"items-{start}-{seed}"
    if (folder / "table").exists():
        return ItemTable.open(folder / "table")
    shutil.rmtree(folder, ignore_errors=True)
    with whole_directory(folder) as aside:
        _write_learnt(log.events, learnt, aside / "events")
        options = GraphOptions(window_days=_ALL_DAYS)
        build_edges(aside / "events", aside / "edges", options)
        csr = merge_edges(aside / "edges", log.index, aside / "graph", options)
        items_file = log.folder / "snapshot" / "items.parquet"
        matrix = encode_features(
            items_file if items_file.exists() else None,
            log.index,
            aside / "features",
            FeatureOptions(seed=seed),
        )
        torch.manual_seed(seed)
        encoder = GraphSAGE(
            GraphSAGEConfig(items=csr.items, feature_dim=len(matrix.names), dim=log.source.item_dim)
        )
        walks = importance_neighborhoods(csr, seed=seed)
        train_item_encoder(
            encoder,
            matrix if matrix.names else None,
            walks,
            csr,
            aside / "encoder",
            ItemEncoderOptions(epochs=log.source.encoder_epochs, seed=seed),
        )
        vectors = embed_items(encoder, matrix if matrix.names else None, walks)
        counts = np.bincount(training.item_rows, minlength=len(log.index))
        ItemTable.write(
            aside / "table", np.column_stack([vectors, popularity_prior(counts)]), "float32"
        )
        shutil.rmtree(aside / "events")
    return ItemTable.open(folder / "table")


def _write_learnt(events: Path, learnt: Callable[[pa.Table], Any], output: Path) -> None:
    for file in sorted(events.glob("*/*.parquet")):
        # ParquetFile: reading a path would add the folder's date as a column.
        table = pq.ParquetFile(file).read(columns=[USER_ID, ITEM_ID, TIMESTAMP])
        table = table.filter(learnt(table))
        if len(table):
            target = output / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, target)


def fingerprint(*values: Any) -> str:
    """Return a short hash of JSON values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
