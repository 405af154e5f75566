"""New items as the Python clients take them, from files or the caller, and their wire form."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from hiertcn.errors import InputError
from hiertcn.events.columns import ITEM_ID
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.client.interactions_file import opened

AttributeValue = str | float | bool | Sequence[str] | Sequence[float]
"""Text, a number, a boolean (kept as 0 or 1), texts (tags), or a vector."""

_BATCH: Final = 200
_FIELDS: Final = (ITEM_ID, "attributes", "neighbors", "neighbor_weights")


@dataclass(frozen=True)
class NewItem:
    """An item that the release does not know.

    Attributes:
        item_id: its id.
        attributes: by column of the items file.
        neighbors: items that it belongs to, at most 100.
        neighbor_weights: how much, one above 0 per neighbor; none for equal weights.
    """

    item_id: str
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    neighbors: Sequence[str] = ()
    neighbor_weights: Sequence[float] = ()


@dataclass(frozen=True)
class UpsertResult:
    """What became of upserted items; see ``UpsertItemsResponse`` in recommender.proto."""

    release: int
    known_items: list[str]
    without_features: list[str]
    unknown_neighbors: list[str]


def upsert_request(items: Sequence[NewItem]) -> pb.UpsertItemsRequest:
    """The request.

    Raises:
        InputError: a value is none that an attribute can have, naming item and attribute.
    """
    request = pb.UpsertItemsRequest()
    for place, item in enumerate(items):
        where = f"items[{place}]"
        try:
            added = request.items.add(
                item_id=item.item_id,
                neighbors=item.neighbors,
                neighbor_weights=item.neighbor_weights,
            )
            for name, value in item.attributes.items():
                where = f"items[{place}].attributes[{name!r}]"
                _set(added.attributes[name], value, where)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{where} cannot be sent ({error}); expected text ids, and attributes of text, "
                "numbers, or lists of one of the two"
            ) from None
    return request


def upsert_result(reply: Any) -> UpsertResult:
    """Read a reply."""
    return UpsertResult(
        release=reply.release,
        known_items=list(reply.known_items),
        without_features=list(reply.without_features),
        unknown_neighbors=list(reply.unknown_neighbors),
    )


def read_items(path: str) -> Iterator[list[NewItem]]:
    """Yield batches of items from JSON lines (``-`` for stdin) or an items file in parquet.

    A JSON line has ``item_id`` and optionally ``attributes`` (an object), ``neighbors`` and
    ``neighbor_weights``. Of parquet, the columns ``neighbors`` and ``neighbor_weights`` are these
    too, and every other column is an attribute.

    Raises:
        InputError: the file cannot be read, or a line is no item; it is named.
    """
    batch: list[NewItem] = []
    for item in _of_parquet(Path(path)) if path.endswith(".parquet") else _of_lines(path):
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def attribute_of(text: str) -> tuple[str, AttributeValue]:
    """Read ``NAME=VALUE``: a JSON number, boolean, text or list, and any other value as text.

    Raises:
        InputError: it is not of this form.
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InputError(f"--attribute {text!r} was not understood; expected NAME=VALUE")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        return name, value
    if isinstance(parsed, str | int | float | list):
        return name, parsed
    return name, value


def _set(target: pb.AttributeValue, value: Any, where: str) -> None:
    if isinstance(value, str):
        target.text = value
    elif isinstance(value, bool | int | float):
        target.number = float(value)
    elif isinstance(value, Sequence) or hasattr(value, "tolist"):
        values = list(value)
        if values and all(isinstance(one, str) for one in values):
            target.texts.values.extend(values)
        else:
            target.vector.values.extend(map(float, values))
    else:
        raise InputError(
            f"{where} is {type(value).__name__}; expected text, a number, or a list of one of the "
            "two"
        )


def _of_lines(path: str) -> Iterator[NewItem]:
    with opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{where} is not JSON ({error}); expected one object a line"
                ) from None
            if not isinstance(value, dict):
                raise InputError(f"{where} is {type(value).__name__}; expected an object")
            unknown = sorted(set(value) - set(_FIELDS))
            if unknown:
                raise InputError(
                    f"{where} has the unknown field {unknown[0]!r}; expected {', '.join(_FIELDS)}"
                )
            attributes = value.get("attributes") or {}
            if not isinstance(attributes, dict):
                raise InputError(f"{where} has attributes {attributes!r}; expected an object")
            yield _item(value, attributes, where)


def _of_parquet(path: Path) -> Iterator[NewItem]:
    # Imported late, so that the command starts at once.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if ITEM_ID not in file.schema_arrow.names:
                raise InputError(
                    f"{path} has no column {ITEM_ID!r}; its columns are "
                    f"{', '.join(file.schema_arrow.names)}"
                )
            for batch in file.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    attributes = {
                        name: _plain(value)
                        for name, value in row.items()
                        if name not in _FIELDS and value is not None
                    }
                    yield _item(row, attributes, f"{path}: item {row[ITEM_ID]!r}")
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read as parquet ({error}); expected an items file"
        ) from None


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value


def _item(value: dict[str, Any], attributes: dict[str, Any], where: str) -> NewItem:
    item_id = value.get(ITEM_ID)
    # Integer ids are text in decimal everywhere behind the ingest.
    if isinstance(item_id, int) and not isinstance(item_id, bool):
        item_id = str(item_id)
    if not isinstance(item_id, str) or not item_id:
        raise InputError(f"{where} has {ITEM_ID} {item_id!r}; expected a text or integer id")
    kept = {
        name: value
        for name, value in attributes.items()
        if value is not None and not (isinstance(value, float) and math.isnan(value))
    }
    return NewItem(
        item_id,
        kept,
        [str(one) for one in value.get("neighbors") or ()],
        list(value.get("neighbor_weights") or ()),
    )
