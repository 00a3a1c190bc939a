import importlib

from vit_jax import __main__


def test_main_lists_every_command(run_command):
    result = run_command("-m", "vit_jax")
    assert result.returncode == 0, result.stderr
    for name in __main__.COMMANDS:
        assert f"\n  {name} " in result.stdout
        assert callable(importlib.import_module(f"vit_jax.{name}").main)
