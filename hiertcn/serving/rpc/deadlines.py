"""Until when a request may wait for the models, so that its answer still is in time.

A caller says how long an answer is worth waiting for, in the request (``deadline_ms``) or through
gRPC's own deadline; the shorter counts. Part of it is kept for what follows the models: ranking,
and the reply's way back. When the models have not answered by then, a simpler ranking does.
"""

import time
from typing import Any, Final

_KEPT_SHARE: Final = 0.25
_MOST_KEPT_S: Final = 0.02


def models_until(deadline_ms: int, context: Any) -> float | None:
    """When to stop waiting for the models, in seconds of ``time.monotonic``; None for never.

    Args:
        deadline_ms: the request's own deadline, 0 for none.
        context: the gRPC call, which may have one too.
    """
    left_s: float | None = context.time_remaining()
    if deadline_ms and (left_s is None or deadline_ms / 1000 < left_s):
        left_s = deadline_ms / 1000
    if left_s is None:
        return None
    return time.monotonic() + left_s - min(_KEPT_SHARE * left_s, _MOST_KEPT_S)
