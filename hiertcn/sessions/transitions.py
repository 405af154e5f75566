"""Which items follow which within a session: directed, decayed, the strongest of each item.

An interaction with ``b`` that comes ``g`` places after one with ``a`` in the same session adds
``decay ** (g - 1)`` to the weight of ``a -> b``, for ``g`` up to `TransitionOptions.reach` (the
decayed Markov chain that session-based recommenders are measured against; Ludewig and Jannach
2018). The weights stay sums, so a reader can leave an occurrence out (hiertcn/sessions/memory.py
does, in training); dividing by ``totals`` makes them shares.

A table is a folder: ``header.json`` and the four arrays of `TransitionTable` as ``.npy`` files,
mapped when opened. Memory of a build: about 40 bytes a pair of one chunk of items.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.files import read_json, whole_directory, write_json
from hiertcn.sessions.store import SessionStore

_FORMAT: Final = 1
_HEADER_FILE: Final = "header.json"
_DTYPES: Final[dict[str, type[np.generic]]] = {
    "offsets": np.int64,
    "followers": np.int32,
    "weights": np.float32,
    "totals": np.float32,
}
_PAIRS_PER_CHUNK: Final = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TransitionOptions:
    """How transitions are counted.

    Attributes:
        reach: places after an interaction that still count as following it.
        decay: factor on the weight for each place more.
        most: followers kept of each item, the heaviest ones.

    Raises:
        InputError: a value is out of range.
    """

    reach: int = 20
    decay: float = 0.5
    most: int = 100

    def __post_init__(self) -> None:
        for name in ("reach", "most"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"TransitionOptions.{name} is {getattr(self, name)}; expected a whole number "
                    ">= 1"
                )
        if not 0 < self.decay <= 1:
            raise InputError(
                f"TransitionOptions.decay is {self.decay}; expected a number above 0 and at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class TransitionTable:
    """The followers of every item, heaviest first.

    Attributes:
        options: how they were counted.
        offsets: int64 ``[items + 1]``, first follower of each item, then the count.
        followers: int32 ``[pairs]``, item rows.
        weights: float32 ``[pairs]``.
        totals: float32 ``[items]``, the weight of all of an item's followers, kept or not.
    """

    options: TransitionOptions
    offsets: NDArray[np.int64]
    followers: NDArray[np.int32]
    weights: NDArray[np.float32]
    totals: NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.totals)

    @classmethod
    def open(cls, directory: Path) -> "TransitionTable":
        """Map what `save` wrote.

        Raises:
            InputError: a file is missing or damaged.
        """
        directory = Path(directory)
        header = read_json(directory / _HEADER_FILE)
        if not isinstance(header, dict) or header.get("format") != _FORMAT:
            raise InputError(
                f"{directory / _HEADER_FILE} does not describe a transition table of format "
                f"{_FORMAT}; train the model again"
            )
        columns = {name: _map(directory / f"{name}.npy", dtype) for name, dtype in _DTYPES.items()}
        table = cls(options=TransitionOptions(**header["options"]), **columns)
        if (
            len(table.offsets) != len(table) + 1
            or int(table.offsets[-1]) != len(table.followers)
            or len(table.weights) != len(table.followers)
        ):
            raise InputError(f"the arrays of {directory} do not fit together; train again")
        return table

    def save(self, directory: Path) -> None:
        """Write the folder ``directory``, whole or not at all."""
        with whole_directory(Path(directory)) as folder:
            for name in _DTYPES:
                np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
            write_json(folder / _HEADER_FILE, {"format": _FORMAT, "options": asdict(self.options)})


def count_transitions(
    store: SessionStore,
    items: int,
    options: TransitionOptions | None = None,
    end_us: int | None = None,
) -> TransitionTable:
    """Count the transitions of a session store.

    Args:
        store: the sessions; rows from ``items`` on are passed over, but keep their place.
        items: length of the catalogue.
        options: see `TransitionOptions`.
        end_us: sessions that start at or after it, in microseconds, do not count; None: all do.
    """
    options = options or TransitionOptions()
    rows = np.asarray(store.item_rows)
    ends = _session_ends(store, end_us)
    positions = np.argsort(rows, kind="stable")
    bounds = np.searchsorted(rows[positions], np.arange(items + 1))

    totals = np.zeros(items, np.float32)
    counts = np.zeros(items, np.int64)
    followers = [np.empty(0, np.int32)]
    weights = [np.empty(0, np.float32)]
    for first, last in _chunks(bounds, options.reach):
        source, follower, weight = _pairs(
            rows, ends, positions[bounds[first] : bounds[last]], items, options
        )
        np.add.at(totals, source, weight)
        heaviest = np.lexsort((follower, -weight, source))
        source, follower, weight = source[heaviest], follower[heaviest], weight[heaviest]
        place = np.arange(len(source)) - np.searchsorted(source, source)
        kept = place < options.most
        counts += np.bincount(source[kept], minlength=items)
        followers.append(follower[kept].astype(np.int32))
        weights.append(weight[kept].astype(np.float32))
    return TransitionTable(
        options=options,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        followers=np.concatenate(followers),
        weights=np.concatenate(weights),
        totals=totals,
    )


def _session_ends(store: SessionStore, end_us: int | None) -> NDArray[np.int64]:
    """Return where the session of each interaction ends; its own place if it does not count."""
    lengths = np.diff(store.session_offsets)
    ends: NDArray[np.int64] = np.repeat(store.session_offsets[1:], lengths)
    if end_us is not None:
        counts = np.repeat(store.session_starts_us() < end_us, lengths)
        ends = np.where(counts, ends, 0)
    return ends


def _chunks(bounds: NDArray[np.int64], reach: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of items whose pairs fit into memory; at least one item each."""
    items = len(bounds) - 1
    first = 0
    while first < items:
        limit = bounds[first] + _PAIRS_PER_CHUNK // reach
        last = max(int(np.searchsorted(bounds, limit, side="right")) - 1, first + 1)
        yield first, min(last, items)
        first = last


def _pairs(
    rows: NDArray[np.int32],
    ends: NDArray[np.int64],
    positions: NDArray[np.int64],
    items: int,
    options: TransitionOptions,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return distinct (source, follower) pairs, by source, with their weights."""
    keys, weights = [np.empty(0, np.int64)], [np.empty(0, np.float64)]
    for places in range(1, options.reach + 1):
        inside = positions[positions + places < ends[positions]]
        follower = rows[inside + places].astype(np.int64)
        known = follower < items
        keys.append(rows[inside][known].astype(np.int64) * items + follower[known])
        weights.append(np.full(int(known.sum()), options.decay ** (places - 1), np.float64))
    key, weight = np.concatenate(keys), np.concatenate(weights)
    distinct, index = np.unique(key, return_inverse=True)
    summed = np.bincount(index, weights=weight, minlength=len(distinct)).astype(np.float64)
    return distinct // items, distinct % items, summed


def _map(path: Path, dtype: type[np.generic]) -> NDArray[Any]:
    try:
        column = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be mapped ({error}); train the model again") from None
    if column.dtype != dtype or column.ndim != 1:
        raise InputError(
            f"{path} holds {column.dtype} of {column.ndim} dimensions, expected one of "
            f"{np.dtype(dtype)}; train the model again"
        )
    return column
