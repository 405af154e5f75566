"""Decide which columns of an items file become features, and how each is encoded.

By default, "all usable columns" are those that describe the item itself:

    list of floats             vector
    list of text               tags
    text, mostly repeated      category
    text, mostly distinct      text, if of several words

and everything else is left out with a reason, because it may tell the future or mean nothing:
numbers and booleans (counts, prices and flags computed over the whole log leak what happened after
a training event), times and texts that look like dates, list of integers, and texts of one word
that hardly ever repeat (identifiers, URLs). A column that the user names is taken whatever the
default says, numbers and booleans included; only times and nested types are refused.

Text or category is decided on the first 20,000 values. With w words a value on average and a share
d of distinct values: text if w >= 5, or w >= 1.5 and d > 1/2; category if d <= 1/2; otherwise an
identifier. The decision can differ from one day's file to the next: name the columns, or reuse
the earlier encoding, where that matters.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import pyarrow as pa

from hiertcn.errors import InputError
from hiertcn.events.columns import ITEM_ID

ColumnKind = Literal["vector", "text", "category", "tags", "number"]

VALUES_EXAMINED: Final = 20_000

_WORDS_OF_PROSE: Final = 5.0
_WORDS_OF_A_TITLE: Final = 1.5
_DISTINCT_SHARE_OF_A_CATEGORY: Final = 0.5
_DATE: Final = re.compile(r"\s*\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?\s*")


@dataclass(frozen=True, kw_only=True)
class ColumnChoice:
    """The columns taken, in the file's order, and why the others were not."""

    kinds: dict[str, ColumnKind]
    skipped: dict[str, str]


def choose_columns(
    schema: pa.Schema,
    texts: Mapping[str, Sequence[str]],
    *,
    named: Sequence[str] = (),
    text_columns: Sequence[str] = (),
    category_columns: Sequence[str] = (),
) -> ColumnChoice:
    """Choose columns and their kinds.

    Args:
        schema: of the items file.
        texts: some non-null values of each text column.
        named: columns to take; empty takes every usable one.
        text_columns: columns to take as text, whatever their values look like.
        category_columns: columns to take as categories, whatever their values look like.

    Raises:
        InputError: a column does not exist, cannot be a feature, or cannot be of the kind asked.
    """
    forced: dict[str, ColumnKind] = dict.fromkeys(text_columns, "text")
    forced.update(dict.fromkeys(category_columns, "category"))
    for column in (*named, *forced):
        _refuse_unknown(column, schema)
    kinds: dict[str, ColumnKind] = {}
    skipped: dict[str, str] = {}
    for field in schema:
        column = field.name
        if column == ITEM_ID:
            continue
        if column in forced:
            _refuse_unless_text(column, field.type, forced[column])
            kinds[column] = forced[column]
        elif column in named:
            kinds[column] = _named_kind(column, field.type, texts.get(column, ()))
        elif named:
            skipped[column] = "not among the columns named"
        else:
            kind, reason = _default_kind(field.type, texts.get(column, ()))
            if kind is None:
                skipped[column] = reason
            else:
                kinds[column] = kind
    return ColumnChoice(kinds=kinds, skipped=skipped)


def is_text(type_: pa.DataType) -> bool:
    """Say whether an Arrow type holds text, dictionary-encoded or not."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return type_ in (pa.string(), pa.large_string(), pa.string_view())


def _refuse_unknown(column: str, schema: pa.Schema) -> None:
    usable = [name for name in schema.names if name != ITEM_ID]
    if column == ITEM_ID:
        raise InputError(
            f"the column {ITEM_ID!r} is the item's name, not a feature; the feature columns to "
            f"choose from are {', '.join(usable) or 'none'}"
        )
    if column not in schema.names:
        raise InputError(
            f"the items file has no column {column!r}; its columns are "
            f"{', '.join(usable) or 'none'} (beside {ITEM_ID}), so name some of these"
        )


def _refuse_unless_text(column: str, type_: pa.DataType, kind: str) -> None:
    if not is_text(type_):
        raise InputError(
            f"the item column {column!r} is {type_} and cannot be encoded as {kind}; expected "
            "text, so name it in columns instead"
        )


def _named_kind(column: str, type_: pa.DataType, values: Sequence[str]) -> ColumnKind:
    kind = _kind_of_type(type_)
    if kind is not None:
        return kind
    if is_text(type_):
        return _kind_of_text(values) or "category"
    raise InputError(
        f"the item column {column!r} is {type_} and cannot be a feature; expected a list of "
        "numbers or texts, a number, a boolean or a text, so convert it or leave it out"
    )


def _default_kind(type_: pa.DataType, values: Sequence[str]) -> tuple[ColumnKind | None, str]:
    kind = _kind_of_type(type_)
    if kind == "number":
        return None, "a number or boolean, which may tell the future: taken only when named"
    if kind == "vector" and not pa.types.is_floating(type_.value_type):
        return None, "a list of integers: taken only when named"
    if kind is not None:
        return kind, ""
    if not is_text(type_):
        return None, f"of type {type_}, which is no feature"
    if not values:
        return None, "has no values"
    if _look_like_dates(values):
        return None, "looks like dates, which may tell the future: taken only when named"
    kind = _kind_of_text(values)
    if kind is None:
        return None, "looks like an identifier (one word, hardly ever repeated)"
    return kind, ""


def _kind_of_type(type_: pa.DataType) -> ColumnKind | None:
    if (
        pa.types.is_list(type_)
        or pa.types.is_large_list(type_)
        or pa.types.is_fixed_size_list(type_)
    ):
        if pa.types.is_floating(type_.value_type) or pa.types.is_integer(type_.value_type):
            return "vector"
        return "tags" if is_text(type_.value_type) else None
    if (
        pa.types.is_boolean(type_)
        or pa.types.is_integer(type_)
        or pa.types.is_floating(type_)
        or pa.types.is_decimal(type_)
    ):
        return "number"
    return None


def _kind_of_text(values: Sequence[str]) -> ColumnKind | None:
    if not values:
        return None
    words = sum(len(value.split()) for value in values) / len(values)
    distinct = len(set(values)) / len(values)
    if words >= _WORDS_OF_PROSE:
        return "text"
    if distinct <= _DISTINCT_SHARE_OF_A_CATEGORY:
        return "category"
    return "text" if words >= _WORDS_OF_A_TITLE else None


def _look_like_dates(values: Sequence[str]) -> bool:
    return sum(_DATE.fullmatch(value) is not None for value in values) > len(values) / 2
