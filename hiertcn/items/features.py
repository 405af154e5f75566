"""Encode what an items file says of the items as a matrix of floats aligned to the item index.

A feature matrix is a folder:

    values.npy              float32 [items, features], memory-mapped, zero where not present
    present.npy             bool [items]: whether the item has any feature
    header.json             feature names, columns taken and why others were not
    encoding.json, encoding.safetensors    the fitted encoding, see :mod:`feature_encoding`

The file is read twice, 4096 items at a time, so memory does not grow with it but for sampled texts
and vectors. Which columns are taken by default, and why numbers, booleans and times are not, is
told in :mod:`column_choice`. No items file, or none with a usable column, gives a matrix of no
features in which no item is present.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from hiertcn.errors import InputError
from hiertcn.events.columns import ITEM_ID
from hiertcn.files import read_json, whole_directory
from hiertcn.items.column_choice import VALUES_EXAMINED, ColumnChoice, choose_columns, is_text
from hiertcn.items.feature_encoding import FeatureEncoding, fit_encoding
from hiertcn.items.hashed_encodings import not_blank, plain_texts
from hiertcn.items.index import IdIndex
from hiertcn.items.items_file import ItemsFile

HEADER_FILE: Final = "header.json"
VALUES_FILE: Final = "values.npy"
PRESENT_FILE: Final = "present.npy"

_log = logging.getLogger(__name__)

_FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What to make features of.

    Attributes:
        columns: item columns to use; empty uses every usable one (see :mod:`column_choice`).
        text_columns: columns to encode as text, taken also if not in ``columns``.
        category_columns: columns to encode as categories, taken also if not in ``columns``.
        text_dim: features of a text column, at least 1.
        category_buckets: features of a category or tags column, at least 2.
        vector_dim: most features of a vector column, reduced by a truncated SVD; 0 keeps vectors
            as long as they are given.
        seed: of samples and of the SVDs, 0 or more.

    Raises:
        InputError: a value is out of range, or a column is both text and category.
    """

    columns: tuple[str, ...] = ()
    text_columns: tuple[str, ...] = ()
    category_columns: tuple[str, ...] = ()
    text_dim: int = 64
    category_buckets: int = 64
    vector_dim: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("text_dim", 1),
            ("category_buckets", 2),
            ("vector_dim", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}; expected an integer of at least {least}")
        for name in ("columns", "text_columns", "category_columns"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(column, str) for column in value):
                raise InputError(f"{name} is {value!r}; expected a list of column names")
        both = sorted(set(self.text_columns) & set(self.category_columns))
        if both:
            raise InputError(
                f"{', '.join(both)} is in both text_columns and category_columns; choose one"
            )

    @property
    def named(self) -> tuple[str, ...]:
        """All columns that are named in any of the options."""
        return (*self.columns, *self.text_columns, *self.category_columns)


@dataclass(frozen=True, kw_only=True)
class FeatureMatrix:
    """Features of all items; see :meth:`open`.

    Attributes:
        directory: the folder it was opened from.
        values: float32 [items, features], mapped and read-only; zero where not ``present``.
        present: bool [items]; false means the item has no features, and its values must be masked.
        names: one name per feature.
        columns: the columns encoded and the kind of each.
        skipped: the columns not used and why.
    """

    directory: Path
    values: NDArray[np.float32]
    present: NDArray[np.bool_]
    names: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path) -> "FeatureMatrix":
        """Map a feature matrix; constant time at any size.

        Raises:
            InputError: a file is missing, truncated, or of another format.
        """
        directory = Path(directory)
        header = read_json(directory / HEADER_FILE)
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise InputError(
                f"{directory / HEADER_FILE} does not describe features of format {_FORMAT}; encode "
                "the features again with this version"
            )
        try:
            values, present = (
                np.load(directory / name, mmap_mode="r", allow_pickle=False)
                for name in (VALUES_FILE, PRESENT_FILE)
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"the features at {directory} cannot be mapped ({error}); encode them again"
            ) from error
        expected = (header["items"], len(header["names"]))
        if values.shape != expected or present.shape != expected[:1]:
            raise InputError(
                f"the features at {directory} have the shape {list(values.shape)} but "
                f"{HEADER_FILE} says {list(expected)}; encode them again"
            )
        return cls(
            directory=directory,
            values=values,
            present=present,
            names=tuple(header["names"]),
            columns=header["columns"],
            skipped=header["skipped"],
        )

    def encoding(self) -> FeatureEncoding:
        """Read the fitted encoding, which makes the same features of items that came later.

        Raises:
            InputError: its files are missing or corrupt.
        """
        return FeatureEncoding.open(self.directory)


def encode_features(
    items: Path | None,
    index: IdIndex,
    output: Path,
    options: FeatureOptions | None = None,
    *,
    previous: FeatureMatrix | None = None,
) -> FeatureMatrix:
    """Write the features of every indexed item, whole or not at all, and open them.

    Items that the file lacks, or that have no value in any column taken, are not present.

    Args:
        items: parquet file or folder of parquet files with ``item_id`` and any other columns, one
            row per item (the first counts); None if there is none.
        index: the item index; row r of the matrix is its row r.
        output: folder to write.
        options: what to make features of; the defaults if None.
        previous: features whose fitted encoding to use instead of fitting one, so that an encoder
            trained on them can go on; ``options`` must then be those of the earlier ones.

    Raises:
        InputError: the file cannot be read or has none of the indexed items, a column named does
            not exist or cannot be a feature, lists of one column differ in length, or a number is
            NaN or infinite; the item and the column are named.
    """
    options = options or FeatureOptions()
    output = Path(output)
    file = None if items is None else ItemsFile(Path(items), index)
    if file is not None and file.count == 0:
        _log.warning("the items file %s is empty; no item has features", items)
        file = None
    encoding, skipped = _encoding(file, index, options, previous)
    with whole_directory(output) as aside:
        present = _write_values(aside, file, index, encoding)
        encoding.save(aside)
        header = {
            "format": _FORMAT,
            "items": len(index),
            "present": int(present.sum()),
            "names": encoding.feature_names(),
            "columns": {column.column: column.kind for column in encoding.columns},
            "skipped": skipped,
            "options": asdict(options),
        }
        (aside / HEADER_FILE).write_text(json.dumps(header, indent=1) + "\n")
    _log.info(
        "wrote %d features of %d of %d items to %s (columns: %s)",
        encoding.width,
        int(present.sum()),
        len(index),
        output,
        ", ".join(f"{c.column} as {c.kind}" for c in encoding.columns) or "none",
    )
    return FeatureMatrix.open(output)


def _encoding(
    file: ItemsFile | None,
    index: IdIndex,
    options: FeatureOptions,
    previous: FeatureMatrix | None,
) -> tuple[FeatureEncoding, dict[str, str]]:
    if previous is not None:
        _refuse_other_options(previous, options)
        encoding = previous.encoding()
        if file is not None:
            encoding.check(file.schema, file.path)
        return encoding, dict(previous.skipped)
    if file is None:
        if options.named:
            raise InputError(
                f"feature columns are named ({', '.join(options.named)}) but there are no items to "
                "take them from; give an items file, or name no columns"
            )
        return FeatureEncoding(columns=(), with_missing=frozenset()), {}
    choice = _choose(file, options)
    encoding = fit_encoding(
        file,
        choice.kinds,
        expected_items=min(len(index), file.count),
        text_dim=options.text_dim,
        category_buckets=options.category_buckets,
        vector_dim=options.vector_dim,
        seed=options.seed,
    )
    skipped = dict(choice.skipped)
    fitted = {column.column for column in encoding.columns}
    for column in choice.kinds:
        if column in fitted:
            continue
        if column in options.named:
            raise InputError(
                f"the item column {column!r} has no value for any indexed item; fill it or leave "
                "it out"
            )
        skipped[column] = "has no values"
    return encoding, skipped


def _refuse_other_options(previous: FeatureMatrix, options: FeatureOptions) -> None:
    before = read_json(previous.directory / HEADER_FILE)["options"]
    now = json.loads(json.dumps(asdict(options)))
    changed = sorted(name for name in now if before.get(name) != now[name])
    if changed:
        raise InputError(
            f"the feature options {', '.join(changed)} differ from those of the earlier features "
            f"at {previous.directory}; use the same, or fit a new encoding without the earlier one"
        )


def _choose(file: ItemsFile, options: FeatureOptions) -> ColumnChoice:
    text_columns = [f.name for f in file.schema if is_text(f.type) and f.name != ITEM_ID]
    texts: dict[str, list[str]] = {column: [] for column in text_columns}
    examined = matched = 0
    for rows, _, batch in file.batches(text_columns):
        matched += len(rows)
        for column in text_columns:
            values = plain_texts(batch.column(column))
            texts[column] += values.filter(pa.array(not_blank(values))).to_pylist()
        examined += len(rows)
        if examined >= VALUES_EXAMINED:
            break
    if not matched:
        raise InputError(
            f"none of the {file.count} items of {file.path} is in the item index; the ids of the "
            "items file and of the event log must be written alike"
        )
    return choose_columns(
        file.schema,
        texts,
        named=options.columns,
        text_columns=options.text_columns,
        category_columns=options.category_columns,
    )


def _write_values(
    directory: Path, file: ItemsFile | None, index: IdIndex, encoding: FeatureEncoding
) -> NDArray[np.bool_]:
    present = np.zeros(len(index), np.bool_)
    shape = (len(index), encoding.width)
    if 0 in shape:
        np.save(directory / VALUES_FILE, np.zeros(shape, np.float32))
    else:
        # Not filled: a new file reads as zeros, which is what items that are not present need.
        values: Any = np.lib.format.open_memmap(
            directory / VALUES_FILE, mode="w+", dtype=np.float32, shape=shape
        )
        if file is not None:
            columns = [column.column for column in encoding.columns]
            with tqdm(
                total=file.count, desc="encoding features", unit="item", mininterval=2, delay=2
            ) as progress:
                for rows, ids, batch in file.batches(columns):
                    values[rows], present[rows] = encoding.encode(batch, ids)
                    progress.update(len(rows))
        values.flush()
    np.save(directory / PRESENT_FILE, present)
    return present
