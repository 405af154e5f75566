"""Answers concurrent recommendation requests together: one of everything for a whole batch.

One read of the store, one look-up of all candidates, one call of the model, one pass that scores
and orders. What a request is answered with does not depend on the others of its batch, and all of
it comes from the release that the request began with. Requests gather as ``batching.py`` says;
only large searches, and reads of a store beyond the network, leave the event loop's thread.

State is folded lazily: a user whose sessions have closed since the last touch first goes through
the GRU, beside the batch, and joins a later one.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Coroutine, Hashable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import ServingError
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.ranking.answers import Answers
from hiertcn.serving.ranking.batching import Gatherer, ModelBatcher
from hiertcn.serving.ranking.last_embeddings import LastEmbeddings
from hiertcn.serving.ranking.listed import ListedCandidates, excluded_rows
from hiertcn.serving.ranking.requests import Recommendation, RecommendationRequest, fail
from hiertcn.serving.records import fold
from hiertcn.serving.records.fold import Sessions
from hiertcn.serving.records.record import NEVER_US, UserRecord, user_key
from hiertcn.serving.records.record_reader import RecordReader
from hiertcn.serving.records.writer import Writer
from hiertcn.serving.releases.serving_release import ServingRelease
from hiertcn.sessions.live_counts import MINUTE_US

_SHORT: Final = 32
"""Interactions up to which sessions share a model call: padding costs less than another call."""

_TURNS_TO_SEND: Final = 2
"""Turns of the event loop until grpc.aio has sent what it was given."""


class Recommendations:
    """Gathers requests and answers them.

    Args:
        records: reads user records.
        writer: keeps what was folded.
        models: the two models.
        metrics: where outcomes are counted.
        max_batch: most requests in one batch.
        max_delay_s: longest a request waits for others, in seconds.
    """

    def __init__(
        self,
        records: RecordReader,
        writer: Writer,
        models: ModelBatcher,
        metrics: Metrics,
        *,
        max_batch: int,
        max_delay_s: float,
    ) -> None:
        self._records = records
        self._writer = writer
        self._models = models
        self._metrics = metrics
        self._last = LastEmbeddings()
        self._answers = Answers(metrics)
        self._gatherer: Gatherer[RecommendationRequest] = Gatherer(
            self._run, max_batch=max_batch, max_delay_s=max_delay_s
        )
        metrics.queue_depth.labels("recommend").set_function(lambda: self._gatherer.waiting)
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(
        self, release: ServingRelease, request: RecommendationRequest
    ) -> Recommendation:
        """Rank for a request.

        Items that the release does not know are reported and skipped. If the models do not answer
        in time, the user's last embedding ranks instead; without one the newest session's mean
        item, and for a user without a session what is live and popular. ``fallback`` says so.

        Raises:
            InputError: a filter does not fit the release's item attributes.
            ServingError: the store cannot be reached.
        """
        loop = asyncio.get_running_loop()
        if request.filters:
            request.allowed = await self._answers.passing(release, request.filters)
        request.key = user_key(request.user_id)
        request.answer = loop.create_future()
        request.trace = self._metrics.stages.request()
        timer = (
            None
            if request.models_until is None
            else loop.call_at(request.models_until, _expire, request.answer)
        )
        self._gatherer.add(release, request)
        try:
            return await request.answer
        except TimeoutError:
            if request.record is None:
                self._prepare(release, [request], [await self._records.get(request.key)])
        except ServingError:
            if request.record is None:
                raise
        finally:
            if timer is not None:
                timer.cancel()
        request.answer = loop.create_future()
        await self._fall_back(release, request)
        return await request.answer

    def forget(self, user_id: str) -> None:
        """Drop what is remembered of a user beside the store."""
        self._last.forget(user_key(user_id))

    def under(self, release: ServingRelease, stored: UserRecord | None, user_id: str) -> UserRecord:
        """The user's record under the release, nothing folded further."""
        if stored is not None and stored.release == release.number:
            return release.resolved(stored)
        if stored is not None:
            self._metrics.rebuilds.inc()
        return fold.rebuilt(stored, user_id, release)

    def close(self) -> None:
        """End the search thread."""
        self._answers.close()

    async def _run(self, release: Hashable, batch: list[RecommendationRequest]) -> None:
        assert isinstance(release, ServingRelease)
        batch = [request for request in batch if not request.answer.done()]
        try:
            fresh = [request for request in batch if request.record is None]
            if fresh:
                for request in fresh:
                    self._ended("wait", request.came, [request])
                began = time.perf_counter()
                stored = await self._records.get_many([request.key for request in fresh])
                self._ended("read", began, fresh)
                read = list(zip(fresh, stored, strict=True))
                if damaged := [one for one, record in read if self._is_damaged(one, record)]:
                    self._start(self._repair(release, damaged))
                    fresh = [one for one in fresh if one not in damaged]
                    stored = [record for one, record in read if one not in damaged]
                self._prepare(release, fresh, stored)
                for request in fresh:
                    if request.cut.closed and not request.answer.done():
                        self._start(self._fold(release, request))
        except Exception as error:
            fail(batch, error)
            return
        groups: dict[tuple[bool, int], list[RecommendationRequest]] = defaultdict(list)
        for request in batch:
            if request.record is not None and not request.answer.done() and not request.cut.closed:
                is_long = len(request.cut.open_rows) > _SHORT
                groups[is_long, request.timestamp_us // MINUTE_US].append(request)
        await asyncio.gather(*(self._rank(release, group) for group in groups.values()))

    def _is_damaged(self, request: RecommendationRequest, stored: UserRecord | None) -> bool:
        return stored is None and not request.is_repaired and self._records.is_damaged(request.key)

    async def _repair(self, release: ServingRelease, requests: list[RecommendationRequest]) -> None:
        """Have damaged records made again, and let their requests join a later batch."""
        for request in requests:
            request.is_repaired = True
        try:
            await self._writer.repair([request.key for request in requests])
        except Exception as error:
            fail(requests, error)
        for request in requests:
            if not request.answer.done():
                self._gatherer.add(release, request)

    def _prepare(
        self,
        release: ServingRelease,
        requests: list[RecommendationRequest],
        stored: Sequence[UserRecord | None],
    ) -> None:
        """Find the requests' records and cut their sessions."""
        outdated = [
            place
            for place, record in enumerate(stored)
            if record is None or record.release != release.number
        ]
        snapshots = release.user_snapshots([requests[place].user_id for place in outdated])
        snapshot_at = dict(zip(outdated, snapshots, strict=True))
        for place, (request, record) in enumerate(zip(requests, stored, strict=True)):
            current = record
            if current is None or place in snapshot_at:
                current = fold.rebuilt_from(record, snapshot_at[place], release)
                if record is not None:
                    self._metrics.rebuilds.inc()
            is_rebuilt = current is not record
            current = release.resolved(current)
            request.base = None if record is None else record.revision
            request.record = current
            request.cut = fold.sessions(current, gap_us=release.gap_us, now_us=request.timestamp_us)
            if record is not None and is_rebuilt and not request.cut.closed:
                self._keep(release, request, current)

    def _keep(
        self, release: ServingRelease, request: RecommendationRequest, record: UserRecord
    ) -> None:
        self._writer.keep_fold(request.key, request.base, release.storable(record))

    async def _fold(self, release: ServingRelease, request: RecommendationRequest) -> None:
        record, cut = request.record, request.cut
        assert record is not None
        began = time.perf_counter()
        try:
            try:
                for rows, until_us in zip(cut.closed, cut.closed_until_us, strict=True):
                    mean = _mean(release, rows)
                    state = await self._models.next_state(release, record.state, mean)
                    record = fold.folded(record, state, until_us)
                    self._metrics.sessions_folded.inc()
            finally:
                # Also what was folded before a failure counts; the rest follows at the next touch.
                self._keep(release, request, record)
        except Exception as error:
            fail([request], error)
            return
        self._ended("fold", began, [request])
        if request.answer.done():
            return
        request.record = record
        request.cut = Sessions(closed=[], closed_until_us=[], open_rows=cut.open_rows)
        self._gatherer.add(release, request)

    async def _rank(self, release: ServingRelease, group: list[RecommendationRequest]) -> None:
        """Answer requests of one minute whose sessions are all short, or all long."""
        began = time.perf_counter()
        call = asyncio.ensure_future(
            self._models.user_embeddings(
                release,
                [request.cut.open_rows for request in group],
                [request.user.state[-1] for request in group],
            )
        )
        self._observe_ages(group)
        try:
            for _ in range(_TURNS_TO_SEND):
                await asyncio.sleep(0)
            # Looked up while the model is computed.
            prepared = time.perf_counter()
            listed = ListedCandidates.of(release, group)
            self._note(listed)
            self._ended("terms", prepared, listed.requests)
            embeddings = await call
            self._ended("model", began, group)
            for request, embedding in zip(group, embeddings, strict=True):
                self._last.keep(release.number, request.key, embedding)
            began = time.perf_counter()
            is_listed = np.array([request.candidates is not None for request in group])
            self._answers.give_listed(release, listed, embeddings[is_listed], fallback=False)
            self._ended("rank", began, listed.requests)
            for place in np.flatnonzero(~is_listed).tolist():
                request = group[place]
                self._look_up_excluded(release, request)
                terms = self._answers.terms(release, request)
                self._start(self._answers.give_searched(release, request, embeddings[place], terms))
        except Exception as error:
            call.cancel()
            fail(group, error)

    def _note(self, listed: ListedCandidates) -> None:
        for place, request in enumerate(listed.requests):
            request.rows = listed.rows[place, : listed.lengths[place]]
            request.unknown = listed.unknown[place]

    def _look_up_excluded(self, release: ServingRelease, request: RecommendationRequest) -> None:
        request.excluded = excluded_rows(release, request, request.unknown)

    async def _fall_back(self, release: ServingRelease, request: RecommendationRequest) -> None:
        """Answer without the models; the request is prepared."""
        if request.answer.done():
            return
        query = self._last.get(release.number, request.key)
        known_rows = fold.last_known_rows(request.user, request.cut)
        with_terms = query is not None
        listed = ListedCandidates.of(release, [request], with_terms=with_terms)
        self._note(listed)
        if request.candidates is None:
            self._look_up_excluded(release, request)
        elif not (listed.rows >= 0).any():
            self._answers.give(release, request, [], [])
            return
        if query is not None:
            self._metrics.fallbacks.labels("embedding").inc()
        elif len(known_rows):
            self._metrics.fallbacks.labels("session").inc()
            query = _mean(release, known_rows)
        else:
            self._metrics.fallbacks.labels("popularity").inc()
            self._answers.give_by_popularity(release, request)
            return
        if request.candidates is not None:
            self._answers.give_listed(release, listed, query[None], fallback=True)
        else:
            terms = self._answers.terms(release, request) if with_terms else None
            await self._answers.give_searched(release, request, query, terms, fallback=True)

    def _observe_ages(self, requests: Sequence[RecommendationRequest]) -> None:
        for request in requests:
            folded_until_us = request.user.folded_until_us
            if folded_until_us != NEVER_US:
                age_s = max(0, request.timestamp_us - folded_until_us) / 1e6
                self._metrics.state_age_seconds.observe(age_s)

    def _ended(self, stage: str, began: float, requests: Sequence[RecommendationRequest]) -> None:
        self._metrics.stages.ended(stage, began, [request.trace for request in requests])

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _mean(release: ServingRelease, rows: NDArray[np.int32]) -> NDArray[np.float32]:
    mean: NDArray[np.float32] = release.table.gather(rows).mean(axis=0, dtype=np.float32)
    return mean


def _expire(answer: "asyncio.Future[Recommendation]") -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())
