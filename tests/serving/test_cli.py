"""The ``hiertcn`` command as a user runs it: what it prints, and how it ends when it cannot."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hiertcn import __version__
from hiertcn.cli import app
from hiertcn.errors import InputError
from hiertcn.serving.client import Interaction
from tests.waiting import PATIENT_SERVE, WAIT_S, until

T0 = 1_767_225_600_000_000 + 3_600_000_000


def run(*arguments: str, stdin: str | None = None) -> str:
    """The command's output; its errors are raised."""
    result = CliRunner().invoke(app, arguments, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: str, stdin: str | None = None) -> str:
    with pytest.raises(InputError) as caught:
        run(*arguments, stdin=stdin)
    return str(caught.value)


def ended(*arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and stderr of the command in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-m", "hiertcn.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env={**os.environ, **environment},
    )
    return found.returncode, found.stderr


@pytest.fixture
def running(shared_toy, shared_triton, start_sidecar):
    return start_sidecar(shared_toy, shared_triton.grpc_url)


@pytest.fixture
def address(running) -> str:
    return running.sidecar.address


def test_help_gives_every_commands_units_and_defaults():
    assert "recommend" in run("--help")
    assert run("--version").strip() == __version__
    texts = {
        command: " ".join(run(*command.split(), "--help").replace("│", " ").split())
        for command in ("serve", "recommend", "record", "simulate", "releases prune")
    }
    assert "milliseconds" in texts["serve"] and "[default: 200.0]" in texts["serve"]
    assert "[default: 50051]" in texts["serve"]
    assert "in seconds" in texts["recommend"] and "[default: 10]" in texts["recommend"]
    assert "microseconds" in texts["record"]
    assert "in days" in texts["simulate"] and "[default: 30]" in texts["simulate"]
    assert "[default: 5]" in texts["releases prune"]


def test_recommend_prints_json_or_a_table(shared_toy, address):
    toy = shared_toy.toys[2026010101]
    options = ["--address", address, "--timestamp", "2026-01-01T01:00:00Z", "-k", "3"]
    found = json.loads(run("recommend", "user-1", *options, "--json"))
    assert found["release"] == toy.number
    assert [item["item_id"] for item in found["items"]] == toy.best(
        toy.scores(toy.states["user-1"]), 3
    )
    table = run("recommend", "user-1", *options, "--candidate", "item-3", "--candidate", "none")
    assert "item-3" in table and str(toy.number) in table
    assert "unknown to the release: none" in table


def test_recommend_takes_filters_seen_items_and_a_deadline(running, address):
    running.client.record([Interaction("ada", "item-1", T0)])
    options = ["ada", "--address", address, "--timestamp", str(T0), "-k", "50", "--json"]
    assert len(json.loads(run("recommend", *options))["items"]) == 50
    found = json.loads(run("recommend", *options, "--exclude-seen", "--deadline-ms", "2000"))
    assert "item-1" not in {item["item_id"] for item in found["items"]}
    assert "no item attributes" in refusal("recommend", *options, "--filter", "colour=red")
    assert "was not understood" in refusal("recommend", *options, "--filter", "colour")


def test_record_takes_options_files_and_stdin(running, address, tmp_path):
    one = ["record", "--user", "ada", "--item", "item-1", "--timestamp", str(T0)]
    found = json.loads(run(*one, "--address", address, "--json"))
    assert found == {"accepted": 1, "duplicates": 0, "late": 0, "unknown_items": []}
    lines = [
        {"user_id": "ada", "item_id": "item-1", "timestamp_us": T0},
        {"user_id": 7, "item_id": "item-2", "timestamp": "2026-01-01T02:00:00+00:00"},
        {"user_id": "ada", "item_id": "new", "timestamp_us": T0, "event_type": "click"},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    (tmp_path / "lines.jsonl").write_text(text)
    found = run("record", str(tmp_path / "lines.jsonl"), "--address", address)
    assert found.strip() == "accepted 2, duplicates 1, of the accepted late 0, unknown items 1"
    assert "accepted 0, duplicates 3" in run("record", "-", "--address", address, stdin=text)
    (entry,) = running.client.get_user("7").journal
    assert (entry.item_id, entry.timestamp_us) == ("item-2", T0 + 3_600_000_000)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is list; expected an object"),
        ('{"user_id": "a"}', "line 2 has item_id None"),
        ('{"user_id": "", "item_id": "b"}', "line 2 has user_id ''"),
        ('{"user_id": "a", "item_id": "b", "when": 1}', "line 2 has the unknown field 'when'"),
        ('{"user_id": "a", "item_id": "b", "timestamp": "noon"}', "line 2: timestamp is 'noon'"),
        ('{"user_id": "a", "item_id": "b", "event_type": 3}', "line 2 has event_type 3"),
    ],
)
def test_a_bad_line_is_named(address, line, message):
    text = '{"user_id": "a", "item_id": "item-1"}\n' + line
    assert message in refusal("record", "-", "--address", address, stdin=text)


def test_record_needs_exactly_one_source(tmp_path):
    assert "expected exactly one" in refusal("record")
    assert "expected exactly one" in refusal("record", "-", "--user", "a", "--item", "b")
    assert "one of them is missing" in refusal("record", "--user", "a")
    assert "cannot be read" in refusal("record", str(tmp_path / "absent.jsonl"))
    assert "--timestamp is 'noon'" in refusal(
        "record", "--user", "a", "--item", "b", "--timestamp", "noon"
    )


def test_simulate_writes_a_log(tmp_path):
    told = run("simulate", str(tmp_path / "log"), "--users", "30", "--items", "40", "--days", "3")
    assert "wrote" in told and "40 items" in told
    assert list((tmp_path / "log" / "events").glob("date=*/part-*.parquet"))


def test_releases_are_listed_shown_flipped_and_pruned(toy_repository):
    root = str(toy_repository.root)
    for number in (2026010101, 2026010201, 2026010301):
        toy_repository.publish(number)
    listed = json.loads(run("releases", "list", "--repository", root, "--json"))
    assert [(one["release"], one["current"], one["previous"]) for one in listed] == [
        (2026010301, True, False),
        (2026010201, False, True),
        (2026010101, False, False),
    ]
    assert "current" in run("releases", "list", "--repository", f"{root}/triton_repo")
    shown = json.loads(run("releases", "show", "2026010201", "--repository", root))
    assert shown["watermark"] == "2026-01-01T00:00:00Z"
    assert "2026010201 is current" in run("releases", "rollback", "--repository", root)
    told = run("releases", "activate", "2026010301", "--repository", root)
    assert "2026010301 is current" in told
    assert "removed 2026010101" in run("releases", "prune", "--repository", root, "--keep", "1")
    assert "no release 5" in refusal("releases", "show", "5", "--repository", root)
    assert "does not exist" in refusal("releases", "list", "--repository", f"{root}/absent")


def test_what_cannot_be_served_ends_with_one_sentence_and_code_2(toy_repository, tmp_path):
    root = toy_repository.root
    state = ["--state-dir", str(tmp_path / "state"), "--metrics-port", "-1"]
    ports = ["--triton-grpc-port", "0", "--triton-http-port", "0"]
    code, said = ended("serve", "--repository", str(tmp_path / "absent"), *state)
    assert (code, said.count("\n")) == (2, 1)
    assert "absent does not exist" in said
    toy_repository.publish(2026010101, activate=False)
    code, said = ended("serve", "--repository", str(root), *state)
    assert (code, said.count("\n")) == (2, 1)
    assert "has no current release" in said
    toy_repository.repository.activate(2026010101)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, said = ended("serve", "--repository", str(root), "--port", port, *state)
        assert (code, said.count("\n")) == (2, 1)
        assert f"--port {port} on 127.0.0.1 cannot be bound" in said
    (tmp_path / "file").write_text("")
    elsewhere = tmp_path / "shop(old)"
    elsewhere.symlink_to(root, target_is_directory=True)
    for options, told in (
        (["--state-dir", str(tmp_path / "file")], "file/log cannot be written (Not a directory)"),
        (["--state-dir", "/proc/state"], "/proc/state/log cannot be written"),
        (["--state-dir", str(tmp_path / "a b")], "from a path with ' '"),
        (["--repository", str(elsewhere), *state], "from a path with '('"),
        (["--host", "nowhere.invalid", *state], "--host is 'nowhere.invalid', which is no address"),
    ):
        code, said = ended("serve", "--repository", str(root), "--port", "0", *options)
        assert (code, said.count("\n")) == (2, 1)
        assert told in said
    code, said = ended(
        *("serve", "--repository", str(root), "--port", "0", *state, *ports),
        HIERTCN_TRITON_HOME=str(tmp_path / "no-triton"),
    )
    assert code == 2
    assert said.splitlines()[-1].startswith("error: HIERTCN_TRITON_HOME is")
    assert not (tmp_path / "state" / "serving.json").exists()


def test_no_sidecar_ends_with_one_sentence_and_code_3():
    code, said = ended("recommend", "ada", "--address", "127.0.0.1:1", "--timeout", "1")
    assert (code, said.count("\n")) == (3, 1)
    assert "127.0.0.1:1" in said


def test_serve_starts_triton_restarts_it_and_leaves_nothing_running(toy_repository, tmp_path):
    toy_repository.publish(2026010101)
    command = [sys.executable, "-m", "hiertcn.cli", "serve", "--port", "0", "--metrics-port", "0"]
    command += ["--repository", str(toy_repository.root), "--state-dir", str(tmp_path / "state")]
    command += ["--triton-grpc-port", "0", "--triton-http-port", "0", PATIENT_SERVE]
    serving = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert any("ready;" in line for line in serving.stderr)
        where = json.loads((tmp_path / "state" / "serving.json").read_text())
        assert where["pid"] == serving.pid
        assert where["release"] == 2026010101
        recommend = ("recommend", "user-1", "--json", "--address", where["address"])
        assert not json.loads(run(*recommend))["fallback"]
        (triton,) = tritons_of(serving.pid)
        os.kill(triton, signal.SIGKILL)
        assert json.loads(run(*recommend))["items"]
        until(lambda: not json.loads(run(*recommend))["fallback"])
        assert tritons_of(serving.pid) not in ([], [triton])
        children = tritons_of(serving.pid)
    finally:
        serving.terminate()
        serving.communicate()
    assert serving.returncode == 0
    assert not (tmp_path / "state" / "serving.json").exists()
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def tritons_of(pid: int) -> list[int]:
    import psutil

    return [
        child.pid
        for child in psutil.Process(pid).children()
        if child.status() != psutil.STATUS_ZOMBIE
    ]
