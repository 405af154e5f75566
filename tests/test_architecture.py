"""The house's rule: imports only point down the list of rooms (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ["pipelines", "components", "models", "hiertcn"]
ROOMS = [
    "events",
    "items",
    "graph",
    "sessions",
    "training",
    "evaluation",
    "export",
    "release",
    "serving",
    "cli",
]


def _imports(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("package", HOUSE)
def test_packages_import_only_downwards(package: str) -> None:
    above = set(HOUSE[: HOUSE.index(package)])
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in _sources(package)
        for name, line in _imports(file)
        if name.split(".")[0] in above
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_earlier_rooms(room: str) -> None:
    later = set(ROOMS[ROOMS.index(room) + 1 :])
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in _sources(f"hiertcn/{room}")
        for name, line in _imports(file)
        if name.startswith("hiertcn.") and name.split(".")[1] in later
    ]
    assert not wrong, wrong


def test_components_import_only_kfp_at_module_level() -> None:
    wrong = []
    for file in _sources("components"):
        for node in ast.parse(file.read_text()).body:
            names = (
                [n.name for n in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            wrong += [
                f"{file.name}: {name}"
                for name in names
                if name.split(".")[0] in ("hiertcn", "models")
            ]
    assert not wrong, wrong


def test_no_module_pickles() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for folder in [*HOUSE, "benchmarks"]
        for file in _sources(folder)
        for name, line in _imports(file)
        if name.split(".")[0] in ("pickle", "cloudpickle", "dill", "joblib")
    ]
    assert not wrong, wrong
