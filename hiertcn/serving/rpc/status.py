"""The gRPC status that each kind of error is answered with.

InputError             INVALID_ARGUMENT, a sentence that names the field
ReleaseError           FAILED_PRECONDITION: the release must not be served
UnauthenticatedError   UNAUTHENTICATED
PermissionDeniedError  PERMISSION_DENIED
OverloadError          RESOURCE_EXHAUSTED: a limit is reached; try again later
DeadlineError          DEADLINE_EXCEEDED: the caller's time was over before anything was done
ServingError           UNAVAILABLE: the disk or Triton failed; a retry may succeed
"""

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

# The first that an error is an instance of, so subclasses come before their bases.
_STATUS: Final[tuple[tuple[type[HiertcnError], Any], ...]] = (
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (ReleaseError, grpc.StatusCode.FAILED_PRECONDITION),
    (InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (OverloadError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (ServingError, grpc.StatusCode.UNAVAILABLE),
)


def status_of(error: HiertcnError) -> Any:
    """The ``grpc.StatusCode`` of an error; INTERNAL for one that none was chosen for."""
    return next(
        (code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL
    )
