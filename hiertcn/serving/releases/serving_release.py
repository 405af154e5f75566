"""A release opened for serving: everything that one reply is computed from, as one object.

A request takes the object once and uses nothing else, so no reply ever mixes two releases.
Opening maps files and costs milliseconds at any size; the files stay mapped, even if the release
is pruned, until the last request that holds the object ends.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError, ReleaseError
from hiertcn.export.tensors import ITEM_ENCODER
from hiertcn.export.term_gate import TERMS_FILE
from hiertcn.items.attribute_filters import AttributeFilter
from hiertcn.items.attributes import ITEM_ATTRIBUTES, ItemAttributes
from hiertcn.items.index import IdIndex
from hiertcn.items.neighbors import NeighborIndex
from hiertcn.items.table import ItemTable
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.live.live_followers import ReleasedTransitions
from hiertcn.serving.live.live_windows import LiveWindows, MinuteCounts
from hiertcn.serving.live.recent_interactions import RecentInteractions
from hiertcn.serving.log.logged_items import LoggedItem
from hiertcn.serving.new_items.item_embedding import NewItemEncoding
from hiertcn.serving.new_items.item_overlay import (
    CatalogueItems,
    CatalogueNeighbors,
    CatalogueTable,
    ItemOverlay,
)
from hiertcn.serving.ranking.candidate_ranking import drop_repeats, rank_together, without_terms
from hiertcn.serving.ranking.item_filters import Allowed, ItemFilters
from hiertcn.serving.ranking.scoring_terms import ScoringTerms
from hiertcn.serving.records.record import UserRecord
from hiertcn.serving.records.snapshot import (
    LIVE_COUNTS,
    LIVE_TRANSITIONS,
    TRANSITIONS,
    StateSnapshot,
    UserSnapshot,
)

_NEW_ITEMS_ROOM: Final = 1024
"""Live counts are widened for this many items more than are there."""

_POPULAR_ROWS: Final = 16_000
"""Enough for the largest k after the largest list of exclusions and a full journal."""


class ServingRelease:
    """The mapped parts of one release.

    Attributes:
        number: the release number, and the version of its models in Triton.
        table: item vectors ``[items, dim]``, new items' (``item_overlay.py``) behind its own.
        items: index from item id to row, likewise.
        neighbors: nearest-neighbour index over the table, likewise.
        overlay: the new items among them.
        new_item_encoding: what embeds them, None in a release without an item encoder.
        snapshot: user states at the watermark.
        start_state: float32 ``[layers, hidden]``.
        popularity: float32 ``[items]``.
        popular_rows: int64, rows by falling popularity, at most 16,000.
        attributes: what the items file says of the items, None in older releases.
        filters: which items pass conditions on them.
        terms: the memory and freshness terms, None where the model has none.
        live: how often items were interacted with in the last minutes.
        gap_us: idle time that closes a session.
        watermark_us: event time up to which the snapshot has seen the log.
        in_flight: requests that hold the release.
    """

    def __init__(
        self,
        repository: ReleaseRepository,
        number: int,
        recent: RecentInteractions | None = None,
        item_memory: str = "mapped",
    ) -> None:
        """Map the release's parts.

        Args:
            repository: where the release is.
            number: which one.
            recent: the interactions recorded here, which the live counts go on with.
            item_memory: how the item table is held, as in ``SidecarOptions``.

        Raises:
            ReleaseError: a part is missing, unreadable, or its shape contradicts another's.
        """
        path = repository.path(number)
        settings = repository.manifest(number).settings
        self._hold = repository.hold(number)
        self.number = number
        try:
            index = IdIndex.open(path / "item_index")
            table = ItemTable.open(
                path / "item_table",
                prefault=item_memory == "prefault",
                anonymous_huge_pages=item_memory == "huge-pages",
            )
            neighbors = NeighborIndex.open(path / "neighbor_index", table)
            self.overlay = ItemOverlay(len(index), table.dim)
            self.items = CatalogueItems(index, self.overlay)
            self.table = CatalogueTable(table, self.overlay)
            self.neighbors = CatalogueNeighbors(neighbors, self.overlay)
            self.snapshot = StateSnapshot.open(path / "user_states")
            self.start_state: NDArray[np.float32] = np.load(
                path / "start_state.npy", allow_pickle=False
            )
            self.popularity: NDArray[np.float32] = np.load(
                path / "popularity.npy", allow_pickle=False
            )
            self.new_item_encoding = (
                NewItemEncoding.open(path, self.popularity)
                if repository.has_model(ITEM_ENCODER, number)
                else None
            )
            attributes = path / ITEM_ATTRIBUTES
            self.attributes = ItemAttributes.open(attributes) if attributes.exists() else None
            self.terms = self._open_terms(path)
            counted = path / "user_states" / LIVE_COUNTS
            before = MinuteCounts.open(counted) if counted.is_dir() else None
            followed = path / "user_states" / LIVE_TRANSITIONS
            transitions = ReleasedTransitions.open(followed) if followed.is_dir() else None
        except ReleaseError:
            raise
        except (InputError, OSError, ValueError) as error:
            raise ReleaseError(f"release {number} cannot be served: {error}") from error
        self.gap_us = self.snapshot.gap_us
        self.watermark_us = self.snapshot.watermark_us
        self.in_flight = 0
        self.filters = ItemFilters(self.attributes)
        self._check_shapes(settings.get("dim"))
        count = min(_POPULAR_ROWS, len(self.popularity))
        self.popular_rows: NDArray[np.int64] = np.argsort(-self.popularity, kind="stable")[:count]
        # Below 1, so that it orders only items that are equally live.
        self._popularity_share: NDArray[np.float32] = self.popularity / np.float32(
            1.0 + self.popularity.max(initial=0.0)
        )
        self._recent = recent or RecentInteractions()
        self._counted_before, self._transitions_before = before, transitions
        self._live_room = len(self.items)
        self.live = self._count_live()

    @property
    def dim(self) -> int:
        """Length of an item vector."""
        return self.table.dim

    @contextlib.contextmanager
    def held(self) -> Iterator["ServingRelease"]:
        """Count a request that uses this release, so its models are not unloaded under it."""
        self.in_flight += 1
        try:
            yield self
        finally:
            self.in_flight -= 1

    def let_go(self) -> None:
        """Allow that the release is pruned; requests that still hold it may go on."""
        self._hold.close()

    def item_rows(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of the items, -1 where unknown."""
        if not item_ids:
            return np.empty(0, np.int64)
        return self.items.rows(item_ids)

    def released_rows(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of the items that the release itself knows, -1 for others and new ones."""
        if not item_ids:
            return np.empty(0, np.int64)
        return self.items.released.rows(item_ids)

    def add_new(self, items: Sequence[LoggedItem], vectors: NDArray[np.float32]) -> None:
        """Make new items candidates; on the thread that asks the live counts.

        Args:
            items: none of which the release knows.
            vectors: float32 ``[n, dim]``.
        """
        needed = len(self.items) + len(items)
        if needed > self._live_room:
            self._live_room = needed + _NEW_ITEMS_ROOM
            self.live.widen(self._live_room)
        self.overlay.add(items, vectors)

    def recount_live(self) -> None:
        """Count live interactions anew, which then include those with new items before they came.

        Not while requests use the release.
        """
        self.live = self._count_live()

    def resolved(self, record: UserRecord) -> UserRecord:
        """A record of this release with the rows of new items, which are never stored."""
        journal = record.journal
        if not len(self.overlay) or not len(journal):
            return record
        unknown = np.flatnonzero(journal.item_rows < 0)
        if not len(unknown):
            return record
        rows = journal.item_rows.copy()
        # Decoding the ids of a long journal would take longer than ranking.
        for place in unknown.tolist():
            start, end = journal.id_offsets[place : place + 2].tolist()
            rows[place] = self.overlay.row(journal.id_text[start:end].decode())
        return replace(record, journal=journal.with_rows(rows))

    def storable(self, record: UserRecord) -> UserRecord:
        """A record of this release without the rows of new items."""
        if not len(self.overlay) or not len(record.journal):
            return record
        rows = record.journal.item_rows
        new = rows >= self.overlay.first_row
        if not new.any():
            return record
        stored = np.where(new, -1, rows).astype(np.int32)
        return replace(record, journal=record.journal.with_rows(stored))

    def with_new_items(self, allowed: Allowed, filters: Sequence[AttributeFilter]) -> Allowed:
        """What passes some filters among the release's items, and the new items that pass."""
        if not len(self.overlay) or self.attributes is None:
            return allowed
        new = self.overlay.passing(filters, self.attributes.kinds)
        return Allowed(np.concatenate([allowed.mask, new]))

    def liveness(self, rows: NDArray[np.int64], timestamp_us: int) -> NDArray[np.float32]:
        """What items rank by without a user: live interactions, then popularity; float32 ``[n]``.

        An interaction counts once for each window that holds it, so newer ones weigh
        more; among equally live items the more popular one is ahead.
        """
        live: NDArray[np.float32] = self.live.at(timestamp_us).of(rows).sum(axis=0)
        released = rows < self.overlay.first_row
        return live + np.where(
            released, self._popularity_share[np.where(released, rows, 0)], np.float32(0)
        )

    def user_snapshot(self, user_id: str) -> UserSnapshot | None:
        """What the snapshot knows of the user, None for an unknown user."""
        return self.snapshot.lookup(user_id)

    def user_snapshots(self, user_ids: Sequence[str]) -> list[UserSnapshot | None]:
        """The same of many users ``[n]``, in one look-up."""
        if not user_ids:
            return []
        rows = self.snapshot.rows(user_ids).tolist()
        return [None if row < 0 else self.snapshot.at(row) for row in rows]

    def last_interactions(
        self, user_ids: Sequence[str], until_us: int
    ) -> list[tuple[str, int] | None]:
        """Item and time of each user's last interaction up to a time that the snapshot knows."""
        rows, times_us = [], []
        for found in self.user_snapshots(user_ids):
            times = np.empty(0) if found is None else found.history_timestamps_us
            at = int(np.searchsorted(times, until_us, side="right")) - 1
            rows.append(int(found.history_item_rows[at]) if found is not None and at >= 0 else -1)
            times_us.append(int(times[at]) if at >= 0 else until_us)
        item_ids = iter(self.items.ids([row for row in rows if row >= 0]))
        return [
            (next(item_ids), time_us) if row >= 0 else None
            for row, time_us in zip(rows, times_us, strict=True)
        ]

    def warm(self) -> None:
        """Make every look-up once, so that none is compiled or faulted in under a request."""
        first = self.items.ids([0])
        rows = self.item_rows([*first, ""])
        self.user_snapshot("")
        vectors = self.table.gather(rows[:1])
        self.neighbors.search(vectors, 1)
        self.table.dots(rows[None, :1], vectors)
        live = self.live.at(self.watermark_us)
        drop_repeats(rows, np.array([0, len(rows)]))
        rank_together(np.zeros((1, 1), np.float32), rows[None, :1], [1], without_terms(1))
        if self.terms is not None:
            self.terms.warm(live)

    def _count_live(self) -> LiveWindows:
        self._live_room = len(self.items)
        return LiveWindows(
            self._live_room,
            self.item_rows,
            self.watermark_us,
            self._recent,
            self._counted_before,
            self._transitions_before,
        )

    def _open_terms(self, path: Path) -> ScoringTerms | None:
        gate = path / TERMS_FILE
        if not gate.exists():
            return None
        return ScoringTerms.open(
            gate,
            path / "user_states" / TRANSITIONS,
            items=len(self.items),
        )

    def _check_shapes(self, dim: int | None) -> None:
        layers, hidden = self.start_state.shape if self.start_state.ndim == 2 else (0, 0)
        facts = (
            ("rows of item_table", len(self.table), "ids of item_index", len(self.items)),
            (
                "length of popularity.npy",
                len(self.popularity),
                "ids of item_index",
                len(self.items),
            ),
            (
                "rows of item_attributes",
                len(self.items) if self.attributes is None else len(self.attributes),
                "ids of item_index",
                len(self.items),
            ),
            ("dim of item_table", self.table.dim, "dim in the manifest", dim or self.table.dim),
            ("layers of user_states", self.snapshot.layers, "layers of start_state.npy", layers),
            ("hidden of user_states", self.snapshot.hidden, "hidden of start_state.npy", hidden),
        )
        for name, value, other, expected in facts:
            if value != expected:
                raise ReleaseError(
                    f"release {self.number} does not fit together: {name} is {value} but {other} "
                    f"is {expected}; publish it again"
                )
