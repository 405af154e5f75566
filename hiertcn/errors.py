"""The errors a user of hiertcn can meet, and the exit code each ends a command with.

    HiertcnError
    ├── InputError                 what the user gave is wrong: exit code 2
    │   ├── ReleaseError           a release is incomplete, corrupt or incompatible
    │   ├── UnauthenticatedError   a request carries no valid token
    │   └── PermissionDeniedError  a request's token may not do this
    └── ServingError               a running part (Triton, sidecar, store) is gone: exit code 3
        ├── OverloadError          a limit is reached; the message names it
        └── DeadlineError          the caller's time was over before anything was done

Every message is one sentence that says what, where, what was expected, and what to do.
"""


class HiertcnError(Exception):
    """Base of every error that hiertcn raises on purpose; ``exit_code`` is the process's."""

    exit_code = 1


class InputError(HiertcnError):
    """Bad input at the door: names the field or file, the value, and what was expected."""

    exit_code = 2


class ReleaseError(InputError):
    """A release that must not be served: incomplete, corrupt, or of another shape."""


class UnauthenticatedError(InputError):
    """A request carries no token, or one that the sidecar does not know."""


class PermissionDeniedError(InputError):
    """A request's token lacks the scope that the method needs."""


class ServingError(HiertcnError):
    """A part that serving depends on could not be reached or started."""

    exit_code = 3


class OverloadError(ServingError):
    """A limit on rate, queue or memory is reached; nothing was done, and the message names it."""


class DeadlineError(ServingError):
    """The time that a caller gave a request was over before anything was done."""
