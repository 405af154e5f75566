"""Many short texts laid end to end: how ids are handed from the wire to an index, uncopied.

A Python string for each of 500 ids costs more than finding their rows; two arrays do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Texts:
    """UTF-8 texts.

    Attributes:
        offsets: int64 ``[n + 1]`` into ``utf8``; text ``i`` ends where ``i + 1`` begins.
        utf8: uint8 ``[bytes]``.
    """

    offsets: NDArray[np.int64]
    utf8: NDArray[np.uint8]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        """Lay texts end to end.

        Raises:
            UnicodeEncodeError: one holds a lone surrogate.
        """
        encoded = [text.encode() for text in texts]
        offsets = np.fromiter(accumulate(map(len, encoded), initial=0), np.int64, len(encoded) + 1)
        return cls(offsets, np.frombuffer(b"".join(encoded), np.uint8))

    @classmethod
    def joined(cls, parts: Sequence["Texts"]) -> "Texts":
        """The texts of all parts, one part after another."""
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = np.zeros(len(lengths) + 1, np.int64)
        lengths.cumsum(out=offsets[1:])
        return cls(
            offsets,
            np.concatenate([part.utf8[part.offsets[0] : part.offsets[-1]] for part in parts]),
        )

    def arrow(self) -> pa.Array:
        """The same as a large_string array, uncopied."""
        offsets, utf8 = pa.py_buffer(self.offsets), pa.py_buffer(self.utf8)
        return pa.LargeStringArray.from_buffers(len(self), offsets, utf8)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, place: int) -> str:
        """The text at a place, 0 to ``len(self) - 1``."""
        start, end = self.offsets[place : place + 2].tolist()
        return self.utf8[start:end].tobytes().decode()
