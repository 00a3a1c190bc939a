"""Examples in docstrings."""

import ast
import doctest

import pytest
from conftest import ROOT


def docstrings() -> dict[str, str]:
    """Returns the docstrings that contain examples, by file and name."""
    nodes = [
        (f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}", ast.get_docstring(node))
        for path in sorted((ROOT / "vit_jax").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
    ]
    return {name: text for name, text in nodes if text and ">>>" in text}


@pytest.mark.parametrize(("name", "text"), docstrings().items(), ids=docstrings())
def test_docstring_examples_print_documented_output(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0
