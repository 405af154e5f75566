"""What the sidecar does with a request, free of gRPC: recommend, record, show, forget.

One event loop's thread runs it all; only the disk (``writer.py``) and large searches leave it.
A request takes the serving release once and answers from that object alone. Recording an
interaction only appends to the journal; recommendations (``recommendations.py``) fold what has
closed since.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

from hiertcn.items.attribute_filters import AttributeFilter
from hiertcn.items.texts import Texts
from hiertcn.serving.log.event_log import LoggedDeletion, LoggedInteraction
from hiertcn.serving.new_items.item_upserts import CheckedItem, ItemUpserts, Upserted
from hiertcn.serving.observability.metrics import Metrics
from hiertcn.serving.ranking.batching import BatchQueue, ModelBatcher
from hiertcn.serving.ranking.recommendations import Recommendations
from hiertcn.serving.ranking.requests import Recommendation, RecommendationRequest
from hiertcn.serving.records.applying import Applied
from hiertcn.serving.records.fold import Outcome
from hiertcn.serving.records.record import UserRecord, user_key
from hiertcn.serving.records.record_reader import RecordReader
from hiertcn.serving.records.writer import Writer
from hiertcn.serving.releases.serving_release import ServingRelease
from hiertcn.serving.stores.store import RecordStore

_TOGETHER: Final = "interactions"
_MAX_COMMITS: Final = 1024


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


class Engine:
    """Answers requests from the serving release, the store and the models.

    Args:
        current: gives the release that serves.
        store: the user records, read here, written by ``writer``.
        writer: logs and applies interactions.
        models: the batched models.
        metrics: where outcomes are counted.
        upserts: takes new items in.
        max_batch: most recommendations in one batch.
        max_delay_s: longest one of them waits for others, in seconds.
    """

    def __init__(
        self,
        current: Callable[[], ServingRelease],
        store: RecordStore,
        writer: Writer,
        models: ModelBatcher,
        metrics: Metrics,
        upserts: ItemUpserts,
        *,
        max_batch: int = 64,
        max_delay_s: float = 0.001,
    ) -> None:
        self._current = current
        self._upserts = upserts
        self._records = RecordReader(store)
        self._writer = writer
        self._metrics = metrics
        self._commits: BatchQueue[Sequence[LoggedInteraction], list[Applied]] = BatchQueue(
            self._commit_together, max_batch=_MAX_COMMITS, max_delay_s=max_delay_s
        )
        self._recommendations = Recommendations(
            self._records, writer, models, metrics, max_batch=max_batch, max_delay_s=max_delay_s
        )

    @property
    def release(self) -> ServingRelease:
        """The release that serves."""
        return self._current()

    async def recommend(
        self,
        user_id: str,
        *,
        k: int,
        candidates: Sequence[str] | Texts | None,
        exclude: Sequence[str],
        timestamp_us: int,
        exclude_seen: bool = False,
        filters: Sequence[AttributeFilter] = (),
        models_until: float | None = None,
    ) -> Recommendation:
        """Rank ``candidates``, or the catalogue if None, for the user at ``timestamp_us``.

        Arguments are those of `RecommendationRequest`, see :meth:`Recommendations.answer`.

        Raises:
            InputError: a filter does not fit the release's item attributes.
            ServingError: the store cannot be reached.
        """
        if candidates is not None and not isinstance(candidates, Texts):
            candidates = Texts.of(candidates)
        request = RecommendationRequest(
            user_id=user_id,
            k=k,
            candidates=candidates,
            exclude=exclude,
            timestamp_us=timestamp_us,
            exclude_seen=exclude_seen,
            filters=filters,
            models_until=models_until,
        )
        with self._current().held() as release:
            return await self._recommendations.answer(release, request)

    async def record(self, interactions: Sequence[LoggedInteraction]) -> Recorded:
        """Log and apply the interactions; return once they are durable.

        Raises:
            ServingError: the disk is full or failing; nothing was acknowledged.
        """
        new = []
        keys = list(dict.fromkeys(user_key(interaction.user_id) for interaction in interactions))
        found = dict(zip(keys, await self._records.get_many(keys), strict=True))
        for interaction in interactions:
            record = found[user_key(interaction.user_id)]
            if record is None or not record.journal.contains(
                interaction.item_id, interaction.timestamp_us, interaction.key
            ):
                new.append(interaction)
        applied: list[Applied] = []
        if new:
            began = time.perf_counter()
            applied = await self._commits.submit(_TOGETHER, new)
            stages = self._metrics.stages
            stages.ended("commit", began, [stages.request()])
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

    async def _commit_together(
        self, _: Hashable, waiting: list[Sequence[LoggedInteraction]]
    ) -> list[list[Applied]]:
        """Hand over what several requests record in one piece: each hand-over stops two threads."""
        applied = iter(await self._writer.commit([*chain.from_iterable(waiting)]))
        return [list(islice(applied, len(interactions))) for interactions in waiting]

    async def upsert(self, items: Sequence[CheckedItem]) -> Upserted:
        """Log new items and make them candidates; return once both is done.

        Raises:
            InputError: an attribute does not fit the serving release; nothing is kept.
            ReleaseError: the serving release has no item encoder; nothing is kept.
            OverloadError: there are too many new items; nothing is kept.
            ServingError: the disk or the item encoder fails; in the latter case the items are
                durable.
        """
        return await self._upserts.upsert(items, self._current, self._writer.commit)

    async def user(self, user_id: str) -> UserView | None:
        """What is known of the user, None if nothing is.

        Raises:
            ServingError: the store cannot be reached.
        """
        release = self._current()
        key = user_key(user_id)
        stored = await self._records.get(key)
        if stored is None and self._records.is_damaged(key):
            await self._writer.repair([key])
            stored = await self._records.get(key)
        if stored is None and release.user_snapshot(user_id) is None:
            return None
        if stored is not None and _is_forgotten(stored, release):
            return None
        record = self._recommendations.under(release, stored, user_id)
        return UserView(release=release, record=record)

    async def delete(self, user_id: str) -> bool:
        """Forget the user; return whether anything was known.

        Raises:
            ServingError: the disk is full or failing.
        """
        now_us = time.time_ns() // 1000
        known = await self.user(user_id) is not None
        if known:
            await self._writer.commit([LoggedDeletion(user_key(user_id), now_us)])
            self._recommendations.forget(user_id)
        return known

    def close(self) -> None:
        """End the threads."""
        self._recommendations.close()
        self._records.close()


def _is_forgotten(record: UserRecord, release: ServingRelease) -> bool:
    return not len(record.journal) and record.erased_us >= release.watermark_us
