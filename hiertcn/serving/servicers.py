"""The gRPC methods: check the request, ask the engine, word the reply or the error.

Which status an error is answered with says ``status.py``.
"""

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message

from hiertcn.errors import InputError, ServingError
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving import validation as check
from hiertcn.serving.activation import Activation
from hiertcn.serving.engine import Engine
from hiertcn.serving.fold import UNKNOWN_ROW, unfolded
from hiertcn.serving.metrics import Metrics
from hiertcn.serving.record import NEVER_US, Journal
from hiertcn.serving.status import status_of

RECOMMENDER: Final = "hiertcn.v1.Recommender"
RELEASES: Final = "hiertcn.v1.Releases"


class RecommenderMethods:
    """The ``Recommender`` service on an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Recommend(self, request: pb.RecommendRequest) -> pb.RecommendResponse:
        """Rank candidates or the catalogue."""
        user_id = check.checked_user_id(request.user_id)
        ranks_candidates = bool(request.candidates) or request.candidates_only
        found = await self._engine.recommend(
            user_id,
            k=check.checked_k(request),
            candidates=(
                check.checked_items(request.candidates, "candidates") if ranks_candidates else None
            ),
            exclude=check.checked_items(request.exclude, "exclude"),
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
        self, request: pb.RecordInteractionsRequest
    ) -> pb.RecordInteractionsResponse:
        """Record interactions durably."""
        recorded = await self._engine.record(check.checked_interactions(request.interactions))
        return pb.RecordInteractionsResponse(
            accepted=recorded.accepted,
            duplicates=recorded.duplicates,
            late=recorded.late,
            unknown_items=recorded.unknown_items,
        )

    async def GetUser(self, request: pb.GetUserRequest) -> pb.GetUserResponse:
        """Show a user's record."""
        user_id = check.checked_user_id(request.user_id)
        view = self._engine.user(user_id)
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

    async def DeleteUser(self, request: pb.DeleteUserRequest) -> pb.DeleteUserResponse:
        """Forget a user."""
        user_id = check.checked_user_id(request.user_id)
        return pb.DeleteUserResponse(deleted=await self._engine.delete(user_id))


class ReleaseMethods:
    """The ``Releases`` service on a repository."""

    def __init__(self, repository: ReleaseRepository, activation: Activation) -> None:
        self._repository = repository
        self._activation = activation

    async def ListReleases(self, request: pb.ListReleasesRequest) -> pb.ListReleasesResponse:
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
        self, request: pb.ActivateReleaseRequest
    ) -> pb.ActivateReleaseResponse:
        """Serve another release."""
        if request.release <= 0:
            raise InputError(f"release is {request.release}; expected a number YYYYMMDDNN")
        await self._activation.activate(request.release)
        return self._flipped()

    async def RollBackRelease(
        self, request: pb.RollBackReleaseRequest
    ) -> pb.ActivateReleaseResponse:
        """Serve the previous release."""
        await self._activation.roll_back()
        return self._flipped()

    def _flipped(self) -> pb.ActivateReleaseResponse:
        return pb.ActivateReleaseResponse(
            release=self._activation.current.number, previous=self._repository.previous() or 0
        )


def service_handler(service: str, methods: object, metrics: Metrics) -> Any:
    """The generic gRPC handler of a service: every method of its descriptor, found by name."""
    descriptor = pb.DESCRIPTOR.services_by_name[service.rpartition(".")[2]]
    handlers = {
        method.name: _unary(
            method.name,
            getattr(methods, method.name),
            getattr(pb, method.input_type.name),
            getattr(pb, method.output_type.name),
            metrics,
        )
        for method in descriptor.methods
    }
    return grpc.method_handlers_generic_handler(service, handlers)


def _unary(
    name: str,
    method: Callable[[Any], Awaitable[Message]],
    request_type: type[Message],
    response_type: type[Message],
    metrics: Metrics,
) -> Any:
    def parse(data: bytes) -> Message | None:
        # gRPC answers an exception here with INTERNAL, but the fault is the caller's.
        try:
            return request_type.FromString(data)
        except DecodeError:
            return None

    seconds = metrics.request_seconds.labels(name)
    answered = metrics.requests.labels(name, "OK")

    async def handle(request: Message | None, context: Any) -> Message:
        began = time.perf_counter()
        try:
            if request is None:
                raise InputError(
                    f"the request is not a {request_type.DESCRIPTOR.full_name} message, or a text "
                    "field of it is not UTF-8; build it from recommender.proto"
                )
            reply = await method(request)
        except (InputError, ServingError) as error:
            code = status_of(error)
            metrics.requests.labels(name, code.name).inc()
            await context.abort(code, str(error))
            raise
        answered.inc()
        seconds.observe(time.perf_counter() - began)
        return reply

    return grpc.unary_unary_rpc_method_handler(
        handle, request_deserializer=parse, response_serializer=response_type.SerializeToString
    )


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
