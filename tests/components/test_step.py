"""How a step ends, what it records, and what its lineage covers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.step import RECORDS, SNAPSHOTS, keep_under, lineage, resumable_folder, step
from hiertcn.errors import InputError, ServingError


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_input_ends_a_step_with_its_sentence_and_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended, step("evaluate", {}):
        raise ServingError("the sidecar is gone; start it")
    assert ended.value.code == 3
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "error: the sidecar is gone; start it"
    assert "Traceback" not in "\n".join(said)


def test_anything_else_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), step("evaluate", {}):
        raise ZeroDivisionError("no")


def test_the_local_runner_is_told_how_each_step_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "steps.jsonl"
    monkeypatch.setenv(RECORDS, str(records))
    with step("publish_release", {}) as running:
        running.record(release=7)
    with pytest.raises(SystemExit), step("evaluate", {}):
        raise InputError("what to do")
    with pytest.raises(ValueError), step("embed_items", {}):
        raise ValueError("bug")
    summary = [(entry["step"], entry["status"]) for entry in recorded(records)]
    assert summary == [
        ("publish_release", "started"),
        ("publish_release", "finished"),
        ("evaluate", "started"),
        ("evaluate", "failed"),
        ("embed_items", "started"),
        ("embed_items", "failed"),
    ]
    finished, _, failed, _, crashed = recorded(records)[1:]
    assert finished["values"] == {"release": 7}
    assert (failed["message"], failed["exit_code"]) == ("what to do", 2)
    assert (crashed["message"], crashed["exit_code"]) == ("ValueError: bug", 1)
    assert "what to do" not in capsys.readouterr().err


def test_lineage_changes_with_every_plain_argument_and_not_with_artifacts() -> None:
    base = lineage("embed_items", {"lineage": "a", "seed": 0, "columns": ["x"]})
    assert base == lineage(
        "embed_items", {"seed": 0, "lineage": "a", "columns": ["x"], "table": SimpleNamespace()}
    )
    others = [
        lineage("evaluate", {"lineage": "a", "seed": 0, "columns": ["x"]}),
        lineage("embed_items", {"lineage": "b", "seed": 0, "columns": ["x"]}),
        lineage("embed_items", {"lineage": "a", "seed": 1, "columns": ["x"]}),
        lineage("embed_items", {"lineage": "a", "seed": 0, "columns": ["x", "y"]}),
    ]
    assert len({base, *others}) == 5


def artifact(path: Path) -> Any:
    path.mkdir()
    (path / "part").write_text(path.name)
    return SimpleNamespace(name="snapshot", path=str(path), uri=str(path))


def test_the_same_content_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SNAPSHOTS, str(tmp_path / "kept"))
    first, second = artifact(tmp_path / "first"), artifact(tmp_path / "second")
    keep_under("digest", first)
    keep_under("digest", second)
    assert first.uri == second.uri == str(tmp_path / "kept" / "digest" / "snapshot")
    assert (Path(first.uri) / "part").read_text() == "first"
    assert not (tmp_path / "first").exists()
    assert not (tmp_path / "second").exists()


def test_on_a_cluster_outputs_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SNAPSHOTS, raising=False)
    given = artifact(tmp_path / "given")
    keep_under("digest", given)
    assert given.uri == str(tmp_path / "given")


def test_an_unfinished_training_finds_its_folder_again(tmp_path: Path) -> None:
    store, output = tmp_path / "checkpoints", tmp_path / "run" / "model"
    with (
        pytest.raises(KeyboardInterrupt),
        resumable_folder(output, str(store), "abc") as folder,
    ):
        folder.mkdir()
        (folder / "checkpoint").write_text("half")
        raise KeyboardInterrupt
    assert not output.exists()
    with resumable_folder(output, str(store), "abc") as folder:
        assert (folder / "checkpoint").read_text() == "half"
    assert (output / "checkpoint").read_text() == "half"
    assert not list(store.iterdir())
    with resumable_folder(output, "", "abc") as folder:
        assert folder == output
