"""Reads interactions to record from JSON lines, a batch at a time; names the line that is wrong."""

import contextlib
import datetime
import json
import sys
from collections.abc import Iterator
from typing import IO, Any, Final

from hiertcn.errors import InputError
from hiertcn.events.columns import EVENT_TYPE, ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.serving.client.messages import Interaction

_BATCH: Final = 1000
_TIMESTAMP_US: Final = "timestamp_us"
_IDEMPOTENCY_KEY: Final = "idempotency_key"
_FIELDS: Final = {USER_ID, ITEM_ID, TIMESTAMP, _TIMESTAMP_US, EVENT_TYPE, _IDEMPOTENCY_KEY}


def read_interactions(path: str) -> Iterator[list[Interaction]]:
    """Yield batches of at most 1000 interactions from a file of JSON lines, ``-`` for stdin.

    Batches are yielded as they are read, so a bad line does not undo those before it.

    Raises:
        InputError: the file cannot be read, or a line is not an interaction; it is named.
    """
    with opened(path) as lines:
        batch: list[Interaction] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            batch.append(_interaction(line, f"{path} line {number}"))
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def time_us(text: str, field: str) -> int:
    """A time given as whole microseconds since the epoch or as RFC 3339 (UTC if without zone).

    Raises:
        InputError: it is neither.
    """
    with contextlib.suppress(ValueError):
        return int(text)
    try:
        when = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{field} is {text!r}; expected microseconds since 1970-01-01 UTC or RFC 3339 such as "
            "2026-01-31T12:00:00Z"
        ) from None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (when - epoch) // datetime.timedelta(microseconds=1)


@contextlib.contextmanager
def opened(path: str) -> Iterator[IO[str]]:
    """Open a file of JSON lines, ``-`` for stdin.

    Raises:
        InputError: it cannot be read.
    """
    if path == "-":
        yield sys.stdin
        return
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            yield file
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); expected a file of JSON lines"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; expected a file of JSON lines") from None


def _interaction(line: str, where: str) -> Interaction:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error}); expected one object a line") from None
    if not isinstance(value, dict):
        raise InputError(f"{where} is {type(value).__name__}; expected an object")
    unknown = sorted(set(value) - _FIELDS)
    if unknown:
        raise InputError(
            f"{where} has the unknown field {unknown[0]!r}; expected {', '.join(sorted(_FIELDS))}"
        )
    timestamp = value.get(_TIMESTAMP_US, value.get(TIMESTAMP))
    return Interaction(
        user_id=_id(value, USER_ID, where),
        item_id=_id(value, ITEM_ID, where),
        timestamp_us=None if timestamp is None else time_us(str(timestamp), f"{where}: timestamp"),
        idempotency_key=_text(value, _IDEMPOTENCY_KEY, where),
        event_type=_text(value, EVENT_TYPE, where),
    )


def _id(value: dict[str, Any], field: str, where: str) -> str:
    found = value.get(field)
    # Integer ids are text in decimal everywhere behind the ingest.
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    if not isinstance(found, str) or not found:
        raise InputError(f"{where} has {field} {found!r}; expected a text or integer id")
    return found


def _text(value: dict[str, Any], field: str, where: str) -> str:
    found = value.get(field) or ""
    if not isinstance(found, str):
        raise InputError(f"{where} has {field} {found!r}; expected text")
    return found
