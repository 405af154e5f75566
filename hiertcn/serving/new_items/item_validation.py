"""The rules that new items must keep, and the sentence that names the field that breaks one."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from hiertcn.errors import InputError
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.log.logged_items import Attribute
from hiertcn.serving.new_items.item_upserts import CheckedItem
from hiertcn.serving.rpc.validation import checked_text

MAX_NEW_ITEMS: Final = 1000
MAX_ATTRIBUTES: Final = 64
MAX_ITEM_BYTES: Final = 512 << 10
MAX_TEXT_BYTES: Final = 64 << 10
MAX_TEXTS: Final = 256
MAX_VECTOR: Final = 16_384
MAX_NEIGHBORS: Final = 100

_LARGEST: Final = 1e30


def checked_new_items(items: Sequence[pb.NewItem]) -> list[CheckedItem]:
    """The items as the engine takes them.

    Raises:
        InputError: there are none or too many, one comes twice, or one breaks a rule; its place
            and the field are named.
    """
    if not 1 <= len(items) <= MAX_NEW_ITEMS:
        raise InputError(
            f"items lists {len(items)} items; expected 1 to {MAX_NEW_ITEMS}, so split the request"
        )
    place_of: dict[str, int] = {}
    checked = []
    for place, item in enumerate(items):
        field = f"items[{place}]"
        item_id = checked_text(item.item_id, f"{field}.item_id")
        first = place_of.setdefault(item_id, place)
        if first != place:
            raise InputError(
                f"{field}.item_id is {item_id!r}, which items[{first}] is too; expected each item "
                "once"
            )
        if item.ByteSize() > MAX_ITEM_BYTES:
            raise InputError(
                f"{field} has {item.ByteSize()} bytes; expected at most {MAX_ITEM_BYTES}"
            )
        checked.append(
            CheckedItem(
                item_id=item_id,
                attributes=_checked_attributes(item, f"{field}.attributes"),
                neighbors=_checked_neighbors(item, f"{field}.neighbors"),
                weights=_checked_weights(item, f"{field}.neighbor_weights"),
            )
        )
    return checked


def _checked_attributes(item: pb.NewItem, field: str) -> dict[str, Attribute]:
    if len(item.attributes) > MAX_ATTRIBUTES:
        raise InputError(
            f"{field} has {len(item.attributes)} entries; expected at most {MAX_ATTRIBUTES}"
        )
    attributes = {}
    # A map's order is none, and the log's bytes should not depend on it.
    for name in sorted(item.attributes):
        checked_text(name, f"{field}'s name")
        if name == "item_id":
            raise InputError(f"{field} names 'item_id', which is a field of its own")
        attributes[name] = _checked_value(item.attributes[name], f"{field}[{name!r}]")
    return attributes


def _checked_value(value: pb.AttributeValue, field: str) -> Attribute:
    match value.WhichOneof("value"):
        case "text":
            size = len(value.text.encode())
            if size > MAX_TEXT_BYTES:
                raise InputError(f"{field} has {size} bytes; expected at most {MAX_TEXT_BYTES}")
            return value.text
        case "number":
            if not math.isfinite(value.number) or abs(value.number) > _LARGEST:
                raise InputError(
                    f"{field} is {value.number}; expected a finite number of at most {_LARGEST:g}"
                )
            return value.number
        case "texts":
            texts = tuple(value.texts.values)
            if len(texts) > MAX_TEXTS:
                raise InputError(f"{field} has {len(texts)} texts; expected at most {MAX_TEXTS}")
            return tuple(checked_text(text, f"{field}[{n}]") for n, text in enumerate(texts))
        case "vector":
            vector = np.array(value.vector.values, np.float32)
            if not 1 <= len(vector) <= MAX_VECTOR:
                raise InputError(f"{field} has {len(vector)} numbers; expected 1 to {MAX_VECTOR}")
            wrong = ~(np.abs(vector) <= _LARGEST)
            if wrong.any():
                place = int(wrong.argmax())
                raise InputError(
                    f"{field}[{place}] is {vector[place]}; expected a finite number of at most "
                    f"{_LARGEST:g}"
                )
            return vector
    raise InputError(f"{field} has no value; expected a text, a number, texts or a vector")


def _checked_neighbors(item: pb.NewItem, field: str) -> tuple[str, ...]:
    if len(item.neighbors) > MAX_NEIGHBORS:
        raise InputError(
            f"{field} lists {len(item.neighbors)} items; expected at most {MAX_NEIGHBORS}"
        )
    found: dict[str, int] = {}
    for place, neighbor in enumerate(item.neighbors):
        checked_text(neighbor, f"{field}[{place}]")
        if neighbor == item.item_id or neighbor in found:
            raise InputError(
                f"{field}[{place}] is {neighbor!r}, which is the item itself or was listed before; "
                "expected other items, each once"
            )
        found[neighbor] = place
    return tuple(item.neighbors)


def _checked_weights(item: pb.NewItem, field: str) -> tuple[float, ...]:
    weights = tuple(item.neighbor_weights)
    if weights and len(weights) != len(item.neighbors):
        raise InputError(
            f"{field} has {len(weights)} weights for {len(item.neighbors)} neighbors; expected one "
            "for each, or none"
        )
    for place, weight in enumerate(weights):
        if not 0 < weight <= _LARGEST:
            raise InputError(f"{field}[{place}] is {weight}; expected a finite number above 0")
    return weights
