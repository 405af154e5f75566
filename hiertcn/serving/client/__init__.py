"""Python clients of the sidecar, for threads and for asyncio.

    with RecommenderClient("127.0.0.1:50051") as client:
        client.record([Interaction("ada", "item-7")])
        for item in client.recommend("ada", k=5).items:
            print(item.item_id, item.score)

Every call has a deadline. Calls are retried when the sidecar is unavailable, which is safe: an
interaction without a time gets the client's clock before it is sent, so a second attempt is
recognised and recorded once. A sidecar that does not answer is soon not asked any more, but now and
then (``client/calls.py``). Times are microseconds since the epoch, UTC; None means now.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final

import grpc

from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving import recommender_pb2_grpc as pb_grpc
from hiertcn.serving.client import items as items_messages
from hiertcn.serving.client import messages
from hiertcn.serving.client.calls import CallOutcomes, channel_options, is_retried
from hiertcn.serving.client.items import NewItem, UpsertResult
from hiertcn.serving.client.messages import (
    Filter,
    Interaction,
    JournalEntry,
    Recommendation,
    RecordResult,
    Release,
    Releases,
    ScoredItem,
    User,
)
from hiertcn.serving.client.stream import StreamedRequests
from hiertcn.serving.inference.breaker import CircuitBreaker
from hiertcn.serving.security.access import Access

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncRecommenderClient",
    "Filter",
    "Interaction",
    "JournalEntry",
    "NewItem",
    "Recommendation",
    "RecommenderClient",
    "RecordResult",
    "Release",
    "Releases",
    "ScoredItem",
    "UpsertResult",
    "User",
]

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"

_ACTIVATION_TIMEOUT_S: Final = 600.0
_UPSERT_TIMEOUT_S: Final = 60.0


class RecommenderClient:
    """A blocking client, safe to share between threads.

    Raises, from every method:
        InputError: a field of the request is wrong; the message names it.
        ReleaseError: a release must not be activated.
        UnauthenticatedError, PermissionDeniedError: the token is wrong or lacks a scope.
        OverloadError: a limit is reached; try again later.
        DeadlineError: the sidecar does not answer within ``timeout_s`` seconds.
        ServingError: it is not there or failed, or the breaker is open.

    Args:
        address: ``host:port`` of the sidecar.
        timeout_s: longest that a call may take, its retries included.
        access: TLS and token, none by default.
        breaker: decides when calls are given up; share one between clients of one sidecar.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 5.0,
        access: Access | None = None,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self.address = address
        self._outcomes = CallOutcomes(address, breaker)
        self._timeout_s = timeout_s
        self._access = access or Access()
        self._channel: Any = self._access.channel(address, channel_options())
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
        exclude_seen: bool = False,
        filters: Iterable[Filter] = (),
        deadline_ms: int | None = None,
        timestamp_us: int | None = None,
    ) -> Recommendation:
        """Rank ``candidates``, or the catalogue if None, and return the ``k`` best.

        Args:
            user_id: for whom.
            k: how many items, 1 to 1000.
            candidates: items to rank, at most 10,000.
            exclude: items never to return, at most 10,000.
            exclude_seen: leave out what the user has interacted with.
            filters: conditions that the items must pass, at most 16.
            deadline_ms: a simpler ranking answers rather than the model later than this.
            timestamp_us: as of when.
        """
        request = messages.recommend_request(
            user_id,
            k=k,
            candidates=candidates,
            exclude=exclude,
            exclude_seen=exclude_seen,
            filters=filters,
            deadline_ms=deadline_ms,
            timestamp_us=timestamp_us,
        )
        return messages.recommendation(self._call(self._recommender.Recommend, request))

    def record(self, interactions: Sequence[Interaction]) -> RecordResult:
        """Record interactions; when this returns they are on the sidecar's disk."""
        request = messages.record_request(interactions)
        return messages.record_result(self._call(self._recommender.RecordInteractions, request))

    def record_stream(
        self, batches: Iterable[Sequence[Interaction]], *, timeout_s: float | None = None
    ) -> Iterator[RecordResult]:
        """Record batches through one call, which is several times faster than one call each.

        Yields what became of each batch, in their order, once it is on the sidecar's disk. When the
        call breaks off, what is unanswered is sent again.

        Args:
            batches: 1 to 10,000 interactions each; drawn a few batches ahead, on another thread.
            timeout_s: longest that one call may take, None for as long as there are batches.
        """
        requests = StreamedRequests(map(messages.record_request, batches))
        while True:
            self._outcomes.check()
            call = self._recommender.StreamInteractions(
                requests.draw(), timeout=timeout_s, metadata=self._access.metadata()
            )
            try:
                for reply in call:
                    requests.answered()
                    self._outcomes.answered()
                    yield messages.record_result(reply)
                requests.raise_error()
                return
            except grpc.RpcError as error:
                wait_s = requests.wait_s() if is_retried(error) else None
                found = self._outcomes.error(error)
                if wait_s is None:
                    raise found from None
                time.sleep(wait_s)
            finally:
                call.cancel()

    def upsert_items(
        self, items: Sequence[NewItem], *, timeout_s: float = _UPSERT_TIMEOUT_S
    ) -> UpsertResult:
        """Add items that the release does not know; when this returns they are candidates.

        Args:
            items: 1 to 1000, each once.
            timeout_s: longest wait; encoding the first texts takes the sidecar seconds.
        """
        request = items_messages.upsert_request(items)
        reply = self._call(self._recommender.UpsertItems, request, timeout_s)
        return items_messages.upsert_result(reply)

    def get_user(self, user_id: str) -> User | None:
        """What the sidecar holds of a user; None for an unknown one."""
        request = pb.GetUserRequest(user_id=user_id)
        return messages.user(self._call(self._recommender.GetUser, request))

    def delete_user(self, user_id: str) -> bool:
        """Forget a user; return whether anything was known."""
        request = pb.DeleteUserRequest(user_id=user_id)
        return bool(self._call(self._recommender.DeleteUser, request).deleted)

    def releases(self) -> Releases:
        """The complete releases."""
        request = pb.ListReleasesRequest()
        return messages.release_list(self._call(self._releases.ListReleases, request))

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
        self._outcomes.check()
        try:
            reply = method(
                request,
                timeout=timeout_s or self._timeout_s,
                metadata=self._access.metadata(),
            )
        except grpc.RpcError as error:
            raise self._outcomes.error(error) from None
        self._outcomes.answered()
        return reply


class AsyncRecommenderClient:
    """The same for asyncio; make it inside a running event loop. Raises as the blocking one."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 5.0,
        access: Access | None = None,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        self.address = address
        self._outcomes = CallOutcomes(address, breaker)
        self._timeout_s = timeout_s
        self._access = access or Access()
        self._channel: Any = self._access.aio_channel(address, channel_options())
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
        exclude_seen: bool = False,
        filters: Iterable[Filter] = (),
        deadline_ms: int | None = None,
        timestamp_us: int | None = None,
    ) -> Recommendation:
        """Rank as the blocking client does."""
        request = messages.recommend_request(
            user_id,
            k=k,
            candidates=candidates,
            exclude=exclude,
            exclude_seen=exclude_seen,
            filters=filters,
            deadline_ms=deadline_ms,
            timestamp_us=timestamp_us,
        )
        return messages.recommendation(await self._call(self._recommender.Recommend, request))

    async def record(self, interactions: Sequence[Interaction]) -> RecordResult:
        """Record interactions; when this returns they are on the sidecar's disk."""
        request = messages.record_request(interactions)
        reply = await self._call(self._recommender.RecordInteractions, request)
        return messages.record_result(reply)

    async def record_stream(
        self, batches: Iterable[Sequence[Interaction]], *, timeout_s: float | None = None
    ) -> AsyncIterator[RecordResult]:
        """Record batches through one call, as the blocking client does."""
        requests = StreamedRequests(map(messages.record_request, batches))
        while True:
            self._outcomes.check()
            call = self._recommender.StreamInteractions(
                requests.draw_async(), timeout=timeout_s, metadata=self._access.metadata()
            )
            try:
                async for reply in call:
                    requests.answered()
                    self._outcomes.answered()
                    yield messages.record_result(reply)
                requests.raise_error()
                return
            except grpc.RpcError as error:
                wait_s = requests.wait_s() if is_retried(error) else None
                found = self._outcomes.error(error)
                if wait_s is None:
                    raise found from None
                await asyncio.sleep(wait_s)
            finally:
                call.cancel()

    async def upsert_items(
        self, items: Sequence[NewItem], *, timeout_s: float = _UPSERT_TIMEOUT_S
    ) -> UpsertResult:
        """Add items that the release does not know, as the blocking client does."""
        request = items_messages.upsert_request(items)
        reply = await self._call(self._recommender.UpsertItems, request, timeout_s)
        return items_messages.upsert_result(reply)

    async def get_user(self, user_id: str) -> User | None:
        """What the sidecar holds of a user; None for an unknown one."""
        request = pb.GetUserRequest(user_id=user_id)
        return messages.user(await self._call(self._recommender.GetUser, request))

    async def delete_user(self, user_id: str) -> bool:
        """Forget a user; return whether anything was known."""
        request = pb.DeleteUserRequest(user_id=user_id)
        return bool((await self._call(self._recommender.DeleteUser, request)).deleted)

    async def releases(self) -> Releases:
        """The complete releases."""
        request = pb.ListReleasesRequest()
        return messages.release_list(await self._call(self._releases.ListReleases, request))

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
        self._outcomes.check()
        try:
            reply = await method(
                request,
                timeout=timeout_s or self._timeout_s,
                metadata=self._access.metadata(),
            )
        except grpc.RpcError as error:
            raise self._outcomes.error(error) from None
        self._outcomes.answered()
        return reply
