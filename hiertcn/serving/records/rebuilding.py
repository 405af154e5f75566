"""Rebuilds active users' records for a release that is about to serve, as a process of its own.

    python -m hiertcn.serving.records.rebuilding DESCRIPTOR < SETTINGS.json

starts one; ``warmer.py`` does. Tens of thousands of rebuilds in the process that answers requests
would take turns with them in its interpreter; this one takes the processor time that is left over.

The record of everyone who interacted lately is written to the open file DESCRIPTOR, under the new
release and with its closed sessions folded; then their number is printed. Records know no user ids,
so the new snapshot's users are hashed once to find their rows. Memory is bounded by 60 bytes an
active user and one batch.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import HiertcnError
from hiertcn.export.tensors import GRU_STEP
from hiertcn.items.index import IdIndex
from hiertcn.items.table import ItemTable
from hiertcn.release.repository import ReleaseRepository
from hiertcn.serving.options import STORE_FOLDER, SidecarOptions
from hiertcn.serving.records import fold
from hiertcn.serving.records.batch_fold import fold_closed
from hiertcn.serving.records.gru_step import GruStep
from hiertcn.serving.records.loop_share import give_way
from hiertcn.serving.records.record import UserRecord, encode, user_key
from hiertcn.serving.records.snapshot import StateSnapshot
from hiertcn.serving.stores.crash_note import crashes_noted
from hiertcn.serving.stores.store import RecordStore
from hiertcn.serving.stores.store_opening import open_to_read

_log = logging.getLogger(__name__)

_SCANNED: Final = 512
_FOLDED: Final = 256
_HASHED: Final = 4096
_REBUILT: Final = struct.Struct("<16sII")


@dataclass(frozen=True, kw_only=True)
class Rebuilding:
    """What is to be rebuilt.

    Attributes:
        sidecar: options of the process that writes the store.
        release: for which release.
        active_since_us: users without an interaction since then are left out.
        folded_until_us: sessions that are closed at this time are folded.
        only_known: leave out users who met an item that the release does not know: the sidecar
            may know it as a new item.
        aside: run only where a processor has nothing else to do.
    """

    sidecar: SidecarOptions
    release: int
    active_since_us: int
    folded_until_us: int
    only_known: bool
    aside: bool

    def to_json(self) -> str:
        """For the process' standard input."""
        return json.dumps({**vars(self), "sidecar": self.sidecar.to_plain()})

    @classmethod
    def from_json(cls, text: str) -> "Rebuilding":
        """Read what :meth:`to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(**{**values, "sidecar": SidecarOptions.from_plain(values["sidecar"])})


def rebuilt_records(file: BinaryIO) -> Iterator[tuple[bytes, int, bytes]]:
    """Key, revision of the stored record, and the rebuilt record's bytes, of all in the file.

    The last one may be cut off, where the process was stopped; it is left out.
    """
    file.seek(0)
    while len(head := file.read(_REBUILT.size)) == _REBUILT.size:
        key, base, size = _REBUILT.unpack(head)
        if len(stored := file.read(size)) < size:
            return
        yield key, base, stored


class _Release:
    """What rebuilding needs of a release."""

    def __init__(self, repository: ReleaseRepository, number: int) -> None:
        path = repository.path(number)
        self.number = number
        self._items = IdIndex.open(path / "item_index")
        self.table = ItemTable.open(path / "item_table")
        self.snapshot = StateSnapshot.open(path / "user_states")
        self.start_state: NDArray[np.float32] = np.load(
            path / "start_state.npy", allow_pickle=False
        )
        self.watermark_us, self.gap_us = self.snapshot.watermark_us, self.snapshot.gap_us
        model = repository.model_path(GRU_STEP, number)
        self._gru_step = GruStep(model, self.start_state, self.table.dim)

    def item_rows(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        return self._items.rows(item_ids) if item_ids else np.empty(0, np.int64)

    async def next_states(
        self, states: NDArray[np.float32], session_means: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        return self._gru_step(states, session_means)


async def _rebuild(asked: Rebuilding, store: RecordStore, file: BinaryIO) -> int:
    release = _Release(ReleaseRepository(asked.sidecar.repository), asked.release)
    keys = _active(store, release.number, asked.active_since_us)
    rows = _snapshot_rows(release.snapshot.users, set(keys))
    count = 0
    for first in range(0, len(keys), _FOLDED):
        some = keys[first : first + _FOLDED]
        outdated = [
            (key, record)
            for key, record in zip(some, store.get_many(some), strict=True)
            if record is not None and record.release != release.number
        ]
        if not outdated:
            continue
        # One look-up for all: alone, each costs as much as the rest of its rebuild.
        ids = [record.journal.item_ids for _, record in outdated]
        items = release.item_rows(list(itertools.chain.from_iterable(ids)))
        of_journals = np.split(items, np.cumsum([len(of_one) for of_one in ids])[:-1])
        found: list[tuple[bytes, int, UserRecord]] = []
        for (key, record), of_journal in zip(outdated, of_journals, strict=True):
            if asked.only_known and (of_journal < 0).any():
                continue
            row = rows.get(key)
            snapshot = None if row is None else release.snapshot.at(row)
            rebuilt = fold.rebuilt_from(record, snapshot, release, of_journal)
            found.append((key, record.revision, rebuilt))
        records = [record for _, _, record in found]
        folded = await fold_closed(release.next_states, release, records, asked.folded_until_us)
        for (key, base, _), record in zip(found, folded, strict=True):
            stored = encode(record)
            file.write(_REBUILT.pack(key, base, len(stored)) + stored)
        file.flush()
        count += len(found)
    return count


def _active(store: RecordStore, release: int, since_us: int) -> list[bytes]:
    active: list[bytes] = []
    after = b""
    while True:
        keys, after = store.scan(after, _SCANNED)
        for key, record in zip(keys, store.get_many(keys), strict=True):
            if (
                record is not None
                and record.release != release
                and len(record.journal)
                and record.journal.timestamps_us[-1] >= since_us
            ):
                active.append(key)
        if not after:
            return active


def _snapshot_rows(users: IdIndex, keys: set[bytes]) -> dict[bytes, int]:
    rows: dict[bytes, int] = {}
    for first in range(0, len(users), _HASHED):
        if len(rows) == len(keys):
            break
        places = range(first, min(first + _HASHED, len(users)))
        for row, user_id in zip(places, users.ids(places), strict=True):
            key = user_key(user_id)
            if key in keys:
                rows[key] = row
    return rows


def main() -> None:
    """Rebuild, and print how many."""
    # A terminal's interrupt is for the sidecar, which then stops this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    asked = Rebuilding.from_json(sys.stdin.read())
    if asked.aside:
        give_way()
    try:
        with contextlib.ExitStack() as parts:
            file = parts.enter_context(os.fdopen(int(sys.argv[1]), "wb"))
            if not asked.sidecar.store:
                parts.enter_context(crashes_noted(asked.sidecar.state_dir / STORE_FOLDER))
            store = open_to_read(asked.sidecar)
            parts.callback(store.close)
            print(asyncio.run(_rebuild(asked, store, file)))
    except HiertcnError as error:
        _log.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
