"""A log cut for item-to-item retrieval: what was known, and which items met afterwards.

The newest days that together hold at least a tenth of the events are held out. What is asked: a
user touched two items within the graph's window on a held-out day; given one, find the other among
all items of the log. A question is one such meeting of one user and two items, drawn among all
meetings, in one direction drawn too; so a pair that meets often is asked often. The graph's own
expression finds the meetings (``hiertcn.graph.edges``), so "co-interacted" means one thing.

For choosing options the same cut is made twice more inside the known days, each before the days
that the one after it holds out: on one cut of a news log a single article may be a seventh of the
answers. Everything is kept in a folder and made only once.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.events.columns import ITEM_ID
from hiertcn.events.ingest import IngestOptions, ingest
from hiertcn.events.simulate import SimulationOptions, simulate
from hiertcn.files import read_json, write_json
from hiertcn.graph.csr import CSR
from hiertcn.graph.edges import build_edges, partition_path, stored_dates
from hiertcn.graph.merge import merge_edges
from hiertcn.graph.options import GraphOptions
from hiertcn.graph.pairs import COUNT, SOURCE, TARGET
from hiertcn.items.features import FeatureMatrix, FeatureOptions, encode_features
from hiertcn.items.index import IdIndex
from hiertcn.sessions.cut import build_sessions
from hiertcn.sessions.store import SessionStore

LogName = Literal["online_retail", "globo_news", "simulator"]
Phase = Literal["test", "validation-1", "validation-2"]

LOGS: Final[tuple[LogName, ...]] = ("online_retail", "globo_news", "simulator")
VALIDATION: Final[tuple[Phase, ...]] = get_args(Phase)[1:]
"""Newest first."""

_HELD_OUT_SHARE: Final = 0.1
_ALL_DAYS: Final = 36_600
_ANY: Final = 2**31 - 1
_SIMULATION: Final = SimulationOptions(users=20_000, items=1_000, days=30, seed=0)
_INGEST: Final = {
    "online_retail": IngestOptions(
        event_types=("purchase",),
        item_filter="is_product",
        timestamp_unit="s",
        min_item_interactions=5,
        min_user_interactions=1,
        max_user_interactions=_ANY,
    ),
    "globo_news": IngestOptions(
        timestamp_unit="s",
        min_item_interactions=5,
        min_user_interactions=1,
        max_user_interactions=_ANY,
    ),
    "simulator": IngestOptions(
        min_item_interactions=1, min_user_interactions=1, max_user_interactions=_ANY
    ),
}


@dataclass(frozen=True, kw_only=True)
class RetrievalCase:
    """What is known of a log, and what is asked of items that were known.

    Attributes:
        name: of the log; ``phase`` says what is held out.
        folder: its own; what methods make may be kept below it.
        index: rows of all items of the log.
        features: of all items; ``names`` is empty if there are none.
        sessions: of the known days.
        popularity: int64 [items], events in the known days.
        queries, answers: int64 [n], item rows.
        met_before: bool [n], the two items had met in the known days.
        share_known: share of the meetings of which both items were seen in the known days; only
            those are asked about.
        first_date: first held-out date; ``last_date`` the log's last.
    """

    name: LogName
    phase: Phase
    folder: Path
    index: IdIndex
    features: FeatureMatrix
    sessions: SessionStore
    popularity: NDArray[np.int64]
    queries: NDArray[np.int64]
    answers: NDArray[np.int64]
    met_before: NDArray[np.bool_]
    share_known: float
    first_date: str
    last_date: str

    def graph(self, half_life_days: float, top_n: int = 50) -> CSR:
        """Return the item graph of the known days, merged once for each choice."""
        output = self.folder / f"graph-{half_life_days:g}-{top_n}"
        if not output.exists():
            return _merged(self.folder, self.index, output, half_life_days, top_n)
        return CSR.open(output)


def load_case(
    folder: Path, data_root: Path, name: LogName, phase: Phase, *, questions: int, seed: int = 0
) -> RetrievalCase:
    """Read or simulate a log, and cut it.

    Args:
        folder: where everything is kept.
        data_root: folder with ``<name>/events.parquet`` and ``<name>/items.parquet``.
        name: of the log.
        phase: what is held out.
        questions: at most this many are asked.
        seed: of their draw.

    Raises:
        InputError: the log is not there, is too short, or the folder holds another one.
    """
    log = _prepared(folder / name, data_root, name)
    dates = _dates(log / "snapshot" / "events")
    first, last = _first_held_out(log, dates), dates[-1]
    for _ in VALIDATION[: get_args(Phase).index(phase)]:
        dates = [date for date in dates if date < first]
        first, last = _first_held_out(log, dates), dates[-1]
    case = log / phase
    if not (case / "cut.json").exists():
        _cut(log, case, [date for date in dates if date < first])
    index = IdIndex.open(log / "item_index")
    sessions = SessionStore.open(case / "sessions")
    popularity = np.bincount(sessions.item_rows, minlength=len(index))
    pairs, counts = _meetings(log / "edges", index, [date for date in dates if date >= first])
    known = (popularity[pairs] > 0).all(axis=1)
    share_known = float(counts[known].sum() / counts.sum())
    pairs, counts = pairs[known], counts[known]
    rng = np.random.default_rng([seed, 0])
    asked = np.repeat(np.arange(len(pairs)), counts)
    if len(asked) > questions:
        asked = rng.choice(asked, questions, replace=False)
    flip = rng.integers(0, 2, len(asked))
    queries, answers = pairs[asked, flip], pairs[asked, 1 - flip]
    everything = _open_or_merge(case, index)
    sources = np.repeat(np.arange(len(index)), everything.degrees)
    met = np.isin(queries * len(index) + answers, sources * len(index) + everything.indices)
    return RetrievalCase(
        name=name,
        phase=phase,
        folder=case,
        index=index,
        features=FeatureMatrix.open(log / "features"),
        sessions=sessions,
        popularity=popularity,
        queries=queries,
        answers=answers,
        met_before=met,
        share_known=share_known,
        first_date=first,
        last_date=last,
    )


def _prepared(log: Path, data_root: Path, name: LogName) -> Path:
    """Ingest, index, connect and describe the whole log; return its folder."""
    identity = {"ingest": asdict(_INGEST[name]), "simulation": asdict(_SIMULATION), "format": 1}
    header = log / "source.json"
    if header.exists():
        if read_json(header) != _json(identity):
            raise InputError(f"{log} holds a log that was read with other options; delete it")
        return log
    if name == "simulator":
        if not (log / "simulated").exists():
            simulate(log / "simulated", _SIMULATION)
        events, items = log / "simulated" / "events", log / "simulated" / "items.parquet"
    else:
        events, items = data_root / name / "events.parquet", data_root / name / "items.parquet"
        if not events.exists():
            raise InputError(f"{events} does not exist; --data names the folder of the logs")
    for part in ("snapshot", "item_index", "features", "edges"):
        shutil.rmtree(log / part, ignore_errors=True)
    ingest(str(events), log / "snapshot", items_url=str(items), options=_INGEST[name])
    # Items in the order in which they appeared: as an index grown day by day would have them.
    ids = duckdb.sql(
        f"SELECT {ITEM_ID} FROM read_parquet('{log}/snapshot/events/**/*.parquet') "
        f"GROUP BY {ITEM_ID} ORDER BY min(timestamp), {ITEM_ID}"
    ).to_arrow_table()
    index = IdIndex.build(ids[ITEM_ID], log / "item_index")
    encode_features(_item_columns(log, name), index, log / "features", FeatureOptions())
    build_edges(log / "snapshot" / "events", log / "edges", GraphOptions(threads=1))
    write_json(header, _json(identity))
    return log


def _item_columns(log: Path, name: LogName) -> Path | None:
    """Return the items file without what was counted over the whole log, held-out days too."""
    file = log / "snapshot" / "items.parquet"
    if name == "globo_news":
        return None
    if name == "online_retail":
        told = log / "items_told.parquet"
        pq.write_table(pq.read_table(file, columns=[ITEM_ID, "title"]), told)
        return told
    return file


def _json(fields: dict[str, object]) -> dict[str, object]:
    return {
        name: {key: list(v) if isinstance(v, tuple) else v for key, v in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in fields.items()
    }


def _dates(events: Path) -> list[str]:
    return sorted(path.name.removeprefix("date=") for path in events.glob("date=*"))


def _first_held_out(log: Path, dates: list[str]) -> str:
    events = log / "snapshot" / "events"
    counts = [
        sum(pq.read_metadata(file).num_rows for file in (events / f"date={date}").glob("*.parquet"))
        for date in dates
    ]
    held = np.cumsum(counts[::-1]) >= _HELD_OUT_SHARE * sum(counts)
    place = len(dates) - 1 - int(held.argmax())
    if place < 1:
        raise InputError(f"{log} spans {len(dates)} day(s); expected days before those held out")
    return dates[place]


def _cut(log: Path, case: Path, known: list[str]) -> None:
    """Lay out the known days, their edges and their sessions."""
    shutil.rmtree(case, ignore_errors=True)
    for date in known:
        shutil.copytree(
            log / "snapshot" / "events" / f"date={date}", case / "events" / f"date={date}"
        )
        if partition_path(log / "edges", date).exists():
            shutil.copytree(
                partition_path(log / "edges", date).parent, case / "edges" / f"date={date}"
            )
    build_sessions(case / "events", IdIndex.open(log / "item_index"), case / "sessions")
    write_json(case / "cut.json", {"known": [known[0], known[-1]]})


def _open_or_merge(case: Path, index: IdIndex) -> CSR:
    """Return the graph of all meetings of the known days, however many an item has."""
    output = case / "graph-all"
    if output.exists():
        return CSR.open(output)
    return _merged(case, index, output, 0.0, _ANY)


def _merged(case: Path, index: IdIndex, output: Path, half_life_days: float, top_n: int) -> CSR:
    options = GraphOptions(
        window_days=_ALL_DAYS, half_life_days=half_life_days, top_n=top_n, threads=1
    )
    return merge_edges(case / "edges", index, output, options)


def _meetings(
    edges: Path, index: IdIndex, dates: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the item pairs, int64 [pairs, 2], that met on these days, and how often."""
    stored = set(stored_dates(edges))
    tables = [
        pq.ParquetFile(partition_path(edges, date)).read(columns=[SOURCE, TARGET, COUNT])
        for date in dates
        if date in stored
    ]
    table = pa.concat_tables(tables)
    pairs = np.stack([index.rows(table[SOURCE]), index.rows(table[TARGET])], axis=1)
    counts = np.asarray(table[COUNT])
    distinct = pairs[:, 0] != pairs[:, 1]
    if not distinct.any():
        raise InputError(f"no two items meet from {dates[0]} to {dates[-1]}; give a longer log")
    return pairs[distinct], counts[distinct]
