"""Join the simulator's own ranking to the requests: the best that any model could reach.

The simulator (hiertcn/events/simulate.py) writes, for every interaction, the rank of the chosen
item among its impressions under the probabilities it was drawn from. DuckDB joins out of core by
user id, item id and time, so the cost is one scan of the oracle's folder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from hiertcn.errors import InputError
from hiertcn.evaluation.protocol import Requests
from hiertcn.events.columns import ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.items.index import IdIndex
from hiertcn.sessions.store import SessionStore

_NEEDED = (USER_ID, ITEM_ID, TIMESTAMP, "rank", "candidates")


@dataclass(frozen=True, kw_only=True)
class OracleRanks:
    """The oracle's view of each request.

    Attributes:
        rank: int32 [n], from 1; 0 where the oracle does not know the request.
        candidates: int32 [n], how many items it ranked; 0 where unknown.
    """

    rank: NDArray[np.int32]
    candidates: NDArray[np.int32]


def join_oracle(
    folder: Path, store: SessionStore, requests: Requests, items: IdIndex
) -> OracleRanks:
    """Return the oracle's rank of every request.

    Where the log holds the same user, item and time twice, the worse rank counts.

    Args:
        folder: folder with the oracle's parquet files, at any depth.
        store: the session store that the requests point into.
        requests: the requests.
        items: the item index that the session store was built with.

    Raises:
        InputError: the folder holds no readable parquet file, or one without a needed column.
    """
    if not next(folder.rglob("*.parquet"), None):
        raise InputError(
            f"the oracle folder {folder} holds no parquet file; expected what the simulator "
            "writes to its oracle/ folder"
        )
    wanted = _wanted(store, requests, items)
    with duckdb.connect() as connection:
        connection.register("wanted", wanted)
        try:
            oracle = connection.read_parquet(f"{folder}/**/*.parquet")
            _check_columns(folder, oracle.columns)
            joined = connection.execute(
                f"""
                SELECT wanted.request,
                       max(oracle.rank) AS rank,
                       max(oracle.candidates) AS candidates
                FROM wanted
                JOIN oracle
                  ON oracle.{USER_ID}::VARCHAR = wanted.{USER_ID}
                 AND oracle.{ITEM_ID}::VARCHAR = wanted.{ITEM_ID}
                 AND epoch_us(oracle.{TIMESTAMP}) = wanted.{TIMESTAMP}
                GROUP BY wanted.request
                """
            ).fetchnumpy()
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"the oracle folder {folder} could not be read ({reason}); simulate again"
            ) from error
    return _aligned(joined, len(requests))


def _wanted(store: SessionStore, requests: Requests, items: IdIndex) -> pa.Table:
    return pa.table(
        {
            "request": pa.array(np.arange(len(requests), dtype=np.int64)),
            USER_ID: store.user_ids.take(pa.array(requests.user)),
            ITEM_ID: pa.array(items.ids(requests.target_row)),
            TIMESTAMP: pa.array(np.asarray(store.timestamps_us[requests.interaction])),
        }
    )


def _check_columns(folder: Path, columns: Sequence[str]) -> None:
    missing = [name for name in _NEEDED if name not in columns]
    if missing:
        raise InputError(
            f"the oracle folder {folder} has no column {missing[0]!r} (it has "
            f"{', '.join(columns)}); expected what the simulator writes to its oracle/ folder"
        )


def _aligned(joined: dict[str, Any], count: int) -> OracleRanks:
    rank = np.zeros(count, dtype=np.int32)
    candidates = np.zeros(count, dtype=np.int32)
    rank[joined["request"]] = joined["rank"]
    candidates[joined["request"]] = joined["candidates"]
    return OracleRanks(rank=rank, candidates=candidates)
