"""The notebooks run from top to bottom on a CPU, and their stored outputs are up to date."""

import json
import re

import pytest
from conftest import ROOT

NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def outputs(notebook: dict) -> list[list[str]]:
    """Returns the output types of each code cell, without stderr, which has progress bars."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [
        sorted(
            {kind for output in cell["outputs"] for kind in output.get("data", {output.get("name"): ""})} - {"stderr"}
        )
        for cell in cells
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run_and_match_stored_outputs(name, run_command, tmp_path):
    result = run_command(
        "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", tmp_path, ROOT / "notebooks" / name
    )
    assert result.returncode == 0, result.stderr
    executed = json.loads((tmp_path / name).read_text())
    stored = json.loads((ROOT / "notebooks" / name).read_text())
    assert outputs(stored) == outputs(executed)
    assert sum("image/png" in kinds for kinds in outputs(executed)) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_small_and_fully_executed(name):
    path = ROOT / "notebooks" / name
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < 700_000
    assert "step/s" not in path.read_text()  # no progress bars
    assert "Traceback" not in path.read_text() and "/home/" not in path.read_text()


def test_notebooks_and_readme_name_one_repository():
    """An address on GitHub is filled in everywhere or nowhere."""
    text = (ROOT / "README.md").read_text() + "".join((ROOT / "notebooks" / name).read_text() for name in NAMES)
    clones = re.findall(r"git clone (?:--quiet )?https://github.com/(\S+) vit_jax", text)
    links = re.findall(r"colab.research.google.com/github/(\S+)/blob/main/notebooks/(\w+\.ipynb)", text)
    assert len({*clones, *(repository for repository, _ in links)}) == 1
    assert [name for _, name in links] == NAMES and len(clones) == 1 + len(NAMES)
