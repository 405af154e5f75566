"""Item-to-item weights counted from sessions: the table behind Markov and item-kNN.

Counting costs one addition per pair of interactions that is looked at and one float per item of
scratch; the table costs 12 bytes per pair of items that met.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from models.counting.context import Context


@dataclass(frozen=True)
class Associations:
    """Weights from one item to others, as compressed rows.

    Attributes:
        offsets: int64 ``[items + 1]``.
        columns: int32 ``[pairs]``.
        weights: float64 ``[pairs]``.
    """

    offsets: NDArray[np.int64]
    columns: NDArray[np.int32]
    weights: NDArray[np.float64]

    @classmethod
    def count(
        cls,
        rows: NDArray[np.int32],
        low: NDArray[np.int64],
        high: NDArray[np.int64],
        lag_weights: NDArray[np.float64],
        items: int,
    ) -> "Associations":
        """Count, for every interaction ``i``, the others in ``low[i] .. high[i] - 1``.

        Args:
            rows: int32 ``[n]``, item rows; those at or above ``items`` are skipped.
            low: int64 ``[n]``.
            high: int64 ``[n]``.
            lag_weights: float64 ``[lags]``, weight of a pair ``lag`` interactions apart, from 1;
                the last holds for all larger lags.
            items: number of item rows. Pairs of an item with itself are not counted.
        """
        known = np.flatnonzero(rows < items)
        order = known[np.argsort(rows[known], kind="stable")]
        of_item = np.zeros(items + 1, np.int64)
        np.cumsum(np.bincount(rows[known], minlength=items), out=of_item[1:])
        return cls(*_count(np.array(rows), low, high, lag_weights, of_item, order))

    def scaled(self, factors: NDArray[np.float64]) -> "Associations":
        """Return the table with each weight multiplied by its factor, float64 ``[pairs]``."""
        return Associations(self.offsets, self.columns, self.weights * factors)

    def sources(self) -> NDArray[np.int64]:
        """Return the item each weight starts from, int64 ``[pairs]``."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def gather(self, past: Context, weights: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return ``sum over e of weights[e] * table[past.rows[e]]``: float32 ``[n, items]``."""
        out = np.zeros((len(past.length), len(self.offsets) - 1), np.float32)
        _add_rows(past.offsets, past.rows, weights, self.offsets, self.columns, self.weights, out)
        return out


@compiled
def _count(
    rows: Any, low: Any, high: Any, lag_weights: Any, of_item: Any, order: Any
) -> tuple[Any, Any, Any]:
    items = len(of_item) - 1
    offsets = np.zeros(items + 1, np.int64)
    columns = np.empty(1024, np.int32)
    weights = np.empty(1024, np.float64)
    scratch = np.zeros(items, np.float64)
    touched = np.empty(items, np.int32)
    used = 0
    for item in range(items):
        met = 0
        for at in range(of_item[item], of_item[item + 1]):
            here = order[at]
            for other in range(low[here], high[here]):
                row = rows[other]
                if row == item or row >= items:
                    continue
                if scratch[row] == 0:
                    touched[met] = row
                    met += 1
                scratch[row] += lag_weights[min(abs(other - here), len(lag_weights)) - 1]
        if used + met > len(columns):
            grown = max(2 * len(columns), used + met)
            more_columns, more_weights = np.empty(grown, np.int32), np.empty(grown, np.float64)
            more_columns[:used], more_weights[:used] = columns[:used], weights[:used]
            columns, weights = more_columns, more_weights
        for i in range(met):
            row = touched[i]
            columns[used + i] = row
            weights[used + i] = scratch[row]
            scratch[row] = 0
        used += met
        offsets[item + 1] = used
    return offsets, columns[:used].copy(), weights[:used].copy()


@compiled
def _add_rows(
    of_request: Any, rows: Any, factors: Any, offsets: Any, columns: Any, weights: Any, out: Any
) -> None:
    for request in range(len(of_request) - 1):
        for entry in range(of_request[request], of_request[request + 1]):
            row = rows[entry]
            if factors[entry] == 0:
                continue
            for at in range(offsets[row], offsets[row + 1]):
                out[request, columns[at]] += factors[entry] * weights[at]
