"""The notebooks run from top to bottom on a CPU, and what they keep is what they make."""

import json

import pytest
from conftest import ROOT

NAMES = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def outputs(notebook: dict) -> list[list[str]]:
    """What each cell of code left: kinds of data; what went to stderr, where bars live, depends on the clock."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [
        sorted(
            {kind for output in cell["outputs"] for kind in output.get("data", {output.get("name"): ""})} - {"stderr"}
        )
        for cell in cells
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_keeps_what_it_makes(name, run_command, tmp_path):
    result = run_command(
        "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", tmp_path, ROOT / "notebooks" / name
    )
    assert result.returncode == 0, result.stderr
    made = json.loads((tmp_path / name).read_text())
    kept = json.loads((ROOT / "notebooks" / name).read_text())
    assert outputs(kept) == outputs(made)
    assert sum("image/png" in kinds for kinds in outputs(made)) >= 2


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_small_and_whole(name):
    path = ROOT / "notebooks" / name
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert path.stat().st_size < 600_000
    assert "Traceback" not in path.read_text() and "/home/" not in path.read_text()
