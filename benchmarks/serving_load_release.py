"""A release of any size with random contents and a network of the default shape, to load.

What costs time is real: the exported HierTCN of the best (with scoring terms) or the paper's
configuration with random weights, an item table with a neighbour index, states and histories of
every user, transitions and live counts. What the ranks are worth is not; nothing is trained.
"""

import time
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from hiertcn.export.serving_models import export_serving_models
from hiertcn.export.tensors import GRU_STEP, TCN
from hiertcn.export.term_gate import TERMS_FILE
from hiertcn.items.index import IdIndex
from hiertcn.items.neighbor_building import build_neighbor_index
from hiertcn.items.table import ItemTable
from hiertcn.release.publish import ReleaseInput, publish
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.live.live_windows import MinuteCounts
from hiertcn.serving.records.snapshot import LIVE_COUNTS, TRANSITIONS, new_snapshot
from hiertcn.sessions.live_counts import MINUTE_US
from hiertcn.sessions.request_features import FEATURES
from hiertcn.sessions.transitions import TransitionOptions, TransitionTable
from models.hiertcn import HierTCN, HierTCNConfig
from models.hiertcn_serving import GruStep, TcnCone

DIM: Final = 128
GAP_US: Final = 1_800_000_000
_ITEMS_PER_TASTE: Final = 100
_HISTORY: Final = 60
_SESSION: Final = 6
_FOLLOWERS: Final = 50
_USERS_PER_CHUNK: Final = 50_000


def item_ids(items: int) -> list[str]:
    """The ids of a synthetic catalogue, in row order."""
    return [f"item-{row:07d}" for row in range(items)]


def user_ids(users: int) -> list[str]:
    """The ids of the users that the snapshot knows, in row order."""
    return [f"user-{row:07d}" for row in range(users)]


def publish_release(
    root: Path, parts: Path, *, date: str, items: int, users: int, with_terms: bool, seed: int
) -> int:
    """Make a release's parts in the folder ``parts``, publish and activate it.

    Args:
        root: the release repository.
        parts: a folder for the parts; it may be removed afterwards.
        date: UTC date that numbers the release.
        items: length of the catalogue.
        users: users with a state and a history of 60 interactions.
        with_terms: whether the network has scoring terms.
        seed: of everything random.

    Returns:
        The release's number.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    watermark_us = time.time_ns() // 1000
    network = HierTCNConfig.paper(DIM)
    model = HierTCN(HierTCNConfig(item_dim=DIM, terms=FEATURES) if with_terms else network)
    exported = parts / "onnx"
    export_serving_models(
        TcnCone(model).eval(),
        GruStep(model).eval(),
        model.start_state.detach().numpy(),
        exported,
        item_dim=DIM,
        terms=model.terms,
    )
    IdIndex.build(item_ids(items), parts / "item_index")
    table = ItemTable.write(parts / "item_table", _vectors(rng, items))
    build_neighbor_index(table, parts / "neighbor_index")
    np.save(parts / "popularity.npy", rng.exponential(size=items).astype(np.float32))
    _write_states(parts / "user_states", rng, items, users, watermark_us)
    _live_counts(rng, items, watermark_us).save(parts / "user_states" / LIVE_COUNTS)
    if with_terms:
        _transitions(rng, items).save(parts / "user_states" / TRANSITIONS)
    repository = ReleaseRepository(root)
    number = publish(
        repository,
        {
            **{
                name: parts / name
                for name in (
                    "item_index",
                    "item_table",
                    "neighbor_index",
                    "popularity.npy",
                    "user_states",
                )
            },
            "start_state.npy": exported / "start_state.npy",
            **({TERMS_FILE: exported / TERMS_FILE} if with_terms else {}),
        },
        {name: exported / name / "model.onnx" for name in (TCN, GRU_STEP)},
        ReleaseInput(data_date=date),
    )
    repository.activate(number)
    return number


def _vectors(rng: np.random.Generator, items: int) -> NDArray[np.float32]:
    # Vectors without clusters are no catalogue: no index could search them.
    tastes = rng.normal(size=(max(1, items // _ITEMS_PER_TASTE), DIM)).astype(np.float32)
    vectors = tastes[rng.integers(len(tastes), size=items)]
    vectors += rng.normal(scale=0.5, size=vectors.shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def _write_states(
    directory: Path, rng: np.random.Generator, items: int, users: int, watermark_us: int
) -> None:
    layers, hidden = HierTCNConfig.paper(DIM).gru_layers, HierTCNConfig.paper(DIM).hidden
    session = np.arange(_HISTORY) // _SESSION
    days_us = (session - session[-1] - 1) * 86_400_000_000
    ages_us = days_us + (np.arange(_HISTORY) % _SESSION) * 60_000_000
    with new_snapshot(
        directory,
        users=user_ids(users),
        state_shape=(layers, hidden),
        dtype=np.float32,
        history_offsets=np.arange(users + 1, dtype=np.int64) * _HISTORY,
        watermark_us=watermark_us,
        gap_us=GAP_US,
    ) as stored:
        for first in range(0, users, _USERS_PER_CHUNK):
            count = min(_USERS_PER_CHUNK, users - first)
            chunk = slice(first, first + count)
            states = rng.random((count, layers, hidden), np.float32)
            stored.states[chunk] = states - np.float32(0.5)
            stored.folded_until_us[chunk] = watermark_us + ages_us[-1]
            places = slice(first * _HISTORY, (first + count) * _HISTORY)
            stored.history_item_rows[places] = rng.integers(items, size=count * _HISTORY)
            stored.history_timestamps_us[places] = np.tile(watermark_us + ages_us, count)


def _live_counts(rng: np.random.Generator, items: int, watermark_us: int) -> MinuteCounts:
    newest = watermark_us // MINUTE_US
    per_minute = min(items, 300)
    minutes = np.repeat(np.arange(newest - 360, newest), per_minute)
    rows = np.concatenate(
        [np.sort(rng.choice(items, per_minute, replace=False)) for _ in range(360)]
    )
    return MinuteCounts(
        minutes=minutes,
        item_rows=rows.astype(np.int32),
        counts=np.ones(len(rows), np.int32),
        watermark_us=watermark_us,
    )


def _transitions(rng: np.random.Generator, items: int) -> TransitionTable:
    followers = rng.integers(items, size=(items, _FOLLOWERS)).astype(np.int32)
    weights = (1.0 / np.arange(1, _FOLLOWERS + 1)).astype(np.float32)
    return TransitionTable(
        options=TransitionOptions(most=_FOLLOWERS),
        offsets=np.arange(items + 1, dtype=np.int64) * _FOLLOWERS,
        followers=followers.reshape(-1),
        weights=np.tile(weights, items),
        totals=np.full(items, weights.sum(), np.float32),
    )
