"""Encode one column of an items file as a block of floats; here vectors and numbers.

Every block is scaled so that its values have a root mean square of about 1 over the items that
have one: no column drowns another before the network has seen either. What an item lacks is
reported, never encoded as some value.

    vector    each coordinate standardised; on request, the wider ones reduced by a truncated SVD
    number    standardised; booleans as 0 and 1
    others    see :mod:`hashed_encodings` and :mod:`text_encoding`

Fitting takes one pass that keeps moments only, and about 20,000 sampled vectors if there is an SVD.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.items.column_choice import ColumnKind

Block = NDArray[np.float32]
Known = NDArray[np.bool_]

_SVD_SAMPLE: Final = 20_000
# A spread below this share of a coordinate's size is rounding, and would be blown up to 1.
_CONSTANT: Final = 1e-6
# Larger numbers, and the inverse of smaller spreads, would overflow in float32.
_LARGEST: Final = 1e30


class ColumnEncoding(Protocol):
    """A fitted column: deterministic, and the same for an item whatever its batch."""

    kind: ClassVar[ColumnKind]

    @property
    def column(self) -> str:
        """Name of the column."""

    @property
    def width(self) -> int:
        """Number of features of the block."""

    def feature_names(self) -> list[str]:
        """Return one name per feature."""

    def encode(self, values: pa.Array, ids: pa.Array) -> tuple[Block, Known]:
        """Return float32 [known, width] of the items that have a value, and which do, bool [n].

        Args:
            values: the column of n items.
            ids: the n items' ids, for messages.

        Raises:
            InputError: a value cannot be encoded; the item and the column are named.
        """

    def settings(self) -> dict[str, Any]:
        """Return what JSON can hold of the encoding."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays of the encoding."""


class ColumnFitter(Protocol):
    """Learns an encoding from batches of a column."""

    def observe(self, values: pa.Array, ids: pa.Array) -> None:
        """Take in the column of some items.

        Raises:
            InputError: a value cannot be encoded; the item and the column are named.
        """

    def finish(self) -> ColumnEncoding | None:
        """Return the encoding, or None if no item had a value."""


@dataclass(frozen=True, kw_only=True)
class VectorEncoding:
    """Standardised lists of numbers of one length, reduced to ``components`` if there are any."""

    kind: ClassVar[ColumnKind] = "vector"
    column: str
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    components: NDArray[np.float32] | None = None

    @property
    def width(self) -> int:
        """Length of the lists, or number of components."""
        return len(self.mean) if self.components is None else len(self.components)

    def feature_names(self) -> list[str]:
        """Return ``column[0]`` and so on, or ``column:svd[0]``."""
        prefix = self.column if self.components is None else f"{self.column}:svd"
        return [f"{prefix}[{k}]" for k in range(self.width)]

    def encode(self, values: pa.Array, ids: pa.Array) -> tuple[Block, Known]:
        """See :class:`ColumnEncoding`."""
        vectors, known = _vectors(values, ids, self.column, len(self.mean))
        block = (vectors - self.mean) * self.scale
        if self.components is not None:
            block = block @ self.components.T
        return block.astype(np.float32, copy=False), known

    def settings(self) -> dict[str, Any]:
        """See :class:`ColumnEncoding`."""
        return {}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See :class:`ColumnEncoding`."""
        arrays: dict[str, NDArray[Any]] = {"mean": self.mean, "scale": self.scale}
        return arrays if self.components is None else {**arrays, "components": self.components}


@dataclass(kw_only=True)
class VectorFitter:
    """Fits a :class:`VectorEncoding`; ``dim`` above 0 reduces wider vectors to that many."""

    column: str
    dim: int
    seed: int
    expected_items: int
    _moments: "_Moments | None" = None
    _sample: list[NDArray[np.float32]] = field(default_factory=list)

    def observe(self, values: pa.Array, ids: pa.Array) -> None:
        """See :class:`ColumnFitter`."""
        width = None if self._moments is None else len(self._moments.mean)
        vectors, _ = _vectors(values, ids, self.column, width)
        if not len(vectors):
            return
        if self._moments is None:
            self._moments = _Moments(vectors.shape[1])
        self._moments.add(vectors)
        if 0 < self.dim < vectors.shape[1]:
            share = min(1.0, _SVD_SAMPLE / max(1, self.expected_items))
            random = np.random.default_rng([self.seed, self._moments.count])
            self._sample.append(vectors[random.random(len(vectors)) < share])

    def finish(self) -> VectorEncoding | None:
        """See :class:`ColumnFitter`."""
        if self._moments is None:
            return None
        mean, scale = (part.astype(np.float32) for part in self._moments.standardisation())
        components = None
        if self._sample:
            sample = (np.concatenate(self._sample) - mean) * scale
            components = _svd_components(sample, self.dim, self.seed)
        return VectorEncoding(column=self.column, mean=mean, scale=scale, components=components)


@dataclass(frozen=True, kw_only=True)
class NumberEncoding:
    """A standardised number or boolean."""

    kind: ClassVar[ColumnKind] = "number"
    column: str
    mean: float
    scale: float

    @property
    def width(self) -> int:
        """One."""
        return 1

    def feature_names(self) -> list[str]:
        """Return the column's own name."""
        return [self.column]

    def encode(self, values: pa.Array, ids: pa.Array) -> tuple[Block, Known]:
        """See :class:`ColumnEncoding`."""
        numbers, known = _numbers(values, ids, self.column)
        return ((numbers - self.mean) * self.scale).astype(np.float32), known

    def settings(self) -> dict[str, Any]:
        """See :class:`ColumnEncoding`."""
        return {"mean": self.mean, "scale": self.scale}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See :class:`ColumnEncoding`."""
        return {}


@dataclass(kw_only=True)
class NumberFitter:
    """Fits a :class:`NumberEncoding`."""

    column: str
    _moments: "_Moments" = field(default_factory=lambda: _Moments(1))

    def observe(self, values: pa.Array, ids: pa.Array) -> None:
        """See :class:`ColumnFitter`."""
        numbers, _ = _numbers(values, ids, self.column)
        if len(numbers):
            self._moments.add(numbers)

    def finish(self) -> NumberEncoding | None:
        """See :class:`ColumnFitter`."""
        if not self._moments.count:
            return None
        mean, scale = self._moments.standardisation()
        return NumberEncoding(column=self.column, mean=float(mean[0]), scale=float(scale[0]))


class _Moments:
    """Mean and spread of columns in one pass (Chan, Golub and LeVeque 1979), in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = np.zeros(width)
        self._squares = np.zeros(width)

    def add(self, values: NDArray[np.floating[Any]]) -> None:
        more = len(values)
        mean = values.mean(axis=0, dtype=np.float64)
        squares = ((values - mean) ** 2).sum(axis=0, dtype=np.float64)
        step = mean - self.mean
        total = self.count + more
        self._squares += squares + step**2 * (self.count * more / total)
        self.mean += step * (more / total)
        self.count = total

    def standardisation(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        spread = np.sqrt(self._squares / self.count)
        constant = spread <= np.maximum(_CONSTANT * np.abs(self.mean), 1 / _LARGEST)
        return self.mean, np.where(constant, 0.0, 1 / np.where(constant, 1.0, spread))


def _svd_components(sample: NDArray[np.float32], components: int, seed: int) -> NDArray[np.float32]:
    # Here, because importing scikit-learn takes seconds that readers of features need not wait.
    from sklearn.utils.extmath import randomized_svd

    found = min(components, *sample.shape)
    _, _, directions = randomized_svd(sample, found, n_iter=5, random_state=seed)
    projected = sample @ directions.T
    size = float(np.sqrt(np.mean(projected**2)))
    # Fewer sampled items than components: the rest stay zero, so that the width is as asked.
    padded = np.zeros((components, sample.shape[1]), np.float32)
    padded[:found] = directions / (size or 1.0)
    return padded


def _vectors(
    values: pa.Array, ids: pa.Array, column: str, width: int | None
) -> tuple[NDArray[np.float32], Known]:
    known: Known = np.asarray(values.is_valid())
    lists = values.drop_null()
    lengths = np.asarray(pc.list_value_length(lists))
    if not len(lengths):
        return np.empty((0, width or 0), np.float32), known
    expected = int(lengths[0]) if width is None else width
    if expected == 0:
        raise InputError(
            f"item {_name(ids, known, 0)} has an empty list in the column {column!r}; expected "
            "numbers, or null where an item has none"
        )
    wrong = np.flatnonzero(lengths != expected)
    if len(wrong):
        raise InputError(
            f"item {_name(ids, known, wrong[0])} has {lengths[wrong[0]]} numbers in the column "
            f"{column!r} where items before it have {expected}; lists of one column must have one "
            "length, with null for an item that has none"
        )
    flat = pc.list_flatten(lists)
    missing = np.asarray(flat.is_null()).reshape(-1, expected).any(axis=1)
    if missing.any():
        _refuse_value("null", _name(ids, known, missing.argmax()), column)
    # Through numpy: Arrow casts no half floats.
    vectors = flat.to_numpy(zero_copy_only=False).reshape(-1, expected)
    _refuse_out_of_range(vectors, ids, known, column)
    return vectors.astype(np.float32), known


def _numbers(values: pa.Array, ids: pa.Array, column: str) -> tuple[NDArray[np.float64], Known]:
    known: Known = np.asarray(values.is_valid())
    numbers = values.drop_null()
    if pa.types.is_boolean(numbers.type):
        numbers = numbers.cast(pa.uint8())
    elif pa.types.is_decimal(numbers.type):
        numbers = numbers.cast(pa.float64())
    found = numbers.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, 1)
    _refuse_out_of_range(found, ids, known, column)
    return found, known


def _refuse_out_of_range(
    values: NDArray[np.floating[Any]], ids: pa.Array, known: Known, column: str
) -> None:
    # As float64, lest the bound be rounded to a half.
    bad = ~(np.abs(values) <= np.float64(_LARGEST))
    if bad.any():
        where = int(bad.any(axis=1).argmax())
        _refuse_value(str(values[where][bad[where]][0]), _name(ids, known, where), column)


def _refuse_value(value: str, item: str, column: str) -> None:
    raise InputError(
        f"item {item} has the value {value} in the column {column!r}; expected numbers from "
        f"{-_LARGEST:g} to {_LARGEST:g}, so write null for the whole cell where an item has none"
    )


def _name(ids: pa.Array, known: Known, position: Any) -> str:
    return repr(ids[int(np.flatnonzero(known)[int(position)])].as_py())
