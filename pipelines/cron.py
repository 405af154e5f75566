"""Cron expressions as Kubeflow reads them: six fields, seconds first, in UTC."""

import re
from typing import Final

from hiertcn.errors import InputError

_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")
_FIELDS: Final = (
    ("seconds", 0, 59, ()),
    ("minutes", 0, 59, ()),
    ("hours", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 6, _DAYS),
)
_PART = re.compile(r"(?P<first>\*|\?|\w+)(?:-(?P<last>\w+))?(?:/(?P<step>\d+))?")


def six_field_cron(expression: str) -> str:
    """Return the expression with six fields; one with the usual five runs at second 0.

    Fields: [seconds] minutes hours day-of-month month day-of-week; each is ``*``, a number, a
    range ``a-b``, a list ``a,b`` or steps ``*/n``; months and days of the week also by name.

    Raises:
        InputError: another number of fields, or a value outside its field's range.
    """
    fields = expression.split()
    if len(fields) == 5:
        fields.insert(0, "0")
    if len(fields) != 6:
        raise InputError(
            f"--cron {expression!r} has {len(fields)} fields; expected 5 (minutes hours day month "
            "weekday, such as '0 2 * * *' for 02:00 UTC every day) or 6 with seconds first"
        )
    for text, (name, low, high, names) in zip(fields, _FIELDS, strict=True):
        for part in text.split(","):
            if not _is_valid(part, low, high, names):
                raise InputError(
                    f"--cron {expression!r}: {part!r} is no {name}; expected {low} to {high}"
                    f"{' or ' + '-'.join((names[0], names[-1])) if names else ''}, *, a range a-b "
                    "or steps */n"
                )
    return " ".join(fields)


def _is_valid(part: str, low: int, high: int, names: tuple[str, ...]) -> bool:
    match = _PART.fullmatch(part)
    if not match or (match["step"] is not None and int(match["step"]) < 1):
        return False
    if match["first"] in "*?":
        return match["last"] is None
    first = _value(match["first"], low, names)
    last = first if match["last"] is None else _value(match["last"], low, names)
    return first is not None and last is not None and low <= first <= last <= high


def _value(text: str, low: int, names: tuple[str, ...]) -> int | None:
    if text.isdecimal():
        return int(text)
    return names.index(text.upper()) + low if text.upper() in names else None
