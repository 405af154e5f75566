"""How long tests wait: on a machine that many others share, any step may take a minute."""

import time
from collections.abc import Callable
from typing import Any, Final

from hiertcn.serving.client import AsyncRecommenderClient, RecommenderClient

WAIT_S: Final = 120.0
PATIENT_SERVE: Final = f"--model-deadline-ms={int(WAIT_S * 1000)}"
"""Option of `hiertcn serve` with which slowness alone makes no answer a fallback."""


def until(condition: Callable[[], Any], check: Callable[[], Any] = lambda: True) -> None:
    """Ask until it holds; ``check`` must hold all the while."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert check()
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def patient_client(address: str, **options: Any) -> RecommenderClient:
    """A client that gives up only when the test should fail."""
    return RecommenderClient(address, timeout_s=WAIT_S, **options)


def patient_async_client(address: str, **options: Any) -> AsyncRecommenderClient:
    """The same for asyncio."""
    return AsyncRecommenderClient(address, timeout_s=WAIT_S, **options)
