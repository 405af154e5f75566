"""Takes a request's candidates off the wire without making a Python string of each.

Parsing 500 ids into strings and back into bytes costs half of what ranking them does. So the
encoded candidates are copied out of the message as they are (Protocol Buffers, "Encoding"), and
protobuf parses what is left. Only what needs no second look is taken this way: ids in ASCII of
ordinary length. Anything else, and anything malformed, is left for protobuf and the checks.
"""

from typing import Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from hiertcn.compiling import compiled
from hiertcn.errors import InputError
from hiertcn.items.texts import Texts
from hiertcn.serving import recommender_pb2 as pb
from hiertcn.serving.rpc.malformed import malformed
from hiertcn.serving.rpc.validation import MAX_ID_BYTES, MAX_LISTED_ITEMS

_CANDIDATES: Final = pb.RecommendRequest.DESCRIPTOR.fields_by_name["candidates"].number
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


class ReceivedRecommend(NamedTuple):
    """A ``RecommendRequest`` off the wire.

    Attributes:
        message: the request; without its candidates if they are beside it.
        candidates: the candidates, every one of them valid; None if ``message`` has them.
    """

    message: pb.RecommendRequest
    candidates: Texts | None


def received_recommend(data: bytes) -> ReceivedRecommend | InputError:
    """Parse a ``RecommendRequest``; return the error if it is none."""
    wire = np.frombuffer(data, np.uint8)
    offsets = np.empty(min(len(wire) // 2, MAX_LISTED_ITEMS) + 1, np.int64)
    utf8, rest = np.empty(len(wire), np.uint8), np.empty(len(wire), np.uint8)
    count, left = _taken_out(wire, _CANDIDATES, MAX_ID_BYTES, offsets, utf8, rest)
    try:
        if count <= 0:
            return ReceivedRecommend(pb.RecommendRequest.FromString(data), None)
        message = pb.RecommendRequest.FromString(rest[:left].tobytes())
    except DecodeError:
        return malformed(data, pb.RecommendRequest.DESCRIPTOR)
    return ReceivedRecommend(message, Texts(offsets[: count + 1], utf8[: offsets[count]]))


@compiled
def _taken_out(
    wire: NDArray[np.uint8],
    field: int,
    longest: int,
    offsets: NDArray[np.int64],
    utf8: NDArray[np.uint8],
    rest: NDArray[np.uint8],
) -> tuple[int, int]:
    """Part a message into the texts of one field and the bytes of all others.

    Args:
        wire: uint8 ``[n]``, the encoded message.
        field: number of a repeated string field.
        longest: bytes that one of the texts may have; none may be empty.
        offsets: int64 ``[most + 1]``, overwritten: where each text begins in ``utf8``.
        utf8: uint8 ``[n]``, overwritten.
        rest: uint8 ``[n]``, overwritten.

    Returns:
        How many texts there are and the length of ``rest``; -1 for a message that has to be looked
        at more closely.
    """
    at = count = held = left = 0
    offsets[0] = 0
    while at < len(wire):
        start = at
        tag, at = _varint(wire, at)
        kind = tag & 7
        if at < 0 or tag >> 3 == 0:
            return -1, 0
        if kind == _VARINT:
            _, at = _varint(wire, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _LENGTH_DELIMITED:
            size, at = _varint(wire, at)
            if at < 0 or size > len(wire) - at:
                return -1, 0
            if tag >> 3 == field:
                if size == 0 or size > longest or count + 1 == len(offsets):
                    return -1, 0
                seen = np.uint8(0)
                for place in range(at, at + size):
                    utf8[held] = wire[place]
                    seen |= wire[place]
                    held += 1
                if seen >= 128:
                    return -1, 0
                count += 1
                offsets[count] = held
                at += size
                continue
            at += size
        else:
            return -1, 0
        if at < 0 or at > len(wire):
            return -1, 0
        for place in range(start, at):
            rest[left] = wire[place]
            left += 1
    return count, left


@compiled
def _varint(wire: NDArray[np.uint8], at: int) -> tuple[int, int]:
    """The low 63 bits of a varint and the place behind it, which is -1 if there is none."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(wire):
            return 0, -1
        byte = int(wire[at])
        at += 1
        if shift < 63:
            value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return 0, -1
