"""A small item encoder in toy releases, and the offline arithmetic that serving is held against."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from hiertcn.export.onnx import export_model
from hiertcn.export.tensors import INPUTS, ITEM_ENCODER, NEIGHBOR_LAYERS, NEIGHBOR_WEIGHTS, OUTPUTS
from hiertcn.graph.walks import NO_ITEM, Neighborhoods, WalkOptions
from hiertcn.items.features import FeatureMatrix, FeatureOptions, encode_features
from hiertcn.items.index import IdIndex
from hiertcn.items.table import ItemTable
from hiertcn.serving.client import NewItem
from hiertcn.training.item_inference import embed_items
from models.graphsage import GraphSAGE, GraphSAGEConfig
from models.item_encoder_serving import NewItemEncoder

ITEMS, HIDDEN, TOP = 50, 6, 4
OPTIONS = FeatureOptions(
    columns=("title", "color", "image", "price"),
    text_columns=("title",),
    text_dim=4,
    category_buckets=4,
)
WORDS = ("red", "green", "warm", "cold", "shoe", "hat", "coat", "light")
COLORS = ("black", "white", "blue")


def random_row(rng: np.random.Generator, item_id: str) -> dict:
    """A row of the catalogue; some of its columns are missing."""
    has = rng.random(4) < 0.8
    return {
        "item_id": item_id,
        "title": " ".join(rng.choice(WORDS, 3)) if has[0] else None,
        "color": str(rng.choice(COLORS)) if has[1] else None,
        "image": rng.normal(size=3).tolist() if has[2] else None,
        "price": float(rng.integers(1, 9)) if has[3] else None,
    }


def write_items(path: Path, rows: list[dict]) -> Path:
    """Write rows of the catalogue as parquet."""
    schema = pa.schema(
        [
            ("item_id", pa.string()),
            ("title", pa.string()),
            ("color", pa.string()),
            ("image", pa.list_(pa.float32())),
            ("price", pa.float64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


@dataclass
class Encoder:
    """The trained encoder, its exported file, and the offline vectors of new items by release."""

    module: GraphSAGE
    file: Path
    folder: Path

    def extend(self, number: int, rows: list[dict]) -> Callable[[Path], dict[str, Path]]:
        """Adds to a toy's parts what its item encoder needs."""

        def add(parts: Path) -> dict[str, Path]:
            items_file = write_items(parts.with_name(f"items-{number}.parquet"), rows)
            index = IdIndex.open(parts / "item_index")
            matrix = encode_features(items_file, index, parts / "item_features", OPTIONS)
            neighborhoods = _neighborhoods(np.random.default_rng(number), len(index))
            layers = np.empty((len(index), self.module.layers * HIDDEN), np.float32)
            embed_items(self.module, matrix, neighborhoods, layer_inputs=layers, progress=False)
            ItemTable.write(parts / "item_layers", layers, "float32")
            return {ITEM_ENCODER: self.file}

        return add

    def offline(self, number: int, parts: Path, new: tuple[NewItem, ...]) -> np.ndarray:
        """Vectors of new items by layer-wise inference on a graph that holds them."""
        index = IdIndex.open(parts / "item_index")
        matrix = encode_features(
            write_items(
                self.folder / "with-new.parquet",
                [
                    *pq.ParquetFile(parts.with_name(f"items-{number}.parquet")).read().to_pylist(),
                    *(
                        {"item_id": item.item_id, **_row_of(item)}
                        for item in new
                        if item.item_id not in index.id_array.to_pylist()
                    ),
                ],
            ),
            IdIndex.build([item.item_id for item in new], self.folder / "index", index),
            self.folder / "features",
            OPTIONS,
            previous=FeatureMatrix.open(parts / "item_features"),
        )
        released = _neighborhoods(np.random.default_rng(number), len(index))
        rows = np.full((len(index) + len(new), TOP), NO_ITEM, np.int32)
        weights = np.zeros(rows.shape, np.float32)
        rows[: len(index)], weights[: len(index)] = released.rows, released.weights
        for place, item in enumerate(new, start=len(index)):
            found = index.rows(item.neighbors) if item.neighbors else np.empty(0, np.int64)
            given = np.array(item.neighbor_weights or [1.0] * len(found), np.float32)
            known = found >= 0
            count = int(known.sum())
            rows[place, :count] = found[known]
            weights[place, :count] = given[known] / max(given[known].sum(), 1e-9)
        both = Neighborhoods(rows, weights, WalkOptions(top=TOP))
        vectors = embed_items(self.module, matrix, both, progress=False)[len(index) :]
        logs = np.log1p(np.load(parts / "popularity.npy").astype(np.float64))
        prior = -logs.mean() * 0.25 / logs.std()
        return np.column_stack([vectors, np.full(len(new), prior, np.float32)])


def exported_encoder(folder: Path) -> Encoder:
    """Exported once: two releases of one encoder still differ in encoding, neighbors and prior."""
    torch.manual_seed(3)
    # Vectors of 3 and text of 4, category of 4, a number, and what says that the first and the
    # last are missing.
    config = GraphSAGEConfig(items=ITEMS, feature_dim=14, dim=4, hidden=HIDDEN)
    module = GraphSAGE(config).eval()
    serving = NewItemEncoder(module).eval()
    path = folder / ITEM_ENCODER / "model.onnx"
    example = (
        torch.randn(2, 14),
        torch.ones(2, 1, dtype=torch.int32),
        torch.randn(2, 3, 2 * HIDDEN),
        torch.rand(2, 3),
    )
    export_model(
        serving,
        example,
        INPUTS[ITEM_ENCODER],
        OUTPUTS[ITEM_ENCODER],
        path,
        dynamic_axes={NEIGHBOR_LAYERS.name: (1,), NEIGHBOR_WEIGHTS.name: (1,)},
    )
    return Encoder(module, path, folder)


class Expected:
    """What a release scores, with new items behind its own."""

    def __init__(self, toys, encoder: Encoder, number: int, new: tuple[NewItem, ...]) -> None:
        self.toy = toys.toys[number]
        parts = toys.root.with_name(f"parts-{number}")
        self.ids = [*self.toy.item_ids, *(item.item_id for item in new)]
        self.vectors = np.vstack([self.toy.vectors, encoder.offline(number, parts, new)])

    def state(self, *sessions: tuple[str, ...]) -> np.ndarray:
        state = self.toy.start_state
        for session in sessions:
            mean = self.vectors[[self.ids.index(one) for one in session]].mean(axis=0)
            state = np.tanh(state / 2 + mean @ self.toy.mixing)
        return state

    def scores(self, open_session: tuple[str, ...], *closed: tuple[str, ...]) -> dict[str, float]:
        user = self.state(*closed)[-1] @ self.toy.readout
        for one in open_session:
            user = user + self.vectors[self.ids.index(one)]
        return dict(zip(self.ids, (self.vectors @ user).tolist(), strict=True))


def _neighborhoods(rng: np.random.Generator, items: int) -> Neighborhoods:
    rows = np.full((items, TOP), NO_ITEM, np.int32)
    weights = np.zeros((items, TOP), np.float32)
    for item in range(items):
        count = item % (TOP + 1)
        rows[item, :count] = rng.choice(ITEMS, count, replace=False)
        weights[item, :count] = 1 / max(count, 1)
    return Neighborhoods(rows, weights, WalkOptions(top=TOP))


def _row_of(item: NewItem) -> dict:
    columns = ("title", "color", "image", "price")
    return {column: item.attributes.get(column) for column in columns}
