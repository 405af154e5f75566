"""What the Python clients are asked with and answer with, and its wire form."""

import contextlib
import datetime
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hiertcn.errors import InputError
from hiertcn.serving import recommender_pb2 as pb

Value = str | int | float | bool | datetime.date
"""What an item's attribute is compared with; a ``datetime`` needs a time zone."""


class ScoredItem(NamedTuple):
    """One recommended item; scores compare only within one reply."""

    item_id: str
    score: float


@dataclass(frozen=True)
class Recommendation:
    """A reply, best item first; everything in it was computed from ``release``.

    ``fallback`` says that the model could not be asked in time and a simpler ranking was used.
    """

    release: int
    items: list[ScoredItem]
    unknown_items: list[str]
    fallback: bool


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A condition on an attribute of the items; all that is given must hold.

    Attributes:
        column: a column of the items file.
        any_of: the value is one of these; empty for any.
        none_of: the value is none of these.
        min: least value of a number or time, included.
        max: greatest value, included; a date stands for its whole day in UTC.
    """

    column: str
    any_of: Sequence[Value] = ()
    none_of: Sequence[Value] = ()
    min: Value | None = None
    max: Value | None = None


@dataclass(frozen=True)
class Interaction:
    """One interaction to record; a retry with the same ``idempotency_key`` counts once."""

    user_id: str
    item_id: str
    timestamp_us: int | None = None
    idempotency_key: str = ""
    event_type: str = ""


@dataclass(frozen=True)
class RecordResult:
    """What became of recorded interactions; ``late`` and ``unknown_items`` are accepted ones."""

    accepted: int
    duplicates: int
    late: int
    unknown_items: list[str]


@dataclass(frozen=True)
class JournalEntry:
    """An interaction the sidecar holds; ``known_item`` is false if the release lacks the item."""

    item_id: str
    timestamp_us: int
    late: bool
    known_item: bool


@dataclass(frozen=True)
class User:
    """What the sidecar holds of a user; ``folded_until_us`` is None for the start state."""

    release: int
    folded_until_us: int | None
    open_session: list[JournalEntry]
    journal: list[JournalEntry]
    state_norm: float


@dataclass(frozen=True)
class Release:
    """One line of the sidecar's release list."""

    number: int
    is_current: bool
    is_previous: bool
    watermark_us: int


@dataclass(frozen=True)
class Releases:
    """The complete releases, newest first, and the one that answers."""

    serving: int
    releases: list[Release]


def recommend_request(
    user_id: str,
    *,
    k: int,
    candidates: Iterable[str] | None,
    exclude: Iterable[str],
    exclude_seen: bool,
    filters: Iterable[Filter],
    deadline_ms: int | None,
    timestamp_us: int | None,
) -> pb.RecommendRequest:
    """The request.

    Raises:
        InputError: a value is of a type that cannot be sent.
    """
    with encoding("the recommend request"):
        return pb.RecommendRequest(
            user_id=user_id,
            k=k,
            candidates=candidates or (),
            candidates_only=candidates is not None,
            exclude=exclude,
            exclude_seen=exclude_seen,
            filters=[_filter(given) for given in filters],
            deadline_ms=deadline_ms or 0,
            timestamp_us=timestamp_us or 0,
        )


def _filter(given: Filter) -> pb.Filter:
    return pb.Filter(
        column=given.column,
        any_of=[_text(value) for value in given.any_of],
        none_of=[_text(value) for value in given.none_of],
        min=None if given.min is None else _text(given.min),
        max=None if given.max is None else _text(given.max),
    )


def _text(value: Value) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime.date):
        return value.isoformat()
    return str(value)


def record_request(interactions: Sequence[Interaction]) -> pb.RecordInteractionsRequest:
    """The request; an interaction without a time gets this machine's, so that a retry has the same.

    Raises:
        InputError: a value is of a type that cannot be sent.
    """
    now_us = time.time_ns() // 1000
    request = pb.RecordInteractionsRequest()
    for place, interaction in enumerate(interactions):
        with encoding(f"interactions[{place}]"):
            request.interactions.add(
                user_id=interaction.user_id,
                item_id=interaction.item_id,
                timestamp_us=(
                    now_us if interaction.timestamp_us is None else interaction.timestamp_us
                ),
                idempotency_key=interaction.idempotency_key,
                event_type=interaction.event_type,
            )
    return request


@contextlib.contextmanager
def encoding(what: str) -> Iterator[None]:
    """Say as one sentence what protocol buffers refuse to encode."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{what} cannot be sent ({error}); expected text ids and whole microseconds"
        ) from None


def recommendation(reply: Any) -> Recommendation:
    """Read a reply."""
    return Recommendation(
        release=reply.release,
        items=[ScoredItem(item.item_id, item.score) for item in reply.items],
        unknown_items=list(reply.unknown_items),
        fallback=reply.fallback,
    )


def record_result(reply: Any) -> RecordResult:
    """Read a reply."""
    return RecordResult(
        accepted=reply.accepted,
        duplicates=reply.duplicates,
        late=reply.late,
        unknown_items=list(reply.unknown_items),
    )


def user(reply: Any) -> User | None:
    """Read a reply; None for an unknown user."""
    if not reply.known:
        return None
    return User(
        release=reply.release,
        folded_until_us=reply.folded_until_us if reply.HasField("folded_until_us") else None,
        open_session=[_journal_entry(entry) for entry in reply.open_session],
        journal=[_journal_entry(entry) for entry in reply.journal],
        state_norm=reply.state_norm,
    )


def _journal_entry(entry: Any) -> JournalEntry:
    return JournalEntry(entry.item_id, entry.timestamp_us, entry.late, entry.known_item)


def release_list(reply: Any) -> Releases:
    """Read a reply."""
    return Releases(
        serving=reply.serving,
        releases=[
            Release(
                number=release.release,
                is_current=release.current,
                is_previous=release.previous,
                watermark_us=release.watermark_us,
            )
            for release in reply.releases
        ],
    )
