import importlib.util

import pytest

from vit_jax import __main__


def test_main_lists_every_command(run_command):
    result = run_command("-m", "vit_jax")
    assert result.returncode == 0, result.stderr
    for name in __main__.COMMANDS:
        assert f"\n  {name} " in result.stdout


@pytest.mark.parametrize("name", ["train", *(f"vit_jax.{name}" for name in __main__.COMMANDS)])
def test_commands_print_help_with_example(run_cli, name):
    is_package = importlib.util.find_spec(name).submodule_search_locations
    result = run_cli(f"{name}.__main__" if is_package else name, ["--help"])
    prog = "python train.py" if name == "train" else f"python -m {name}"
    assert result.code == 0 and result.stdout.startswith(f"usage: {prog} ")
    assert f"\n\nexamples:\n  {prog}" in result.stdout


@pytest.mark.parametrize("name", ["evaluate", "predict", "visualize", "export", "probe"])
def test_commands_declare_model_flags_alike(run_cli, name):
    words = " ".join(run_cli(f"vit_jax.{name}", ["--help"]).stdout.split())
    assert "--workdir RUN run directory --model NAME_OR_PATH pretrained checkpoint by name (" in words
    assert "--step STEP step of the run's checkpoint, or best (default: latest)" in words
