"""Column names of the events and items contracts: their only home."""

from typing import Final

USER_ID: Final = "user_id"
ITEM_ID: Final = "item_id"
TIMESTAMP: Final = "timestamp"
EVENT_TYPE: Final = "event_type"
IMPRESSIONS: Final = "impressions"
DATE: Final = "date"
