"""Writes a .npy column whose length is only known at the end."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, DTypeLike


class ColumnWriter:
    """Appends to ``directory/name.npy``; the file is valid once :meth:`close` has returned.

    numpy pads the header so that the first axis can grow, which lets the final length be written
    over the initial zero in place.
    """

    def __init__(self, directory: Path, name: str, dtype: DTypeLike) -> None:
        self.length = 0
        """Values appended so far."""
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self._file = (directory / f"{name}.npy").open("w+b")
        self._write_header()
        self._data_start = self._file.tell()

    def append(self, values: ArrayLike) -> None:
        """Append a one-dimensional array, cast to the column's type."""
        array = np.ascontiguousarray(values, self._dtype)
        self._file.write(array.data)
        self.length += array.size

    def close(self) -> None:
        """Write the final length and close the file."""
        self._file.seek(0)
        self._write_header()
        if self._file.tell() != self._data_start:
            raise AssertionError("numpy's header grew with the column's length")
        self._file.close()

    def _write_header(self) -> None:
        npy.write_array_header_1_0(
            self._file,
            {
                "descr": npy.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self.length,),
            },
        )
