"""All chosen columns of an items file as one row of floats per item, fitted once, kept in files.

    encoding.json           the columns in order, their kinds and settings
    encoding.safetensors    their arrays

A fitted encoding is what makes features of different days comparable: an encoder that is trained
further, or that embeds an item that came after it was trained, must see the same columns.
A column of vectors or numbers that some item lacks, while it has others, gets one more feature,
``<column>:missing``, because the zeros in its place would read as the average.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.files import read_json
from hiertcn.items.column_choice import ColumnKind
from hiertcn.items.column_encodings import (
    ColumnEncoding,
    ColumnFitter,
    NumberEncoding,
    NumberFitter,
    VectorEncoding,
    VectorFitter,
)
from hiertcn.items.hashed_encodings import CategoryEncoding, HashedFitter, TagsEncoding
from hiertcn.items.items_file import ItemsFile
from hiertcn.items.text_encoding import TextEncoding, TextFitter

SETTINGS_FILE: Final = "encoding.json"
ARRAYS_FILE: Final = "encoding.safetensors"

_FORMAT: Final = 1
_KINDS: Final[dict[str, Any]] = {
    encoding.kind: encoding
    for encoding in (VectorEncoding, NumberEncoding, CategoryEncoding, TagsEncoding, TextEncoding)
}


@dataclass(frozen=True, kw_only=True)
class FeatureEncoding:
    """Fitted columns in order, and which of them have a feature that says "missing"."""

    columns: tuple[ColumnEncoding, ...]
    with_missing: frozenset[str]

    @property
    def width(self) -> int:
        """Number of features."""
        return sum(column.width for column in self.columns) + len(self.with_missing)

    def feature_names(self) -> list[str]:
        """Return one name per feature."""
        names: list[str] = []
        for column in self.columns:
            names += column.feature_names()
            if column.column in self.with_missing:
                names.append(f"{column.column}:missing")
        return names

    def encode(
        self, batch: pa.RecordBatch, ids: pa.Array
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return the features of n items, float32 [n, width], and which have any, bool [n].

        Args:
            batch: n items with at least the encoded columns.
            ids: the n items' ids, for messages.

        Raises:
            InputError: a value cannot be encoded; the item and the column are named.
        """
        values = np.zeros((len(ids), self.width), np.float32)
        present = np.zeros(len(ids), np.bool_)
        missing: list[tuple[int, NDArray[np.bool_]]] = []
        start = 0
        for column in self.columns:
            block, known = column.encode(batch.column(column.column), ids)
            values[known, start : start + column.width] = block
            present |= known
            start += column.width
            if column.column in self.with_missing:
                missing.append((start, ~known))
                start += 1
        for place, lacking in missing:
            values[lacking & present, place] = 1
        return values, present

    def check(self, schema: pa.Schema, path: Path) -> None:
        """Refuse an items file that lacks a column of this encoding.

        Raises:
            InputError: the columns that are missing.
        """
        missing = [c.column for c in self.columns if c.column not in schema.names]
        if missing:
            raise InputError(
                f"the items file {path} lacks {', '.join(missing)}, which the earlier encoding "
                "has; add them, or fit a new encoding without the earlier one"
            )

    def save(self, directory: Path) -> None:
        """Write the encoding into a folder."""
        settings = {
            "format": _FORMAT,
            "columns": [
                {
                    "column": column.column,
                    "kind": column.kind,
                    "missing": column.column in self.with_missing,
                    "settings": column.settings(),
                }
                for column in self.columns
            ],
        }
        text = json.dumps(settings, indent=1, ensure_ascii=False)
        (directory / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
        save_file(
            {
                f"{place}.{name}": np.ascontiguousarray(array)
                for place, column in enumerate(self.columns)
                for name, array in column.arrays().items()
            },
            directory / ARRAYS_FILE,
        )

    @classmethod
    def open(cls, directory: Path) -> "FeatureEncoding":
        """Read an encoding.

        Raises:
            InputError: a file is missing, corrupt or of another format.
        """
        settings = read_json(directory / SETTINGS_FILE)
        if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
            raise InputError(
                f"{directory / SETTINGS_FILE} does not describe a feature encoding of format "
                f"{_FORMAT}; encode the features again with this version"
            )
        try:
            arrays = load_file(directory / ARRAYS_FILE)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{directory / ARRAYS_FILE} cannot be read ({error}); encode the features again"
            ) from error
        columns = tuple(
            _KINDS[entry["kind"]](
                column=entry["column"],
                **entry["settings"],
                **_arrays_of(arrays, place),
            )
            for place, entry in enumerate(settings["columns"])
        )
        with_missing = frozenset(e["column"] for e in settings["columns"] if e["missing"])
        return cls(columns=columns, with_missing=with_missing)


def fit_encoding(
    items: ItemsFile,
    kinds: Mapping[str, ColumnKind],
    *,
    expected_items: int,
    text_dim: int,
    category_buckets: int,
    vector_dim: int,
    seed: int,
) -> FeatureEncoding:
    """Fit an encoding in one pass over the items; columns without any value are left out.

    Args:
        items: the file, as the index sees it.
        kinds: the columns and how to encode each.
        expected_items: about how many items there are; large columns are sampled by it.
        text_dim: features of a text column.
        category_buckets: features of a category or tags column.
        vector_dim: most features of a vector column; 0 keeps vectors whole.
        seed: of samples and of the SVDs.

    Raises:
        InputError: a value cannot be encoded; the item and the column are named.
    """

    def fitter(column: str, kind: ColumnKind) -> ColumnFitter:
        match kind:
            case "vector":
                return VectorFitter(
                    column=column, dim=vector_dim, seed=seed, expected_items=expected_items
                )
            case "text":
                return TextFitter(
                    column=column, dim=text_dim, seed=seed, expected_items=expected_items
                )
            case "number":
                return NumberFitter(column=column)
            case "category":
                return HashedFitter(
                    encoding=CategoryEncoding(column=column, buckets=category_buckets)
                )
            case "tags":
                return HashedFitter(encoding=TagsEncoding(column=column, buckets=category_buckets))

    fitters = {column: fitter(column, kind) for column, kind in kinds.items()}
    lacking: set[str] = set()
    batches = items.batches(list(kinds))
    with tqdm(
        total=items.count, desc="fitting features", unit="item", mininterval=2, delay=2
    ) as progress:
        for rows, ids, batch in batches:
            for column, fit in fitters.items():
                fit.observe(batch.column(column), ids)
                if batch.column(column).null_count:
                    lacking.add(column)
            progress.update(len(rows))
    columns = tuple(fitted for fit in fitters.values() if (fitted := fit.finish()) is not None)
    with_missing = frozenset(
        column.column
        for column in columns
        if len(columns) > 1 and column.kind in ("vector", "number") and column.column in lacking
    )
    return FeatureEncoding(columns=columns, with_missing=with_missing)


def _arrays_of(arrays: Mapping[str, NDArray[Any]], place: int) -> dict[str, NDArray[Any]]:
    prefix = f"{place}."
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
