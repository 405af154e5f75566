"""The gRPC methods: check the request, ask the engine, word the reply or the error.

How a method becomes a handler, and an error a status, says ``rpc/methods.py``.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import numpy as np

from hiertcn.errors import HiertcnError, InputError
from hiertcn.items.texts import Texts
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.new_items.item_validation import checked_new_items
from hiertcn.serving.ranking.engine import Engine
from hiertcn.serving.records.fold import UNKNOWN_ROW, unfolded
from hiertcn.serving.records.record import NEVER_US, Journal
from hiertcn.serving.releases.activation import Activation
from hiertcn.serving.rpc import deadlines
from hiertcn.serving.rpc import validation as check
from hiertcn.serving.rpc.listed_candidates import ReceivedRecommend, received_recommend

RECOMMENDER: Final = "hiertcn.v1.Recommender"
RELEASES: Final = "hiertcn.v1.Releases"

_STREAMED_AHEAD: Final = 16


class RecommenderMethods:
    """The ``Recommender`` service on an engine."""

    PARSERS: Final = {"Recommend": received_recommend}

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # The first request must not wait for the parser's compilation.
        received_recommend(pb.RecommendRequest(candidates=["-"]).SerializeToString())

    async def Recommend(self, received: ReceivedRecommend, context: Any) -> pb.RecommendResponse:
        """Rank candidates or the catalogue."""
        request, candidates = received
        models_until = deadlines.models_until(check.checked_deadline_ms(request), context)
        user_id = check.checked_user_id(request.user_id)
        if candidates is None and (request.candidates or request.candidates_only):
            candidates = Texts.of(check.checked_items(request.candidates, "candidates"))
        found = await self._engine.recommend(
            user_id,
            k=check.checked_k(request),
            candidates=candidates,
            exclude=check.checked_items(request.exclude, "exclude"),
            exclude_seen=request.exclude_seen,
            filters=check.checked_filters(request.filters),
            models_until=models_until,
            timestamp_us=check.checked_time_us(
                request.timestamp_us, "timestamp_us", check.wall_clock_us()
            ),
        )
        return pb.RecommendResponse(
            release=found.release,
            items=[
                pb.ScoredItem(item_id=item_id, score=score)
                for item_id, score in zip(found.item_ids, found.scores, strict=True)
            ],
            unknown_items=found.unknown_items,
            fallback=found.fallback,
        )

    async def RecordInteractions(
        self, request: pb.RecordInteractionsRequest, context: Any
    ) -> pb.RecordInteractionsResponse:
        """Record interactions durably."""
        return await self._recorded(request)

    async def StreamInteractions(
        self, requests: AsyncIterator[pb.RecordInteractionsRequest], context: Any
    ) -> AsyncIterator[pb.RecordInteractionsResponse]:
        """Record requests as they come, and answer each in its turn."""
        answers: asyncio.Queue[asyncio.Future[pb.RecordInteractionsResponse] | None]
        answers = asyncio.Queue(_STREAMED_AHEAD)

        async def read() -> None:
            try:
                async for request in requests:
                    await answers.put(asyncio.ensure_future(self._recorded(request)))
            except HiertcnError as error:
                failed = asyncio.get_running_loop().create_future()
                failed.set_exception(error)
                await answers.put(failed)
            await answers.put(None)

        reading = asyncio.ensure_future(read())
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
        finally:
            reading.cancel()
            while not answers.empty():
                if (unread := answers.get_nowait()) is not None:
                    unread.add_done_callback(_passed_over)

    async def _recorded(
        self, request: pb.RecordInteractionsRequest
    ) -> pb.RecordInteractionsResponse:
        recorded = await self._engine.record(check.checked_interactions(request.interactions))
        return pb.RecordInteractionsResponse(
            accepted=recorded.accepted,
            duplicates=recorded.duplicates,
            late=recorded.late,
            unknown_items=recorded.unknown_items,
        )

    async def UpsertItems(
        self, request: pb.UpsertItemsRequest, context: Any
    ) -> pb.UpsertItemsResponse:
        """Add items between builds."""
        found = await self._engine.upsert(checked_new_items(request.items))
        return pb.UpsertItemsResponse(
            release=found.release,
            known_items=found.known_items,
            without_features=found.without_features,
            unknown_neighbors=found.unknown_neighbors,
        )

    async def GetUser(self, request: pb.GetUserRequest, context: Any) -> pb.GetUserResponse:
        """Show a user's record."""
        user_id = check.checked_user_id(request.user_id)
        view = await self._engine.user(user_id)
        if view is None:
            return pb.GetUserResponse(known=False)
        record = view.record
        open_rows, open_times_us = unfolded(view.record)
        open_ids = view.release.items.ids(open_rows) if len(open_rows) else []
        return pb.GetUserResponse(
            known=True,
            release=view.release.number,
            folded_until_us=(
                None if record.folded_until_us == NEVER_US else record.folded_until_us
            ),
            open_session=[
                pb.JournalEntry(item_id=item_id, timestamp_us=timestamp_us, known_item=True)
                for item_id, timestamp_us in zip(open_ids, open_times_us.tolist(), strict=True)
            ],
            journal=_journal_entries(record.journal),
            state_norm=float(np.linalg.norm(record.state[-1])),
        )

    async def DeleteUser(
        self, request: pb.DeleteUserRequest, context: Any
    ) -> pb.DeleteUserResponse:
        """Forget a user."""
        user_id = check.checked_user_id(request.user_id)
        return pb.DeleteUserResponse(deleted=await self._engine.delete(user_id))


class ReleaseMethods:
    """The ``Releases`` service on a repository."""

    def __init__(self, repository: ReleaseRepository, activation: Activation) -> None:
        self._repository = repository
        self._activation = activation

    async def ListReleases(
        self, request: pb.ListReleasesRequest, context: Any
    ) -> pb.ListReleasesResponse:
        """List the complete releases, newest first."""
        return pb.ListReleasesResponse(
            releases=[
                pb.Release(
                    release=info.number,
                    current=info.is_current,
                    previous=info.is_previous,
                    complete=True,
                    watermark_us=info.watermark_us,
                )
                for info in reversed(self._repository.releases())
            ],
            serving=self._activation.current.number,
        )

    async def ActivateRelease(
        self, request: pb.ActivateReleaseRequest, context: Any
    ) -> pb.ActivateReleaseResponse:
        """Serve another release."""
        if request.release <= 0:
            raise InputError(f"release is {request.release}; expected a number YYYYMMDDNN")
        await self._activation.activate(request.release)
        return self._flipped()

    async def RollBackRelease(
        self, request: pb.RollBackReleaseRequest, context: Any
    ) -> pb.ActivateReleaseResponse:
        """Serve the previous release."""
        await self._activation.roll_back()
        return self._flipped()

    def _flipped(self) -> pb.ActivateReleaseResponse:
        return pb.ActivateReleaseResponse(
            release=self._activation.current.number, previous=self._repository.previous() or 0
        )


def _passed_over(answer: "asyncio.Future[Any]") -> None:
    """Take an error that nobody is left to hear, so that asyncio does not complain of it."""
    if not answer.cancelled():
        answer.exception()


def _journal_entries(journal: Journal) -> list[pb.JournalEntry]:
    return [
        pb.JournalEntry(
            item_id=item_id,
            timestamp_us=timestamp_us,
            late=late,
            known_item=row != UNKNOWN_ROW,
        )
        for item_id, timestamp_us, late, row in zip(
            journal.item_ids,
            journal.timestamps_us.tolist(),
            journal.late.tolist(),
            journal.item_rows.tolist(),
            strict=True,
        )
    ]
