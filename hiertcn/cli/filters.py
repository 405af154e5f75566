"""``--filter`` of ``hiertcn recommend``: a condition on an item's attribute as one text."""

import re
from collections.abc import Iterable
from typing import Final

from hiertcn.errors import InputError
from hiertcn.serving.client.messages import Filter

_FILTER: Final = re.compile(r"(?P<column>[^=!<>]+)(?P<how>=|!=|>=|<=)(?P<value>.+)", re.DOTALL)


def read_filters(texts: Iterable[str]) -> list[Filter]:
    """Read ``column=value``, ``column!=value``, ``column>=value`` and ``column<=value``.

    Several values of one column with ``=`` are alternatives, as with ``!=`` none of them may be;
    everything else must hold together.

    Raises:
        InputError: a text is none of these, or bounds a column twice on one side.
    """
    any_of: dict[str, list[str]] = {}
    none_of: dict[str, list[str]] = {}
    bounds: dict[tuple[str, str], str] = {}
    columns: dict[str, None] = {}
    for text in texts:
        found = _FILTER.fullmatch(text)
        if found is None:
            raise InputError(
                f"--filter {text!r} was not understood; expected column=value, column!=value, "
                "column>=value or column<=value"
            )
        column, how, value = found["column"].strip(), found["how"], found["value"]
        columns[column] = None
        if how == "=":
            any_of.setdefault(column, []).append(value)
        elif how == "!=":
            none_of.setdefault(column, []).append(value)
        elif (column, how) in bounds:
            raise InputError(
                f"--filter bounds {column!r} by both {bounds[column, how]!r} and {value!r}; give "
                f"{column}{how} once"
            )
        else:
            bounds[column, how] = value
    return [
        Filter(
            column=column,
            any_of=any_of.get(column, ()),
            none_of=none_of.get(column, ()),
            min=bounds.get((column, ">=")),
            max=bounds.get((column, "<=")),
        )
        for column in columns
    ]
