"""The errors a user of hiertcn can meet, and the exit code each ends a command with.

    HiertcnError
    ├── InputError        what the user gave is wrong: exit code 2
    │   └── ReleaseError  a release is incomplete, corrupt or incompatible: exit code 2
    └── ServingError      a running part (Triton, sidecar, store) is gone or refused: exit code 3

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


class ServingError(HiertcnError):
    """A part that serving depends on could not be reached or started."""

    exit_code = 3
