"""Hold the parts of a release against each other before they may become one.

Opens every part that serving needs and runs both models once on the shapes that the others give,
so parts of two different runs are refused here and not by the first request. Costs tens of
milliseconds at any size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hiertcn.errors import InputError, ReleaseError
from hiertcn.export.session import open_session
from hiertcn.export.tensors import (
    FEATURES,
    FEATURES_PRESENT,
    GRU_STEP,
    ITEM_EMBEDDING,
    ITEM_ENCODER,
    NEIGHBOR_LAYERS,
    NEIGHBOR_WEIGHTS,
    NEXT_STATE,
    SESSION_ITEMS,
    SESSION_LENGTH,
    SESSION_MEAN,
    STATE,
    TCN,
    USER_EMBEDDING,
    USER_STATE,
)
from hiertcn.export.term_gate import TERMS_FILE, TermGate
from hiertcn.files import read_json
from hiertcn.items.attributes import ITEM_ATTRIBUTES, ItemAttributes
from hiertcn.items.feature_encoding import FeatureEncoding
from hiertcn.items.index import IdIndex
from hiertcn.items.table import ItemTable
from hiertcn.sessions.live_transitions import START
from hiertcn.sessions.transitions import TransitionTable

SERVING_PARTS: Final = (
    "item_table",
    "item_index",
    "neighbor_index",
    "user_states",
    "popularity.npy",
    "start_state.npy",
)
"""What every release must bring, by its name in the release's folder."""

ITEM_LAYERS: Final = "item_layers"
"""Beside the model ``item_encoder``: what goes into each of its layers for each item."""
ITEM_FEATURES: Final = "item_features"
"""Also the fitted encoding of item attributes."""

_LIVE_COUNTS: Final = "live_counts"
_LIVE_TRANSITIONS: Final = "live_transitions"
_TRANSITIONS: Final = "transitions"


def read_settings(parts: Mapping[str, Path], models: Mapping[str, Path]) -> dict[str, Any]:
    """The settings that all parts share, read from the parts themselves.

    Args:
        parts: at least ``SERVING_PARTS``, by name.
        models: path of the ONNX file of each served model; ``item_encoder`` may be absent.

    Returns:
        ``items``, ``dim``, ``layers``, ``hidden``, ``users``, ``gap_us``, ``watermark_us``.

    Raises:
        ReleaseError: a part is missing or unreadable, or two parts contradict each other.
    """
    for name in SERVING_PARTS:
        if name not in parts or not parts[name].exists():
            raise ReleaseError(
                f"the release lacks {name} ({parts.get(name, 'not given')}); expected the parts "
                f"{', '.join(SERVING_PARTS)}: run the step that makes it"
            )
    for name in (TCN, GRU_STEP):
        if name not in models or not models[name].is_file():
            raise ReleaseError(
                f"the release lacks the model {name} ({models.get(name, 'not given')}); expected "
                "an ONNX file: run export_onnx"
            )
    try:
        return _settings(parts, models)
    except ReleaseError:
        raise
    except (InputError, OSError, ValueError, KeyError, TypeError) as error:
        raise ReleaseError(f"a part of the release cannot be read: {error}") from error


def _settings(parts: Mapping[str, Path], models: Mapping[str, Path]) -> dict[str, Any]:
    table, items = ItemTable.open(parts["item_table"]), IdIndex.open(parts["item_index"])
    states = read_json(parts["user_states"] / "snapshot.json")
    start_state = np.load(parts["start_state.npy"], allow_pickle=False)
    popularity = np.load(parts["popularity.npy"], mmap_mode="r", allow_pickle=False)
    _agree("rows of item_table", len(table), "ids of item_index", len(items))
    _agree("shape of popularity.npy", list(popularity.shape), "ids of item_index", [len(items)])
    shape = [states["layers"], states["hidden"]]
    _agree(
        "shape of start_state.npy", list(start_state.shape), "layers, hidden of user_states", shape
    )
    start = np.broadcast_to(start_state.astype(np.float32), (2, *start_state.shape))
    vectors = table.gather(np.zeros((2, 4), np.int64))
    _run(
        models[TCN],
        {
            SESSION_ITEMS.name: vectors,
            SESSION_LENGTH.name: np.array([[4], [0]], np.int32),
            USER_STATE.name: np.ascontiguousarray(start[:, -1]),
        },
        USER_EMBEDDING.name,
        [2, table.dim],
    )
    _run(
        models[GRU_STEP],
        {STATE.name: np.ascontiguousarray(start), SESSION_MEAN.name: vectors[:, 0]},
        NEXT_STATE.name,
        [2, *shape],
    )
    _check_counts(parts, table, int(states["watermark_us"]))
    if ITEM_ATTRIBUTES in parts:
        attributes = ItemAttributes.open(parts[ITEM_ATTRIBUTES])
        _agree("rows of item_attributes", len(attributes), "ids of item_index", len(items))
    if ITEM_ENCODER in models:
        _check_item_encoder(models[ITEM_ENCODER], parts, table)
    return {
        "items": len(items),
        "dim": table.dim,
        "layers": shape[0],
        "hidden": shape[1],
        "users": int(states["users"]),
        "gap_us": int(states["gap_us"]),
        "watermark_us": int(states["watermark_us"]),
    }


def _check_item_encoder(model: Path, parts: Mapping[str, Path], table: ItemTable) -> None:
    """Embed two items as the sidecar would, one of them without neighbors."""
    for name in (ITEM_FEATURES, ITEM_LAYERS):
        if name not in parts:
            raise ReleaseError(
                f"the release has the model {ITEM_ENCODER} but lacks {name}; run embed_items, or "
                "publish without the model"
            )
    encoding = FeatureEncoding.open(parts[ITEM_FEATURES])
    layers = ItemTable.open(parts[ITEM_LAYERS])
    _agree("rows of item_layers", len(layers), "rows of item_table", len(table))
    _run(
        model,
        {
            FEATURES.name: np.zeros((2, max(1, encoding.width)), np.float32),
            FEATURES_PRESENT.name: np.array([[bool(encoding.width)], [0]], np.int32),
            NEIGHBOR_LAYERS.name: layers.gather(np.zeros((2, 3), np.int64)),
            NEIGHBOR_WEIGHTS.name: np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]], np.float32),
        },
        ITEM_EMBEDDING.name,
        # The last coordinate of the table is the popularity prior.
        [2, table.dim - 1],
    )


def _check_counts(parts: Mapping[str, Path], table: ItemTable, watermark_us: int) -> None:
    """Hold live counts and scoring terms, where the release has them, against the catalogue."""
    live = parts["user_states"] / _LIVE_COUNTS
    if live.exists():
        counted_us = int(read_json(live / "header.json")["watermark_us"])
        _agree("watermark of live_counts", counted_us, "that of user_states", watermark_us)
        _check_rows(live / "item_rows.npy", table)
    followed = parts["user_states"] / _LIVE_TRANSITIONS
    if followed.exists():
        _check_rows(followed / "left_rows.npy", table, START)
        _check_rows(followed / "followed_rows.npy", table)
    if TERMS_FILE not in parts:
        return
    TermGate.open(parts[TERMS_FILE])
    transitions = TransitionTable.open(parts["user_states"] / _TRANSITIONS)
    _agree("items of transitions", len(transitions), "rows of item_table", len(table))
    followers = transitions.followers
    if len(followers) and not 0 <= int(followers.min()) <= int(followers.max()) < len(table):
        raise ReleaseError(
            f"the transitions of user_states name item row {int(followers.max())} but item_table "
            f"has {len(table)} rows; publish parts of one pipeline run"
        )


def _check_rows(file: Path, table: ItemTable, least: int = 0) -> None:
    rows = np.load(file, mmap_mode="r", allow_pickle=False)
    if len(rows) and not least <= int(rows.min()) <= int(rows.max()) < len(table):
        raise ReleaseError(
            f"{file} names item row {int(rows.max())} but item_table has {len(table)} rows; "
            "publish parts of one pipeline run"
        )


def _agree(name: str, value: object, other: str, expected: object) -> None:
    if value != expected:
        raise ReleaseError(
            f"the release does not fit together: {name} is {value} but {other} is {expected}; "
            "publish parts of one pipeline run"
        )


def _run(path: Path, inputs: dict[str, NDArray[Any]], output: str, expected: list[int]) -> None:
    session: ort.InferenceSession = open_session(path)
    try:
        (result,) = session.run([output], inputs)
    except Exception as error:
        # onnxruntime raises a dozen unrelated classes.
        shapes = {name: list(values.shape) for name, values in inputs.items()}
        raise ReleaseError(
            f"{path} does not run with the other parts' shapes {shapes} ({error}); publish parts "
            "of one pipeline run"
        ) from None
    _agree(f"output of {path}", list(result.shape), "what the other parts give", expected)
    if not np.isfinite(result).all():
        raise ReleaseError(f"{path} returns NaN or infinity; train the model again")
