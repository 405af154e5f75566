"""How functions are compiled with numba here: without the GIL, kept on disk where that works."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T", bound=np.generic)


def compiled(function: _F) -> _F:
    """Compile with numba, without the GIL, cached on disk where the disk allows.

    Read-only installations have nowhere to keep numba's cache; there the function is compiled
    once per process (about a second) instead of failing at import.
    """
    return _compiled(function)


def compiled_for_sums(function: _F) -> _F:
    """The same for a function whose sums may be added up in any order, so that they vectorise."""
    return _compiled(function, fastmath={"reassoc", "contract"})


def read_only(array: NDArray[_T]) -> NDArray[_T]:
    """Return a view that may not be written.

    A compiled function takes seconds to be compiled once more for arrays that may be: what is
    mapped in one place and computed in another is handed to it as this.
    """
    view = array.view()
    view.flags.writeable = False
    return view


def _compiled(function: _F, **options: Any) -> _F:
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:
        return numba.njit(nogil=True, **options)(function)  # type: ignore[no-any-return]
