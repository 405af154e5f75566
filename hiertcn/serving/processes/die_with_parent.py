"""Run a program that dies when its parent does: ``die_with_parent.py PARENT_PID PROGRAM ARGS…``.

Asks Linux to send SIGKILL on the parent thread's death (prctl(2), PR_SET_PDEATHSIG), which
survives exec, and then becomes the program. A program started straight from a multi-threaded
Python cannot ask this of itself safely (``preexec_fn`` may deadlock), hence this small step of
some 20 ms.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def dying_with_parent(*program: str) -> tuple[str, ...]:
    """The command line of a program that is to die with the calling process."""
    return (sys.executable, "-I", "-S", __file__, str(os.getpid()), *program)


def main() -> None:
    """Become the program given on the command line."""
    parent, program = int(sys.argv[1]), sys.argv[2:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the request was in place.
    if os.getppid() != parent:
        sys.exit(1)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
