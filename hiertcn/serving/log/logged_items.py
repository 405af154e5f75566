"""The log's entry of an upserted item: what is needed to embed it under any release.

    uint8 kind, uint8 0, uint16 bytes of the id, uint32 bytes of the JSON, uint64 version,
    int64 received, then the id, then a JSON object ``attributes``, ``neighbors``, ``weights`` in
    which a vector is ``{"vector": length}``, then the vectors' float32 in the attributes' order

Little-endian; vectors are not JSON because they are most of an entry's bytes.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

KIND: Final = 4
"""First byte of such an entry in the event log."""

Attribute = str | float | tuple[str, ...] | NDArray[np.float32]
"""A text, a number, texts (tags), or a vector."""

_HEADER: Final = struct.Struct("<BxHIQq")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoggedItem:
    """An item as it was upserted.

    Attributes:
        item_id: text id.
        version: grows with every upsert of any item in one log; the highest of an item counts.
        received_us: when it came, microseconds since the epoch.
        attributes: by column name.
        neighbors: ids of items it belongs to.
        weights: one above 0 per neighbor, or none for equal ones.
    """

    item_id: str
    version: int
    received_us: int
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    neighbors: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


def pack(item: LoggedItem) -> bytes:
    """The entry's bytes."""
    name = item.item_id.encode()
    vectors = [value for value in item.attributes.values() if isinstance(value, np.ndarray)]
    described = json.dumps(
        {
            "attributes": {
                column: {"vector": len(value)} if isinstance(value, np.ndarray) else value
                for column, value in item.attributes.items()
            },
            "neighbors": item.neighbors,
            "weights": item.weights,
        },
        ensure_ascii=False,
        separators=(",", ":"),
    ).encode()
    header = _HEADER.pack(KIND, len(name), len(described), item.version, item.received_us)
    return b"".join(
        [header, name, described, *(np.asarray(one, "<f4").tobytes() for one in vectors)]
    )


def unpack(payload: bytes) -> LoggedItem:
    """The item of :func:`pack`'s bytes."""
    _, name_bytes, described_bytes, version, received_us = _HEADER.unpack_from(payload)
    start = _HEADER.size + name_bytes
    described: dict[str, Any] = json.loads(payload[start : start + described_bytes])
    at = start + described_bytes
    attributes: dict[str, Attribute] = {}
    for column, value in described["attributes"].items():
        if isinstance(value, dict):
            attributes[column] = np.frombuffer(payload, "<f4", value["vector"], at)
            at += 4 * value["vector"]
        else:
            attributes[column] = tuple(value) if isinstance(value, list) else value
    return LoggedItem(
        item_id=payload[_HEADER.size : start].decode(),
        version=version,
        received_us=received_us,
        attributes=attributes,
        neighbors=tuple(described["neighbors"]),
        weights=tuple(described["weights"]),
    )
