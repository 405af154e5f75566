from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RecommendRequest(_message.Message):
    __slots__ = ("user_id", "k", "candidates", "exclude", "timestamp_us", "candidates_only", "exclude_seen", "filters", "deadline_ms")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_US_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_ONLY_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_SEEN_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    k: int
    candidates: _containers.RepeatedScalarFieldContainer[str]
    exclude: _containers.RepeatedScalarFieldContainer[str]
    timestamp_us: int
    candidates_only: bool
    exclude_seen: bool
    filters: _containers.RepeatedCompositeFieldContainer[Filter]
    deadline_ms: int
    def __init__(self, user_id: _Optional[str] = ..., k: _Optional[int] = ..., candidates: _Optional[_Iterable[str]] = ..., exclude: _Optional[_Iterable[str]] = ..., timestamp_us: _Optional[int] = ..., candidates_only: _Optional[bool] = ..., exclude_seen: _Optional[bool] = ..., filters: _Optional[_Iterable[_Union[Filter, _Mapping]]] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class Filter(_message.Message):
    __slots__ = ("column", "any_of", "none_of", "min", "max")
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    ANY_OF_FIELD_NUMBER: _ClassVar[int]
    NONE_OF_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    column: str
    any_of: _containers.RepeatedScalarFieldContainer[str]
    none_of: _containers.RepeatedScalarFieldContainer[str]
    min: str
    max: str
    def __init__(self, column: _Optional[str] = ..., any_of: _Optional[_Iterable[str]] = ..., none_of: _Optional[_Iterable[str]] = ..., min: _Optional[str] = ..., max: _Optional[str] = ...) -> None: ...

class ScoredItem(_message.Message):
    __slots__ = ("item_id", "score")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    score: float
    def __init__(self, item_id: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class RecommendResponse(_message.Message):
    __slots__ = ("release", "items", "unknown_items", "fallback")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_ITEMS_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    release: int
    items: _containers.RepeatedCompositeFieldContainer[ScoredItem]
    unknown_items: _containers.RepeatedScalarFieldContainer[str]
    fallback: bool
    def __init__(self, release: _Optional[int] = ..., items: _Optional[_Iterable[_Union[ScoredItem, _Mapping]]] = ..., unknown_items: _Optional[_Iterable[str]] = ..., fallback: _Optional[bool] = ...) -> None: ...

class Interaction(_message.Message):
    __slots__ = ("user_id", "item_id", "timestamp_us", "idempotency_key", "event_type")
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_US_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    EVENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    item_id: str
    timestamp_us: int
    idempotency_key: str
    event_type: str
    def __init__(self, user_id: _Optional[str] = ..., item_id: _Optional[str] = ..., timestamp_us: _Optional[int] = ..., idempotency_key: _Optional[str] = ..., event_type: _Optional[str] = ...) -> None: ...

class RecordInteractionsRequest(_message.Message):
    __slots__ = ("interactions",)
    INTERACTIONS_FIELD_NUMBER: _ClassVar[int]
    interactions: _containers.RepeatedCompositeFieldContainer[Interaction]
    def __init__(self, interactions: _Optional[_Iterable[_Union[Interaction, _Mapping]]] = ...) -> None: ...

class RecordInteractionsResponse(_message.Message):
    __slots__ = ("accepted", "duplicates", "late", "unknown_items")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_ITEMS_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    duplicates: int
    late: int
    unknown_items: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, accepted: _Optional[int] = ..., duplicates: _Optional[int] = ..., late: _Optional[int] = ..., unknown_items: _Optional[_Iterable[str]] = ...) -> None: ...

class AttributeValue(_message.Message):
    __slots__ = ("text", "number", "texts", "vector")
    class Texts(_message.Message):
        __slots__ = ("values",)
        VALUES_FIELD_NUMBER: _ClassVar[int]
        values: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...
    class Vector(_message.Message):
        __slots__ = ("values",)
        VALUES_FIELD_NUMBER: _ClassVar[int]
        values: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...
    TEXT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    text: str
    number: float
    texts: AttributeValue.Texts
    vector: AttributeValue.Vector
    def __init__(self, text: _Optional[str] = ..., number: _Optional[float] = ..., texts: _Optional[_Union[AttributeValue.Texts, _Mapping]] = ..., vector: _Optional[_Union[AttributeValue.Vector, _Mapping]] = ...) -> None: ...

class NewItem(_message.Message):
    __slots__ = ("item_id", "attributes", "neighbors", "neighbor_weights")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: AttributeValue
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[AttributeValue, _Mapping]] = ...) -> None: ...
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    NEIGHBORS_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOR_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    attributes: _containers.MessageMap[str, AttributeValue]
    neighbors: _containers.RepeatedScalarFieldContainer[str]
    neighbor_weights: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, item_id: _Optional[str] = ..., attributes: _Optional[_Mapping[str, AttributeValue]] = ..., neighbors: _Optional[_Iterable[str]] = ..., neighbor_weights: _Optional[_Iterable[float]] = ...) -> None: ...

class UpsertItemsRequest(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[NewItem]
    def __init__(self, items: _Optional[_Iterable[_Union[NewItem, _Mapping]]] = ...) -> None: ...

class UpsertItemsResponse(_message.Message):
    __slots__ = ("release", "known_items", "without_features", "unknown_neighbors")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    KNOWN_ITEMS_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_NEIGHBORS_FIELD_NUMBER: _ClassVar[int]
    release: int
    known_items: _containers.RepeatedScalarFieldContainer[str]
    without_features: _containers.RepeatedScalarFieldContainer[str]
    unknown_neighbors: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, release: _Optional[int] = ..., known_items: _Optional[_Iterable[str]] = ..., without_features: _Optional[_Iterable[str]] = ..., unknown_neighbors: _Optional[_Iterable[str]] = ...) -> None: ...

class GetUserRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    def __init__(self, user_id: _Optional[str] = ...) -> None: ...

class GetUserResponse(_message.Message):
    __slots__ = ("known", "release", "folded_until_us", "open_session", "journal", "state_norm")
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    FOLDED_UNTIL_US_FIELD_NUMBER: _ClassVar[int]
    OPEN_SESSION_FIELD_NUMBER: _ClassVar[int]
    JOURNAL_FIELD_NUMBER: _ClassVar[int]
    STATE_NORM_FIELD_NUMBER: _ClassVar[int]
    known: bool
    release: int
    folded_until_us: int
    open_session: _containers.RepeatedCompositeFieldContainer[JournalEntry]
    journal: _containers.RepeatedCompositeFieldContainer[JournalEntry]
    state_norm: float
    def __init__(self, known: _Optional[bool] = ..., release: _Optional[int] = ..., folded_until_us: _Optional[int] = ..., open_session: _Optional[_Iterable[_Union[JournalEntry, _Mapping]]] = ..., journal: _Optional[_Iterable[_Union[JournalEntry, _Mapping]]] = ..., state_norm: _Optional[float] = ...) -> None: ...

class JournalEntry(_message.Message):
    __slots__ = ("item_id", "timestamp_us", "late", "known_item")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_US_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    KNOWN_ITEM_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    timestamp_us: int
    late: bool
    known_item: bool
    def __init__(self, item_id: _Optional[str] = ..., timestamp_us: _Optional[int] = ..., late: _Optional[bool] = ..., known_item: _Optional[bool] = ...) -> None: ...

class DeleteUserRequest(_message.Message):
    __slots__ = ("user_id",)
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    def __init__(self, user_id: _Optional[str] = ...) -> None: ...

class DeleteUserResponse(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: bool
    def __init__(self, deleted: _Optional[bool] = ...) -> None: ...

class ListReleasesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Release(_message.Message):
    __slots__ = ("release", "current", "previous", "complete", "watermark_us")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_US_FIELD_NUMBER: _ClassVar[int]
    release: int
    current: bool
    previous: bool
    complete: bool
    watermark_us: int
    def __init__(self, release: _Optional[int] = ..., current: _Optional[bool] = ..., previous: _Optional[bool] = ..., complete: _Optional[bool] = ..., watermark_us: _Optional[int] = ...) -> None: ...

class ListReleasesResponse(_message.Message):
    __slots__ = ("releases", "serving")
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    releases: _containers.RepeatedCompositeFieldContainer[Release]
    serving: int
    def __init__(self, releases: _Optional[_Iterable[_Union[Release, _Mapping]]] = ..., serving: _Optional[int] = ...) -> None: ...

class ActivateReleaseRequest(_message.Message):
    __slots__ = ("release",)
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    release: int
    def __init__(self, release: _Optional[int] = ...) -> None: ...

class RollBackReleaseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ActivateReleaseResponse(_message.Message):
    __slots__ = ("release", "previous")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    release: int
    previous: int
    def __init__(self, release: _Optional[int] = ..., previous: _Optional[int] = ...) -> None: ...
