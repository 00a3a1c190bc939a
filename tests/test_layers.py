"""Package layout: imports point downwards, and every module has tests."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = [  # a module or package imports from itself and from the rows above it
    ["types"],
    ["runtime"],
    ["config", "models"],
    ["data", "pretrained", "visualization"],
    ["training"],
    ["classifier"],
    ["run"],
    ["trainer", "evaluate", "predict", "export", "compare", "visualize", "probe", "inspect"],
    ["report"],
]


def imported_units(path: Path) -> set[str]:
    """Returns the top-level modules and packages of vit_jax that a file imports, at any level of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("vit_jax.")} - {"__version__"}


def units() -> dict[str, list[Path]]:
    package = ROOT / "vit_jax"
    modules = {path.stem: [path] for path in package.glob("[!_]*.py")}
    packages = {path.parent.name: sorted(path.parent.glob("*.py")) for path in package.glob("*/__init__.py")}
    return modules | packages


def test_rows_contain_every_unit():
    assert set(units()) == {unit for row in ROWS for unit in row}


def has_functions(path: Path) -> bool:
    return any(isinstance(node, ast.FunctionDef) for node in ast.parse(path.read_text()).body)


def test_modules_have_tests():
    """`vit_jax/a/b.py` is tested in `tests/a/test_b.py`, `vit_jax/a/__init__.py` in `tests/a/test_a.py`.

    Files such as `__init__.py` and `__main__.py` need tests only if they define functions.
    """
    missing = []
    for path in sorted((ROOT / "vit_jax").rglob("*.py")):
        if not path.stem.startswith("__") or has_functions(path):
            directory = ROOT / "tests" / path.parent.relative_to(ROOT / "vit_jax")
            name = path.parent.name if path.stem == "__init__" else path.stem.strip("_")
            missing += [] if (directory / f"test_{name}.py").exists() else [path.relative_to(ROOT).as_posix()]
    assert missing == []


def test_package_has_few_top_level_modules():
    package = ROOT / "vit_jax"
    assert len(list(package.glob("[!_]*.py"))) <= 12 and len(list(package.glob("*/__init__.py"))) <= 7


@pytest.mark.parametrize("unit", [unit for row in ROWS for unit in row])
def test_imports_point_downwards(unit):
    (level,) = (i for i, row in enumerate(ROWS) if unit in row)
    allowed = {other for row in ROWS[:level] for other in row} | {unit}
    for path in units()[unit]:
        assert imported_units(path) <= allowed, path


def test_config_imports_only_runtime():
    assert {unit for path in units()["config"] for unit in imported_units(path)} == {"config", "runtime"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_configs_import_only_configs_and_keys(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            known = ("ml_collections", "configs", "vit_jax.config")
            assert module in known or module.split(".")[0] in sys.stdlib_module_names, module
