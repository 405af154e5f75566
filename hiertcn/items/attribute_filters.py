"""A condition on one attribute of an item, and which items of a column pass it.

Values arrive as text, as a column's kind understands it:

    text, tags          the text itself; an item passes by any of its tags
    integer, number     decimal
    boolean             true or false
    time                RFC 3339, or YYYY-MM-DD for that whole day in UTC

An item without a value passes ``none_of`` and nothing else.
"""

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from hiertcn.errors import InputError

Kind = Literal["text", "tags", "integer", "number", "boolean", "time"]

_EXPECTED: Final[dict[Kind, str]] = {
    "text": "text",
    "tags": "text",
    "integer": "a decimal number",
    "number": "a decimal number",
    "boolean": "true or false",
    "time": "a time in RFC 3339 or a date YYYY-MM-DD",
}
_WITH_BOUNDS: Final = ("integer", "number", "time")
_DAY_US: Final = 86_400_000_000


@dataclass(frozen=True, kw_only=True)
class AttributeFilter:
    """A condition on ``column``; all that is given must hold. See the module for the values.

    Attributes:
        column: which attribute.
        any_of: the value is one of these; empty for any.
        none_of: the value is none of these.
        min: least value, included; None for no bound.
        max: greatest value, included; None for no bound.
    """

    column: str
    any_of: tuple[str, ...] = ()
    none_of: tuple[str, ...] = ()
    min: str | None = None
    max: str | None = None


class Span(NamedTuple):
    """Values from ``first`` to ``last``, both included: one number, or the times of one day."""

    first: float
    last: float


def passing(
    condition: AttributeFilter, kind: Kind, column: pa.Array, field: str
) -> NDArray[np.bool_]:
    """Which values of a column pass, bool ``[n]``.

    Args:
        condition: what to pass.
        kind: the column's.
        column: the values, of the Arrow type that the kind is stored as.
        field: how the condition is called in a request, for errors.

    Raises:
        InputError: a value is none of the column's kind, or the kind has no order to bound.
    """
    matches = _Matches(kind, column)
    passes = np.ones(len(column), np.bool_)
    if condition.any_of:
        passes &= matches.among(condition.any_of, f"{field}.any_of")
    if condition.none_of:
        passes &= ~matches.among(condition.none_of, f"{field}.none_of")
    for name, text in (("min", condition.min), ("max", condition.max)):
        if text is None:
            continue
        if kind not in _WITH_BOUNDS:
            raise InputError(
                f"{field}.{name} is {text!r} but the column {condition.column!r} is of kind "
                f"{kind}; expected any_of or none_of, as only numbers and times have bounds"
            )
        span = _span(text, kind, f"{field}.{name}")
        passes &= (
            matches.values >= span.first if name == "min" else matches.values <= span.last
        ) & matches.known
    return passes


class _Matches:
    def __init__(self, kind: Kind, column: pa.Array) -> None:
        self._kind: Kind = kind
        self._column = column

    @property
    def known(self) -> NDArray[np.bool_]:
        known: NDArray[np.bool_] = self._column.is_valid().to_numpy(zero_copy_only=False)
        return known

    @property
    def values(self) -> NDArray[Any]:
        column = self._column
        if self._kind == "time":
            column = column.view(pa.int64())
        filling = False if self._kind == "boolean" else 0
        values: NDArray[Any] = column.fill_null(filling).to_numpy(zero_copy_only=False)
        return values

    def among(self, texts: Sequence[str], field: str) -> NDArray[np.bool_]:
        if self._kind == "text":
            return self._texts_among(texts)
        if self._kind == "tags":
            return self._tags_among(texts)
        values = self.values
        found = np.zeros(len(values), np.bool_)
        for place, text in enumerate(texts):
            span = _span(text, self._kind, f"{field}[{place}]")
            found |= (values >= span.first) & (values <= span.last)
        return found & self.known

    def _texts_among(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        wanted = pc.is_in(self._column.dictionary, value_set=pa.array(texts, pa.large_string()))
        # The last place, which -1 finds, is that of no value.
        of_code = np.append(wanted.to_numpy(zero_copy_only=False), np.False_)
        codes = self._column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        found: NDArray[np.bool_] = of_code[codes]
        return found

    def _tags_among(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        offsets = self._column.offsets.to_numpy()
        tags = self._column.values.slice(offsets[0], offsets[-1] - offsets[0])
        wanted = pc.is_in(tags, value_set=pa.array(texts, pa.large_string()))
        before = np.zeros(len(tags) + 1, np.int64)
        np.cumsum(wanted.to_numpy(zero_copy_only=False), out=before[1:])
        counts = np.diff(before[offsets - offsets[0]])
        found: NDArray[np.bool_] = (counts > 0) & self.known
        return found


def _span(text: str, kind: Kind, field: str) -> Span:
    try:
        if kind == "boolean":
            value = ("false", "true").index(text.lower())
            return Span(value, value)
        if kind == "time":
            return _time_span(text)
        number = _number(text)
    except (ValueError, OverflowError):
        raise InputError(f"{field} is {text!r}; expected {_EXPECTED[kind]}") from None
    return Span(number, number)


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _time_span(text: str) -> Span:
    if len(text) == len("YYYY-MM-DD"):
        day = datetime.datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=datetime.UTC)
        first = _microseconds(day)
        return Span(first, first + _DAY_US - 1)
    when = datetime.datetime.fromisoformat(text)
    if when.tzinfo is None:
        raise ValueError(text)
    return Span(_microseconds(when), _microseconds(when))


def _microseconds(when: datetime.datetime) -> int:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (when - epoch) // datetime.timedelta(microseconds=1)
