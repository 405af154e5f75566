"""Encode categories and tags by hashing: nothing to fit, so a value's bucket never changes.

The bucket is XXH64 of the text modulo their number; two values may share one. Every item that has a
value gets a block of the same length, of root mean square 1.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hiertcn.items.column_choice import ColumnKind
from hiertcn.items.column_encodings import Block, Known
from hiertcn.items.hashing import xxh64


@dataclass(frozen=True, kw_only=True)
class CategoryEncoding:
    """One text of a small set, hashed to one of ``buckets`` features."""

    kind: ClassVar[ColumnKind] = "category"
    column: str
    buckets: int

    @property
    def width(self) -> int:
        """Number of buckets."""
        return self.buckets

    def feature_names(self) -> list[str]:
        """Return ``column:hash[0]`` and so on."""
        return [f"{self.column}:hash[{k}]" for k in range(self.buckets)]

    def encode(self, values: pa.Array, ids: pa.Array) -> tuple[Block, Known]:
        """See :class:`ColumnEncoding`; a blank text counts as no value."""
        texts = plain_texts(values)
        known = not_blank(texts)
        block = np.zeros((int(known.sum()), self.buckets), np.float32)
        bucket = _buckets(texts.filter(pa.array(known)), self.buckets)
        block[np.arange(len(block)), bucket] = np.sqrt(self.buckets)
        return block, known

    def settings(self) -> dict[str, Any]:
        """See :class:`ColumnEncoding`."""
        return {"buckets": self.buckets}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See :class:`ColumnEncoding`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class TagsEncoding:
    """Any number of texts of a small set, each hashed to one of ``buckets`` features."""

    kind: ClassVar[ColumnKind] = "tags"
    column: str
    buckets: int

    @property
    def width(self) -> int:
        """Number of buckets."""
        return self.buckets

    def feature_names(self) -> list[str]:
        """Return ``column:hash[0]`` and so on."""
        return [f"{self.column}:hash[{k}]" for k in range(self.buckets)]

    def encode(self, values: pa.Array, ids: pa.Array) -> tuple[Block, Known]:
        """See :class:`ColumnEncoding`; blank tags count as none, no tags as no value."""
        item_of_tag = np.asarray(pc.list_parent_indices(values))
        tags = plain_texts(pc.list_flatten(values))
        meant = not_blank(tags)
        item_of_tag = item_of_tag[meant]
        block = np.zeros((len(values), self.buckets), np.float32)
        np.add.at(block, (item_of_tag, _buckets(tags.filter(pa.array(meant)), self.buckets)), 1)
        known = np.zeros(len(values), np.bool_)
        known[item_of_tag] = True
        block = block[known]
        length = np.linalg.norm(block, axis=1, keepdims=True)
        return (block * np.sqrt(self.buckets) / length).astype(np.float32), known

    def settings(self) -> dict[str, Any]:
        """See :class:`ColumnEncoding`."""
        return {"buckets": self.buckets}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """See :class:`ColumnEncoding`."""
        return {}


@dataclass(kw_only=True)
class HashedFitter:
    """Passes a hashed encoding on, if any item has a value."""

    encoding: CategoryEncoding | TagsEncoding
    _any_known: bool = False

    def observe(self, values: pa.Array, ids: pa.Array) -> None:
        """See :class:`ColumnFitter`."""
        if not self._any_known:
            self._any_known = bool(self.encoding.encode(values, ids)[1].any())

    def finish(self) -> CategoryEncoding | TagsEncoding | None:
        """See :class:`ColumnFitter`."""
        return self.encoding if self._any_known else None


def plain_texts(values: pa.Array) -> pa.Array:
    """Return a text column, dictionary-encoded or not, as large_string."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(pa.large_string())


def not_blank(texts: pa.Array) -> Known:
    """Say which texts hold more than white space, bool [n]; nulls do not."""
    lengths = pc.utf8_length(pc.utf8_trim_whitespace(texts))
    known: Known = np.asarray(pc.fill_null(pc.greater(lengths, 0), False))
    return known


def _buckets(texts: pa.Array, buckets: int) -> NDArray[np.int64]:
    return (xxh64(texts) % np.uint64(buckets)).astype(np.int64)
