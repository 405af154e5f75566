"""Takes new items in between builds: log first, then embed, then they are candidates.

Whatever the log holds of items is what every opened release shall know beside its own: an upsert,
a start and a flip of release all end in :meth:`ItemUpserts.bring_up`, which embeds what a release's
overlay lacks. So a new item survives restarts, is embedded anew by the next release's encoder if
that release does not know it, and is the release's own as soon as it does.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError, ReleaseError, ServingError
from hiertcn.export.tensors import ITEM_EMBEDDING, ITEM_ENCODER, MAX_BATCH
from hiertcn.serving.inference.inference import Inference
from hiertcn.serving.log.logged_items import Attribute, LoggedItem, pack
from hiertcn.serving.new_items.new_items import NewItems
from hiertcn.serving.releases.serving_release import ServingRelease

RowsOf = Callable[[Sequence[str]], NDArray[np.int64]]
"""Rows of ids in a release, -1 where it does not know one."""

_DEADLINE_S: Final = 30.0
_MAX_ENTRY_BYTES: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CheckedItem:
    """What a request says of an item; fields as in ``LoggedItem``."""

    item_id: str
    attributes: Mapping[str, Attribute]
    neighbors: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Upserted:
    """What became of upserted items.

    Attributes:
        release: the release they were embedded under.
        known_items: those that the release knows by itself: kept for the next daily run only.
        without_features: those of which the release encodes no attribute.
        unknown_neighbors: neighbors that the release does not know, and that were passed over.
    """

    release: int
    known_items: list[str]
    without_features: list[str]
    unknown_neighbors: list[str]


class ItemUpserts:
    """Brings new items into releases; one event loop's thread uses it.

    Args:
        new_items: the durable set.
        inference: runs the item encoder.
    """

    def __init__(self, new_items: NewItems, inference: Inference) -> None:
        self.new_items = new_items
        self._inference = inference
        self._releases: Sequence[RowsOf] = ()
        self._bringing: WeakKeyDictionary[ServingRelease, asyncio.Lock] = WeakKeyDictionary()

    async def upsert(
        self,
        checked: Sequence[CheckedItem],
        current: Callable[[], ServingRelease],
        commit: Callable[[Sequence[LoggedItem]], Awaitable[object]],
    ) -> Upserted:
        """Make the items durable, then candidates of the release that serves by then.

        Args:
            checked: one of each id.
            current: gives the release that serves.
            commit: logs the items and puts them into the set; returns when they are durable.

        Raises:
            InputError: an attribute does not fit the serving release; nothing is kept.
            ReleaseError: the serving release has no item encoder; nothing is kept.
            OverloadError: there are too many new items; nothing is kept.
            ServingError: the disk is full (nothing is kept), or the encoder does not answer: the
                items are durable then, and a retry, a restart or a flip embeds them.
        """
        release = current()
        if release.new_item_encoding is None:
            raise ReleaseError(
                f"release {release.number} has no item encoder, so it cannot take new items; "
                "publish one with this version"
            )
        for place, one in enumerate(checked):
            release.new_item_encoding.check(one.attributes, f"items[{place}].attributes")
        # Nothing is awaited from here to the log's queue, so it holds versions in their order.
        items = [
            LoggedItem(
                version=self.new_items.next_version(),
                received_us=time.time_ns() // 1000,
                **vars(one),
            )
            for one in checked
        ]
        _refuse_too_large(items)
        ids = [item.item_id for item in items]
        settled = self._known_to_all(ids)
        new = [item for item, known in zip(items, settled.tolist(), strict=True) if not known]
        with self.new_items.room_for(new):
            await commit(items)
        self.new_items.forget([ids[place] for place in np.flatnonzero(settled).tolist()])
        while True:
            release = current()
            with release.held():
                await self.bring_up(release)
            if release is current():
                return self._told(items, release)

    async def bring_up(self, release: ServingRelease) -> None:
        """Embed what the release lacks of the new items; nothing if it has no item encoder.

        Raises:
            ServingError: the encoder does not answer.
        """
        lock = self._bringing.setdefault(release, asyncio.Lock())
        async with lock:
            while not self.is_complete(release):
                lacking = self.new_items.since(release.overlay.version)
                known = release.released_rows([item.item_id for item in lacking]) >= 0
                wanted = [
                    item for item, has in zip(lacking, known.tolist(), strict=True) if not has
                ]
                for start in range(0, len(wanted), MAX_BATCH[ITEM_ENCODER]):
                    part = wanted[start : start + MAX_BATCH[ITEM_ENCODER]]
                    release.add_new(part, await self._embedded(part, release))
                release.overlay.pass_over(lacking[-1].version)

    def is_complete(self, release: ServingRelease) -> bool:
        """Whether the release has every new item that it can have."""
        if release.new_item_encoding is None:
            return True
        return not self.new_items.since(release.overlay.version)

    def settle(self, releases: Sequence[RowsOf]) -> None:
        """Forget, now and from now on, what every release that may serve knows by itself.

        Args:
            releases: how each gives the rows of ids in it.
        """
        self._releases = releases
        ids = [item.item_id for item in self.new_items.since(0)]
        known = self._known_to_all(ids)
        self.new_items.forget([ids[place] for place in np.flatnonzero(known).tolist()])

    def _known_to_all(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        known = np.full(len(ids), bool(self._releases))
        for rows_of in self._releases if ids else ():
            known &= rows_of(ids) >= 0
        return known

    async def _embedded(
        self, items: Sequence[LoggedItem], release: ServingRelease
    ) -> NDArray[np.float32]:
        encoding = release.new_item_encoding
        assert encoding is not None
        encoded = await asyncio.to_thread(encoding.encode, items, release.released_rows)
        vectors = await self._inference.run(
            ITEM_ENCODER,
            release.number,
            encoded,
            ITEM_EMBEDDING,
            timeout_s=_DEADLINE_S,
        )
        if vectors.shape != (len(items), release.dim - 1) or not np.isfinite(vectors).all():
            raise ServingError(
                f"the item encoder of release {release.number} returned {list(vectors.shape)}; "
                f"expected finite [{len(items)}, {release.dim - 1}], so publish the release again"
            )
        prior = np.full((len(items), 1), encoding.prior, np.float32)
        return np.concatenate([vectors, prior], axis=1)

    def _told(self, items: Sequence[LoggedItem], release: ServingRelease) -> Upserted:
        ids = [item.item_id for item in items]
        known = release.released_rows(ids) >= 0
        neighbors = list(dict.fromkeys(one for item in items for one in item.neighbors))
        unknown = release.released_rows(neighbors) < 0
        encoding = release.new_item_encoding
        return Upserted(
            release=release.number,
            known_items=[ids[place] for place in np.flatnonzero(known).tolist()],
            without_features=[
                item.item_id
                for item, is_known in zip(items, known.tolist(), strict=True)
                if not is_known and (encoding is None or encoding.is_bare(item))
            ],
            unknown_neighbors=[neighbors[place] for place in np.flatnonzero(unknown).tolist()],
        )


def _refuse_too_large(items: Sequence[LoggedItem]) -> None:
    for place, item in enumerate(items):
        size = len(pack(item))
        if size > _MAX_ENTRY_BYTES:
            raise InputError(
                f"items[{place}] takes {size} bytes in the log; expected at most "
                f"{_MAX_ENTRY_BYTES}, so send shorter attributes"
            )
