"""What an ingest is told: the log's columns, which events to keep, and the limits."""

from dataclasses import dataclass

from hiertcn.errors import InputError
from hiertcn.events.columns import EVENT_TYPE, IMPRESSIONS, ITEM_ID, TIMESTAMP, USER_ID
from hiertcn.events.times import TIMESTAMP_UNITS, end_of_data


@dataclass(frozen=True, kw_only=True)
class IngestOptions:
    """How a log is read and filtered; the limits' defaults are the HierTCN paper's (section 4.1).

    Attributes:
        user_column, item_column, timestamp_column: names in the log; all three must be there.
        event_type_column, impressions_column: names in the log; used if there.
        timestamp_unit: unit of numeric timestamps: auto, s, ms, us or ns; ``auto`` infers it
            where only one is possible.
        event_types: types to keep; empty keeps all.
        item_filter: ``column=value``, or the name of a boolean column, of the items file; events
            of items for which it does not hold, or which the items file lacks, are dropped.
        min_item_interactions: items with fewer are dropped first.
        min_user_interactions, max_user_interactions: users with fewer or more are dropped next.
        repeat_filters: apply the three limits again until nothing changes; the paper applies them
            once, so some items end a little below their limit.
        session_gap_s: idle seconds that end a session, for the statistics.
        data_date: ``YYYY-MM-DD`` keeps events to the end of that UTC day, an RFC 3339 instant
            those before it, empty all.
        max_future_s: events later than now plus this many seconds are rejected.
        memory_limit: how much memory DuckDB may take before it spills to disk, such as ``4GB``.

    Raises:
        InputError: a field is out of range.
    """

    user_column: str = USER_ID
    item_column: str = ITEM_ID
    timestamp_column: str = TIMESTAMP
    event_type_column: str = EVENT_TYPE
    impressions_column: str = IMPRESSIONS
    timestamp_unit: str = "auto"
    event_types: tuple[str, ...] = ()
    item_filter: str = ""
    min_item_interactions: int = 50
    min_user_interactions: int = 10
    max_user_interactions: int = 1000
    repeat_filters: bool = False
    session_gap_s: float = 1800.0
    data_date: str = ""
    max_future_s: float = 86_400.0
    memory_limit: str = "4GB"

    def __post_init__(self) -> None:
        columns = {
            "user_column": self.user_column,
            "item_column": self.item_column,
            "timestamp_column": self.timestamp_column,
            "event_type_column": self.event_type_column,
            "impressions_column": self.impressions_column,
        }
        for field, column in columns.items():
            if not column:
                raise InputError(f"{field} is empty; expected the name of a column of the log")
        if len(set(columns.values())) < len(columns):
            raise InputError(
                f"two of the columns have the same name ({', '.join(columns.values())}); expected "
                f"five different names in {', '.join(columns)}"
            )
        if self.timestamp_unit not in TIMESTAMP_UNITS:
            raise InputError(
                f"timestamp_unit is {self.timestamp_unit!r}; expected one of "
                f"{', '.join(TIMESTAMP_UNITS)}"
            )
        for field in ("min_item_interactions", "min_user_interactions"):
            if getattr(self, field) < 0:
                raise InputError(f"{field} is {getattr(self, field)}; expected 0 or more")
        if self.max_user_interactions < max(self.min_user_interactions, 1):
            raise InputError(
                f"max_user_interactions is {self.max_user_interactions}; expected at least 1 and "
                f"at least min_user_interactions ({self.min_user_interactions})"
            )
        if not self.session_gap_s > 0:
            raise InputError(
                f"session_gap_s is {self.session_gap_s}; expected a positive number of seconds"
            )
        if not self.max_future_s >= 0:
            raise InputError(f"max_future_s is {self.max_future_s}; expected 0 or more seconds")
        end_of_data(self.data_date)
