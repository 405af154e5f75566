"""Python clients of the sidecar, for threads and for asyncio.

    with RecommenderClient("127.0.0.1:50051") as client:
        client.record([Interaction("ada", "item-7")])
        for item in client.recommend("ada", k=5).items:
            print(item.item_id, item.score)

Every call has a deadline. Calls are retried when the sidecar is unavailable, which is safe: an
interaction without a time gets the client's clock before it is sent, so a second attempt is
recognised and recorded once. Times are microseconds since the epoch, UTC; None means now.
"""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, NamedTuple

import grpc

from hiertcn.errors import (
    HiertcnError,
    InputError,
    OverloadError,
    PermissionDeniedError,
    ReleaseError,
    ServingError,
    UnauthenticatedError,
)
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving import recommender_pb2_grpc as pb_grpc
from hiertcn.serving.access import Access

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"

_MAX_MESSAGE_BYTES: Final = 16 << 20
_ACTIVATION_TIMEOUT_S: Final = 600.0


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


class RecommenderClient:
    """A blocking client, safe to share between threads.

    Raises, from every method:
        InputError: a field of the request is wrong; the message names it.
        ReleaseError: a release must not be activated.
        UnauthenticatedError, PermissionDeniedError: the token is wrong or lacks a scope.
        OverloadError: a limit is reached; try again later.
        ServingError: the sidecar does not answer within ``timeout_s`` seconds, or failed.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 5.0,
        access: Access | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._access = access or Access()
        self._channel: Any = self._access.channel(address, _channel_options())
        self._recommender: Any = pb_grpc.RecommenderStub(self._channel)  # type: ignore[no-untyped-call]
        self._releases: Any = pb_grpc.ReleasesStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> "RecommenderClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def recommend(
        self,
        user_id: str,
        *,
        k: int = 10,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        timestamp_us: int | None = None,
    ) -> Recommendation:
        """Rank ``candidates``, or the catalogue if None, and return the ``k`` best."""
        request = _recommend_request(user_id, k, candidates, exclude, timestamp_us)
        return _recommendation(self._call(self._recommender.Recommend, request))

    def record(self, interactions: Sequence[Interaction]) -> RecordResult:
        """Record interactions; when this returns they are on the sidecar's disk."""
        return _record_result(
            self._call(self._recommender.RecordInteractions, _record_request(interactions))
        )

    def get_user(self, user_id: str) -> User | None:
        """What the sidecar holds of a user; None for an unknown one."""
        return _user(self._call(self._recommender.GetUser, pb.GetUserRequest(user_id=user_id)))

    def delete_user(self, user_id: str) -> bool:
        """Forget a user; return whether anything was known."""
        request = pb.DeleteUserRequest(user_id=user_id)
        return bool(self._call(self._recommender.DeleteUser, request).deleted)

    def releases(self) -> Releases:
        """The complete releases."""
        return _release_list(self._call(self._releases.ListReleases, pb.ListReleasesRequest()))

    def activate(self, release: int) -> int:
        """Serve a release; return its number once it answers."""
        request = pb.ActivateReleaseRequest(release=release)
        reply = self._call(self._releases.ActivateRelease, request, _ACTIVATION_TIMEOUT_S)
        return int(reply.release)

    def roll_back(self) -> int:
        """Serve the previous release; return its number once it answers."""
        request = pb.RollBackReleaseRequest()
        reply = self._call(self._releases.RollBackRelease, request, _ACTIVATION_TIMEOUT_S)
        return int(reply.release)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(
                request,
                timeout=timeout_s or self._timeout_s,
                metadata=self._access.metadata(),
            )
        except grpc.RpcError as error:
            raise _failure(error, self.address) from None


class AsyncRecommenderClient:
    """The same for asyncio; make it inside a running event loop. Raises as the blocking one."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 5.0,
        access: Access | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._access = access or Access()
        self._channel: Any = self._access.aio_channel(address, _channel_options())
        self._recommender: Any = pb_grpc.RecommenderStub(self._channel)  # type: ignore[no-untyped-call]
        self._releases: Any = pb_grpc.ReleasesStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> "AsyncRecommenderClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def recommend(
        self,
        user_id: str,
        *,
        k: int = 10,
        candidates: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        timestamp_us: int | None = None,
    ) -> Recommendation:
        """Rank ``candidates``, or the catalogue if None, and return the ``k`` best."""
        request = _recommend_request(user_id, k, candidates, exclude, timestamp_us)
        return _recommendation(await self._call(self._recommender.Recommend, request))

    async def record(self, interactions: Sequence[Interaction]) -> RecordResult:
        """Record interactions; when this returns they are on the sidecar's disk."""
        return _record_result(
            await self._call(self._recommender.RecordInteractions, _record_request(interactions))
        )

    async def get_user(self, user_id: str) -> User | None:
        """What the sidecar holds of a user; None for an unknown one."""
        request = pb.GetUserRequest(user_id=user_id)
        return _user(await self._call(self._recommender.GetUser, request))

    async def delete_user(self, user_id: str) -> bool:
        """Forget a user; return whether anything was known."""
        request = pb.DeleteUserRequest(user_id=user_id)
        return bool((await self._call(self._recommender.DeleteUser, request)).deleted)

    async def releases(self) -> Releases:
        """The complete releases."""
        request = pb.ListReleasesRequest()
        return _release_list(await self._call(self._releases.ListReleases, request))

    async def activate(self, release: int) -> int:
        """Serve a release; return its number once it answers."""
        request = pb.ActivateReleaseRequest(release=release)
        reply = await self._call(self._releases.ActivateRelease, request, _ACTIVATION_TIMEOUT_S)
        return int(reply.release)

    async def roll_back(self) -> int:
        """Serve the previous release; return its number once it answers."""
        request = pb.RollBackReleaseRequest()
        reply = await self._call(self._releases.RollBackRelease, request, _ACTIVATION_TIMEOUT_S)
        return int(reply.release)

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return await method(
                request,
                timeout=timeout_s or self._timeout_s,
                metadata=self._access.metadata(),
            )
        except grpc.RpcError as error:
            raise _failure(error, self.address) from None


def _channel_options() -> list[tuple[str, Any]]:
    retry = {
        "maxAttempts": 4,
        "initialBackoff": "0.05s",
        "maxBackoff": "0.5s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    services = [{"service": f"hiertcn.v1.{name}"} for name in ("Recommender", "Releases")]
    return [
        (
            "grpc.service_config",
            json.dumps({"methodConfig": [{"name": services, "retryPolicy": retry}]}),
        ),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ]


def _recommend_request(
    user_id: str,
    k: int,
    candidates: Iterable[str] | None,
    exclude: Iterable[str],
    timestamp_us: int | None,
) -> pb.RecommendRequest:
    with _encoding("the recommend request"):
        return pb.RecommendRequest(
            user_id=user_id,
            k=k,
            candidates=candidates or (),
            candidates_only=candidates is not None,
            exclude=exclude,
            timestamp_us=timestamp_us or 0,
        )


def _record_request(interactions: Sequence[Interaction]) -> pb.RecordInteractionsRequest:
    now_us = time.time_ns() // 1000
    request = pb.RecordInteractionsRequest()
    for place, interaction in enumerate(interactions):
        with _encoding(f"interactions[{place}]"):
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
def _encoding(what: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{what} cannot be sent ({error}); expected text ids and whole microseconds"
        ) from None


def _recommendation(reply: Any) -> Recommendation:
    return Recommendation(
        release=reply.release,
        items=[ScoredItem(item.item_id, item.score) for item in reply.items],
        unknown_items=list(reply.unknown_items),
        fallback=reply.fallback,
    )


def _record_result(reply: Any) -> RecordResult:
    return RecordResult(
        accepted=reply.accepted,
        duplicates=reply.duplicates,
        late=reply.late,
        unknown_items=list(reply.unknown_items),
    )


def _user(reply: Any) -> User | None:
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


def _release_list(reply: Any) -> Releases:
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


def _failure(error: Any, address: str) -> HiertcnError:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return InputError(details)
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        return ReleaseError(details)
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return UnauthenticatedError(details)
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return PermissionDeniedError(details)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return OverloadError(details)
    return ServingError(
        f"the sidecar at {address} did not answer ({code.name}: {details}); see whether "
        "'hiertcn serve' runs there"
    )
