"""The architecture of the file list: an import goes downwards only, and rooms on one floor do not know each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = [
    ["types", "errors", "progress", "resources", "sampling"],
    ["watch"],
    ["download", "distributed", "crops"],
    ["preprocess"],
    [
        "models",
        "pretrained",
        "data",
        "optim",
        "lora",
        "sharding",
        "metrics",
        "analysis",
        "plotting",
        "writer",
    ],
    ["steps", "settings"],
    ["checkpoint", "features", "build"],
    ["program", "classifier"],
    ["job"],
    ["trainer", "dry_run"],
    ["evaluate", "predict", "export", "compare", "visualize"],
    ["report"],
]


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("vit_jax.")}


def files() -> dict[str, list[Path]]:
    package = ROOT / "vit_jax"
    rooms = {path.stem: [path] for path in package.glob("*.py") if path.stem != "__init__"}
    folders = {"models", "data", "pretrained"}  # files of one folder may know each other
    return rooms | {name: sorted((package / name).glob("*.py")) for name in folders}


def test_every_file_has_a_floor():
    assert set(files()) == {room for floor in FLOORS for room in floor}


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_imports_go_downwards(room):
    (level,) = (i for i, floor in enumerate(FLOORS) if room in floor)
    below = {other for floor in FLOORS[:level] for other in floor} | {room}
    for path in files()[room]:
        assert imported_rooms(path) <= below, path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_configs_know_only_each_other(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module in ("ml_collections", "configs"), module
