"""What the item encoder gets of a new item under one release: features and neighbors' layers.

Attributes become features by the release's own fitted encoding, so a new item's are comparable
with those the encoder was trained on. Of the neighbors only items of the release count; the rows
of ``item_layers`` are what went into each of the encoder's layers for them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.export.tensors import (
    FEATURES,
    FEATURES_PRESENT,
    NEIGHBOR_LAYERS,
    NEIGHBOR_WEIGHTS,
    TensorSpec,
)
from hiertcn.items.column_choice import ColumnKind
from hiertcn.items.column_encodings import ColumnEncoding, VectorEncoding
from hiertcn.items.feature_encoding import FeatureEncoding
from hiertcn.items.prior import unseen_prior
from hiertcn.items.table import ItemTable
from hiertcn.release.agreement import ITEM_FEATURES, ITEM_LAYERS
from hiertcn.serving.log.logged_items import Attribute, LoggedItem

_ARROW: Final[dict[ColumnKind, pa.DataType]] = {
    "vector": pa.list_(pa.float32()),
    "text": pa.large_string(),
    "category": pa.large_string(),
    "tags": pa.list_(pa.large_string()),
    "number": pa.float64(),
}
_EXPECTED: Final[dict[ColumnKind, str]] = {
    "text": "text",
    "category": "text",
    "tags": "texts",
    "number": "a number",
}


class NewItemEncoding:
    """How one release encodes new items; safe to share between threads.

    Attributes:
        prior: the popularity coordinate of an item that nobody interacted with.
    """

    def __init__(
        self, encoding: FeatureEncoding, layers: ItemTable, popularity: NDArray[np.float32]
    ) -> None:
        """Use :meth:`open`; this only holds the parts."""
        self._encoding = encoding
        self._layers = layers
        self.prior = unseen_prior(popularity)

    @classmethod
    def open(cls, release: Path, popularity: NDArray[np.float32]) -> "NewItemEncoding":
        """Open a release's parts.

        Raises:
            InputError: a part is missing or damaged.
        """
        return cls(
            FeatureEncoding.open(release / ITEM_FEATURES),
            ItemTable.open(release / ITEM_LAYERS),
            popularity,
        )

    def check(self, attributes: Mapping[str, Attribute], field: str) -> None:
        """Refuse attributes that the release encodes but not as what they are.

        Raises:
            InputError: an attribute is of another kind or length than its column; ``field`` and
                its name are given.
        """
        for column in self._encoding.columns:
            value = attributes.get(column.column)
            if value is not None and _fitting(value, column) is None:
                raise InputError(
                    f"{field}[{column.column!r}] is {_described(value)}; the serving release "
                    f"encodes this column as {column.kind}, so {_expected(column)} was expected"
                )

    def is_bare(self, item: LoggedItem) -> bool:
        """Whether the item has no attribute that the release encodes."""
        return all(
            _fitting(item.attributes.get(column.column), column) is None
            for column in self._encoding.columns
        )

    def encode(
        self,
        items: Sequence[LoggedItem],
        released_rows: Callable[[Sequence[str]], NDArray[np.int64]],
    ) -> tuple[tuple[TensorSpec, NDArray[Any]], ...]:
        """The model's inputs for some items; takes milliseconds for each hundred.

        Attributes that do not fit their column (of another release, say) count as missing.

        Args:
            items: at least one.
            released_rows: rows of ids in the release, -1 where it does not know one.
        """
        features = np.zeros((len(items), max(1, self._encoding.width)), np.float32)
        present = np.zeros(len(items), np.bool_)
        if self._encoding.columns:
            batch = pa.record_batch(
                {
                    column.column: pa.array(
                        [_fitting(item.attributes.get(column.column), column) for item in items],
                        _ARROW[column.kind],
                    )
                    for column in self._encoding.columns
                }
            )
            ids = pa.array([item.item_id for item in items], pa.large_string())
            features, present = self._encoding.encode(batch, ids)
        layers, weights = self._neighbors(items, released_rows)
        return (
            (FEATURES, features),
            (FEATURES_PRESENT, present.astype(np.int32)[:, None]),
            (NEIGHBOR_LAYERS, layers),
            (NEIGHBOR_WEIGHTS, weights),
        )

    def _neighbors(
        self,
        items: Sequence[LoggedItem],
        released_rows: Callable[[Sequence[str]], NDArray[np.int64]],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        most = max(1, *(len(item.neighbors) for item in items))
        rows = np.full((len(items), most), -1, np.int64)
        weights = np.zeros((len(items), most), np.float32)
        for place, item in enumerate(items):
            count = len(item.neighbors)
            if count:
                rows[place, :count] = released_rows(item.neighbors)
                weights[place, :count] = item.weights or 1.0
        weights[rows < 0] = 0.0
        total = weights.sum(axis=1, keepdims=True)
        weights /= np.where(total > 0, total, np.float32(1))
        return self._layers.gather(rows), weights


def _fitting(value: Attribute | None, column: ColumnEncoding) -> Any:
    """The value as its column's kind wants it, None if it is none of it."""
    match column.kind:
        case "vector":
            assert isinstance(column, VectorEncoding)
            fits = isinstance(value, np.ndarray) and len(value) == len(column.mean)
        case "number":
            fits = isinstance(value, float)
        case "tags":
            fits = isinstance(value, tuple)
        case _:
            fits = isinstance(value, str)
    return value if fits else None


def _expected(column: ColumnEncoding) -> str:
    if isinstance(column, VectorEncoding):
        return f"a vector of {len(column.mean)} numbers"
    return _EXPECTED[column.kind]


def _described(value: Attribute) -> str:
    if isinstance(value, np.ndarray):
        return f"a vector of {len(value)} numbers"
    if isinstance(value, tuple):
        return f"{len(value)} texts"
    return "text" if isinstance(value, str) else "a number"
