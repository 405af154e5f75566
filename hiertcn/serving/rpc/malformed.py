"""Says what is wrong with bytes that are no message of the type they were sent as.

Protobuf only says that it cannot parse them. The commonest fault is a text that is not UTF-8, so
the encoded message is walked (Protocol Buffers, "Encoding") to the first such field.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from hiertcn.errors import InputError

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_SHOWN: Final = 40
# A message of megabytes can have a million fields, and all calls wait while one is walked.
_MOST_FIELDS: Final = 20_000


def malformed(data: bytes, message_type: Any) -> InputError:
    """The error that a request is answered with.

    Args:
        data: what could not be parsed.
        message_type: descriptor of the message that was expected.
    """
    try:
        found = _not_utf8(data, message_type, iter(range(_MOST_FIELDS, 0, -1)))
    except (IndexError, ValueError):
        found = None
    if found is None:
        return InputError(
            f"the request is not a {message_type.full_name} message ({len(data)} bytes); build it "
            "from recommender.proto"
        )
    field, text = found
    shown = f"{text[:_SHOWN]!r}{'…' if len(text) > _SHOWN else ''}"
    return InputError(f"{field} is {shown}, which is not UTF-8; expected text")


def _not_utf8(
    data: bytes, message_type: Any, allowance: Iterator[int], within: str = ""
) -> tuple[str, bytes] | None:
    """Name and bytes of the first text field that is not UTF-8, None without one.

    Args:
        data: the encoded message.
        message_type: its descriptor.
        allowance: counts down the fields that may still be walked.
        within: the name of the field that holds the message, with a point.

    Raises:
        IndexError, ValueError: the bytes are no message at all.
    """
    at = 0
    seen: Counter[int] = Counter()
    while at < len(data) and next(allowance, 0):
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _LENGTH_DELIMITED:
            size, at = _varint(data, at)
            part, at = data[at : at + size], at + size
            field = message_type.fields_by_number.get(number)
            if field is None:
                continue
            name = f"{within}{field.name}"
            if field.is_repeated:
                name += f"[{seen[number]}]"
                seen[number] += 1
            if field.type == field.TYPE_STRING and not _is_utf8(part):
                return name, part
            if field.type == field.TYPE_MESSAGE:
                found = _not_utf8(part, field.message_type, allowance, f"{name}.")
                if found is not None:
                    return found
        else:
            raise ValueError(kind)
    return None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError(shift)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
