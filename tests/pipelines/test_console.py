"""What a user sees of a local run."""

import io
import logging

from pipelines.console import CacheHits, StepConsole

STEPS = ("build_sessions", "evaluate")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def feed(console: StepConsole, *lines: str) -> None:
    """Print as Kubeflow's runner does: the indent, then the line."""
    for line in lines:
        print("    ", end="", file=console)
        print(line + "\n", end="", file=console)


def test_only_the_steps_own_lines_are_shown() -> None:
    terminal = io.StringIO()
    console = StepConsole(STEPS, terminal)
    print("02:00:00 - INFO - Executing task 'build-sessions'", file=console)
    feed(console, "[KFP Executor] Got executor_input", "{", "}")
    feed(console, "build_sessions started", "  50%|#####     | 1/2", "wrote 3 sessions")
    feed(console, "build_sessions finished in 0.1 s", "[KFP Executor] Wrote executor output")
    print("-" * 80, file=console)
    assert terminal.getvalue().splitlines() == [
        "build_sessions",
        "      50%|#####     | 1/2",
        "    wrote 3 sessions",
        "    finished in 0.1 s",
    ]


def test_progress_overwrites_itself_on_a_terminal() -> None:
    terminal = Terminal()
    console = StepConsole(STEPS, terminal)
    feed(console, "evaluate started", "10%|#", "90%|#########", "done")
    assert terminal.getvalue() == (
        "evaluate\x1b[K\n    10%|#\x1b[K\r    90%|#########\x1b[K\n    done\x1b[K\n"
    )


def test_what_a_dying_process_said_is_remembered() -> None:
    console = StepConsole(STEPS, io.StringIO())
    feed(console, "Traceback (most recent call last):", "ImportError: no torch")
    assert console.last_words().endswith("ImportError: no torch")


def test_cache_hits_are_told_and_collected() -> None:
    terminal = io.StringIO()
    hits = CacheHits(StepConsole(STEPS, terminal))
    for message in (
        "Task build-sessions cache hit (key=0a1b2c3d4e5f); skipping execution.",
        "Task evaluate failed",
    ):
        hits.handle(logging.LogRecord("root", logging.INFO, "", 0, message, None, None))
    assert hits.keys == {"build_sessions": "0a1b2c3d4e5f"}
    assert terminal.getvalue() == "build_sessions: unchanged, using the earlier result\n"
