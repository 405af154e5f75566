"""What the sidecar does with a request, free of gRPC: read state, fold, rank, record.

One event loop's thread runs it all; only the disk (``writer.py``) and large searches leave it.
A request takes the serving release once and answers from that object alone. State is folded
lazily: recording an interaction only appends to the journal, and the next recommendation pushes
the sessions that have closed since through the GRU and keeps the result.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import ServingError
from hiertcn.items.attribute_filters import AttributeFilter
from hiertcn.serving import fold
from hiertcn.serving.batching import ModelBatcher
from hiertcn.serving.event_log import LoggedDeletion, LoggedInteraction
from hiertcn.serving.fold import Outcome, Sessions
from hiertcn.serving.item_filters import Allowed
from hiertcn.serving.last_embeddings import LastEmbeddings
from hiertcn.serving.metrics import Metrics
from hiertcn.serving.ranking import (
    Ranked,
    rank_candidates,
    rank_candidates_by_popularity,
    rank_catalogue,
    rank_catalogue_by_popularity,
    rank_scored,
    rank_searched,
)
from hiertcn.serving.record import UserRecord, user_key
from hiertcn.serving.record_reader import RecordReader
from hiertcn.serving.scoring_terms import RequestTerms, one_history
from hiertcn.serving.serving_release import ServingRelease
from hiertcn.serving.store import RecordStore
from hiertcn.serving.writer import RecordWriter

SMALL_CATALOGUE: Final = 20_000
"""Items up to which a search runs on the event loop's thread."""

_MOST_LIVE: Final = 1000
"""Items of a large catalogue that are considered only because they are live."""


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """A ranked reply: ids and scores best first, all of one release."""

    release: int
    item_ids: list[str]
    scores: list[float]
    unknown_items: list[str]
    fallback: bool


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Counts of a recorded request: ``late`` and ``unknown_items`` are among ``accepted``."""

    accepted: int
    duplicates: int
    late: int
    unknown_items: list[str]


@dataclass(frozen=True, kw_only=True)
class UserView:
    """A user's record under the serving release, not folded further."""

    release: ServingRelease
    record: UserRecord


@dataclass(frozen=True)
class _Query:
    """What ranks: a vector ``u [dim]`` and the scoring terms, or live popularity without ``u``."""

    record: UserRecord
    u: NDArray[np.float32] | None
    terms: RequestTerms | None = None
    is_fallback: bool = False


class Engine:
    """Answers requests from the serving release, the store and the models.

    Args:
        current: gives the release that serves.
        store: the user records, read here, written by ``writer``.
        writer: logs and applies interactions.
        models: the batched models.
        metrics: where outcomes are counted.
    """

    def __init__(
        self,
        current: Callable[[], ServingRelease],
        store: RecordStore,
        writer: RecordWriter,
        models: ModelBatcher,
        metrics: Metrics,
    ) -> None:
        self._current = current
        self._records = RecordReader(store)
        self._writer = writer
        self._models = models
        self._metrics = metrics
        self._last = LastEmbeddings()
        self._searcher = ThreadPoolExecutor(1, thread_name_prefix="search")

    @property
    def release(self) -> ServingRelease:
        """The release that serves."""
        return self._current()

    async def recommend(
        self,
        user_id: str,
        *,
        k: int,
        candidates: Sequence[str] | None,
        exclude: Sequence[str],
        timestamp_us: int,
        exclude_seen: bool = False,
        filters: Sequence[AttributeFilter] = (),
        models_until: float | None = None,
    ) -> Recommendation:
        """Rank ``candidates``, or the catalogue if None, for the user at ``timestamp_us``.

        Items that the release does not know are reported and skipped. If the models do not answer
        in time, the user's last embedding ranks instead; without one the newest session's mean
        item, and for a user without a session what is live and popular. ``fallback`` says so.

        Args:
            user_id: for whom.
            k: how many items.
            candidates: items to rank; None for the catalogue.
            exclude: items never to return.
            timestamp_us: as of when.
            exclude_seen: leave out what the user has interacted with.
            filters: what items must pass.
            models_until: when to stop waiting for the models, in seconds of ``time.monotonic``.

        Raises:
            InputError: a filter does not fit the release's item attributes.
        """
        with self._current().held() as release:
            excluded_rows = release.item_rows(exclude)
            unknown = [
                item for item, row in zip(exclude, excluded_rows.tolist(), strict=True) if row < 0
            ]
            excluded_rows = excluded_rows[excluded_rows >= 0]
            rows: NDArray[np.int64] | None = None
            ids: list[str] = []
            if candidates is not None:
                ids = list(dict.fromkeys(candidates))
                rows = release.item_rows(ids)
                ids, rows, missing = _known(ids, rows, excluded_rows)
                unknown = missing + unknown
            allowed = await self._allowed(release, filters) if filters else None
            if rows is not None:
                if allowed is not None:
                    ids, rows = _kept(ids, rows, allowed.mask[rows])
                if not ids:
                    return self._reply(release, [], _EMPTY, unknown, fallback=False)
            query = await self._query(user_id, release, timestamp_us, models_until)
            if exclude_seen:
                seen = fold.seen_rows(query.record)
                excluded_rows = np.union1d(excluded_rows, seen)
                if rows is not None:
                    ids, rows = _kept(ids, rows, ~np.isin(rows, seen))
            if rows is not None:
                ranked = (
                    rank_candidates_by_popularity(release, rows, k, timestamp_us)
                    if query.u is None
                    else rank_candidates(release, query.u, rows, k, query.terms)
                )
                item_ids = [ids[place] for place in ranked.places.tolist()]
            else:
                ranked = (
                    rank_catalogue_by_popularity(release, excluded_rows, k, timestamp_us, allowed)
                    if query.u is None
                    else await self._search(release, query, excluded_rows, k, allowed)
                )
                item_ids = release.items.ids(ranked.places) if len(ranked.places) else []
            return self._reply(release, item_ids, ranked, unknown, fallback=query.is_fallback)

    async def record(self, interactions: Sequence[LoggedInteraction]) -> Recorded:
        """Log and apply the interactions; return once they are durable.

        Raises:
            ServingError: the disk is full or failing; nothing was acknowledged.
        """
        new = []
        keys = list(dict.fromkeys(user_key(interaction.user_id) for interaction in interactions))
        found = dict(zip(keys, await asyncio.gather(*map(self._records.get, keys)), strict=True))
        for interaction in interactions:
            record = found[user_key(interaction.user_id)]
            if record is None or not record.journal.contains(
                interaction.item_id, interaction.timestamp_us, interaction.key
            ):
                new.append(interaction)
        applied = await self._writer.commit(new) if new else []
        outcomes = [result.outcome for result in applied]
        duplicates = len(interactions) - len(new) + outcomes.count(Outcome.DUPLICATE)
        late = outcomes.count(Outcome.LATE)
        unknown = dict.fromkeys(
            interaction.item_id
            for interaction, result in zip(new, applied, strict=True)
            if not result.known_item and result.outcome is not Outcome.DUPLICATE
        )
        accepted = len(interactions) - duplicates
        self._metrics.interactions.labels("accepted").inc(accepted)
        self._metrics.interactions.labels("duplicate").inc(duplicates)
        self._metrics.interactions.labels("late").inc(late)
        self._metrics.unknown_items.labels("RecordInteractions").inc(len(unknown))
        return Recorded(
            accepted=accepted, duplicates=duplicates, late=late, unknown_items=list(unknown)
        )

    async def user(self, user_id: str) -> UserView | None:
        """What is known of the user, None if nothing is.

        Raises:
            ServingError: the store cannot be reached.
        """
        release = self._current()
        stored = await self._records.get(user_key(user_id))
        if stored is None and release.user_snapshot(user_id) is None:
            return None
        if stored is not None and _is_forgotten(stored, release):
            return None
        return UserView(release=release, record=self._under(release, stored, user_id))

    async def delete(self, user_id: str) -> bool:
        """Forget the user; return whether anything was known.

        Raises:
            ServingError: the disk is full or failing.
        """
        now_us = time.time_ns() // 1000
        known = await self.user(user_id) is not None
        if known:
            await self._writer.commit([LoggedDeletion(user_key(user_id), now_us)])
            self._last.forget(user_key(user_id))
        return known

    def close(self) -> None:
        """End the search thread."""
        self._searcher.shutdown(wait=False)
        self._records.close()

    async def _allowed(
        self, release: ServingRelease, filters: Sequence[AttributeFilter]
    ) -> Allowed:
        kept = release.filters.kept(filters)
        if kept is not None:
            return kept
        if len(release.items) <= SMALL_CATALOGUE:
            return release.filters.allowed(filters)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._searcher, release.filters.allowed, filters)

    async def _query(
        self,
        user_id: str,
        release: ServingRelease,
        timestamp_us: int,
        models_until: float | None,
    ) -> "_Query":
        key = user_key(user_id)
        stored = await self._records.get(key)
        record = self._under(release, stored, user_id)
        cut = fold.sessions(record, gap_us=release.gap_us, now_us=timestamp_us)
        base = stored.revision if stored is not None else None
        try:
            async with asyncio.timeout_at(models_until):
                if cut.closed:
                    record = await self._fold(key, base, record, cut, release)
                elif stored is not None and record is not stored:
                    self._writer.keep_fold(key, base, record)
                u = await self._models.user_embedding(release, cut.open_rows, record.state[-1])
        except (ServingError, TimeoutError):
            last = self._last.get(release.number, key)
            if last is not None:
                self._metrics.fallbacks.labels("embedding").inc()
                terms = self._terms(release, record, cut, timestamp_us)
                return _Query(record, last, terms, is_fallback=True)
            known_rows = fold.last_known_rows(record, cut)
            if len(known_rows):
                self._metrics.fallbacks.labels("session").inc()
                return _Query(record, _mean(release, known_rows), is_fallback=True)
            self._metrics.fallbacks.labels("popularity").inc()
            return _Query(record, None, is_fallback=True)
        self._last.keep(release.number, key, u)
        return _Query(record, u, self._terms(release, record, cut, timestamp_us))

    def _terms(
        self, release: ServingRelease, record: UserRecord, cut: Sessions, timestamp_us: int
    ) -> RequestTerms | None:
        if release.terms is None:
            return None
        history_rows, history_times_us = fold.history(record)
        histories = one_history(
            history_rows,
            history_times_us,
            running=len(cut.open_rows),
            gap_us=release.gap_us,
        )
        return release.terms.at(histories, release.live.at(timestamp_us))

    async def _fold(
        self,
        key: bytes,
        base_revision: int | None,
        record: UserRecord,
        cut: Sessions,
        release: ServingRelease,
    ) -> UserRecord:
        try:
            for rows, until_us in zip(cut.closed, cut.closed_until_us, strict=True):
                state = await self._models.next_state(release, record.state, _mean(release, rows))
                record = fold.folded(record, state, until_us)
                self._metrics.sessions_folded.inc()
        finally:
            # Also what was folded before a failure counts; the rest follows at the next touch.
            self._writer.keep_fold(key, base_revision, record)
        return record

    def _under(
        self, release: ServingRelease, stored: UserRecord | None, user_id: str
    ) -> UserRecord:
        if stored is not None and stored.release == release.number:
            return stored
        if stored is not None:
            self._metrics.rebuilds.inc()
        return fold.rebuilt(stored, user_id, release)

    async def _search(
        self,
        release: ServingRelease,
        query: _Query,
        excluded: NDArray[np.int64],
        k: int,
        allowed: Allowed | None,
    ) -> Ranked:
        assert query.u is not None
        is_small = len(release.items) <= SMALL_CATALOGUE
        search: Callable[..., Ranked] = rank_catalogue
        arguments: tuple[Any, ...] = (release, query.u, excluded, k)
        if query.terms is not None or allowed is not None:
            dots = release.neighbors.scores(query.u) if is_small else None
            if dots is not None:
                return rank_scored(dots, excluded, k, query.terms, allowed)
        if query.terms is not None:
            # The terms share scratch memory, so their part never leaves this thread.
            search, arguments = rank_searched, (*arguments, query.terms.support(_MOST_LIVE))
        if is_small:
            return search(*arguments, allowed)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._searcher, search, *arguments, allowed)

    def _reply(
        self,
        release: ServingRelease,
        item_ids: list[str],
        ranked: Ranked,
        unknown: list[str],
        *,
        fallback: bool,
    ) -> Recommendation:
        if unknown:
            self._metrics.unknown_items.labels("Recommend").inc(len(unknown))
        return Recommendation(
            release=release.number,
            item_ids=item_ids,
            scores=ranked.scores.tolist(),
            unknown_items=unknown,
            fallback=fallback,
        )


_EMPTY: Final = Ranked(np.empty(0, np.int64), np.empty(0, np.float32))


def _known(
    ids: list[str], rows: NDArray[np.int64], excluded: NDArray[np.int64]
) -> tuple[list[str], NDArray[np.int64], list[str]]:
    kept = rows >= 0
    missing = [ids[place] for place in np.flatnonzero(~kept).tolist()]
    if len(excluded):
        kept &= ~np.isin(rows, excluded)
    return *_kept(ids, rows, kept), missing


def _kept(
    ids: list[str], rows: NDArray[np.int64], kept: NDArray[np.bool_]
) -> tuple[list[str], NDArray[np.int64]]:
    if kept.all():
        return ids, rows
    return [ids[place] for place in np.flatnonzero(kept).tolist()], rows[kept]


def _is_forgotten(record: UserRecord, release: ServingRelease) -> bool:
    return not len(record.journal) and record.erased_us >= release.watermark_us


def _mean(release: ServingRelease, rows: NDArray[np.int32]) -> NDArray[np.float32]:
    mean: NDArray[np.float32] = release.table.gather(rows).mean(axis=0, dtype=np.float32)
    return mean
