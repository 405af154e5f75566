"""How the Python clients call: what is retried, when calls are given up, what an error means.

gRPC itself retries a call that found the sidecar unavailable, up to three times, after a random
time of at most 50, 150 and 450 ms (gRFC A6), and within the call's deadline. That is safe for every
method: a release is activated and a user deleted as well twice as once, and an interaction is
recorded once per user, item and time. An overloaded sidecar is not asked again.

After five calls in a row without an answer the circuit breaker opens: for a second calls fail at
once, then one tries again.
"""

import json
from typing import Any, Final

import grpc

from hiertcn.errors import (
    DeadlineError,
    HiertcnError,
    InputError,
    OverloadError,
    PermissionDeniedError,
    ReleaseError,
    ServingError,
    UnauthenticatedError,
)
from hiertcn.serving.inference.breaker import CircuitBreaker

_MAX_MESSAGE_BYTES: Final = 16 << 20
_UNANSWERED: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class CallOutcomes:
    """Whether the sidecar at ``address`` may be called, and what its errors mean.

    Args:
        address: ``host:port``, for messages.
        breaker: told of every call; a new one by default.
    """

    def __init__(self, address: str, breaker: CircuitBreaker | None = None) -> None:
        self._address = address
        self._breaker = breaker or CircuitBreaker()

    def check(self) -> None:
        """Let a call begin.

        Raises:
            ServingError: the breaker is open.
        """
        if not self._breaker.allows():
            raise ServingError(
                f"the sidecar at {self._address} has not answered several times and is not asked "
                "for a moment; see whether 'hiertcn serve' runs there"
            )

    def answered(self) -> None:
        """Note that a call was answered."""
        self._breaker.succeeded()

    def error(self, error: Any) -> HiertcnError:
        """Note how a call failed, and say it as an error of the library."""
        if error.code() in _UNANSWERED:
            self._breaker.failed()
        else:
            self._breaker.succeeded()
        return failure(error, self._address)


def channel_options() -> list[tuple[str, Any]]:
    """Options of a client's channel: how calls are retried, and the largest messages."""
    retry = {
        "maxAttempts": 4,
        "initialBackoff": "0.05s",
        "maxBackoff": "0.5s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    services = [{"service": f"hiertcn.v1.{name}"} for name in ("Recommender", "Releases")]
    return [
        (
            "grpc.service_config",
            json.dumps(
                {
                    "methodConfig": [{"name": services, "retryPolicy": retry}],
                    # Retries stop while more than half of the calls fail.
                    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.1},
                }
            ),
        ),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        # Clients of one process would share a connection, and with it one of a sidecar's workers.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def is_retried(error: Any) -> bool:
    """Whether a call that ended so may be made again."""
    return bool(error.code() == grpc.StatusCode.UNAVAILABLE)


def failure(error: Any, address: str) -> HiertcnError:
    """The error of the library that a gRPC error stands for."""
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return InputError(details)
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        return ReleaseError(details)
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return UnauthenticatedError(details)
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return PermissionDeniedError(details)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return OverloadError(details)
    if code == grpc.StatusCode.CANCELLED:
        # Not this client's doing: gRPC drops the calls that it has no room for.
        return OverloadError(
            f"the sidecar at {address} has more calls waiting than it has room for; try again later"
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"the sidecar at {address} did not answer in time ({details})")
    return ServingError(
        f"the sidecar at {address} did not answer ({code.name}: {details}); see whether "
        "'hiertcn serve' runs there"
    )
