"""Tests of `vit_jax.runtime.allocator`: a real process restarts with glibc's settings, or does not."""

import platform
import subprocess
import sys

import pytest

from vit_jax.runtime import allocator

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

SCRIPT = """
import os, sys
from vit_jax.runtime.allocator import tune_malloc
print("start", flush=True)
tune_malloc()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], "jax" in sys.modules)
"""


@pytest.fixture
def run_script(monkeypatch):
    """Returns a function that runs `tune_malloc` in a process with the given environment variables."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def run(**env: str) -> list[str]:
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            result = subprocess.run([sys.executable, "-c", SCRIPT, "a b"], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run


def test_tune_malloc_restarts_once_with_same_arguments(run_script):
    assert run_script(JAX_PLATFORMS="cpu") == ["start", "start", f"{allocator.TUNABLES} ['a b'] False"]


@pytest.mark.parametrize(("name", "value"), [("GLIBC_TUNABLES", ""), ("MALLOC_ARENA_MAX", "2")])
def test_tune_malloc_keeps_settings_of_user(run_script, name, value):
    found = value if name == "GLIBC_TUNABLES" else None
    assert run_script(JAX_PLATFORMS="cpu", **{name: value}) == ["start", f"{found} ['a b'] False"]


def test_tune_malloc_does_nothing_with_accelerator(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(allocator.Path, "glob", lambda path, pattern: iter([path / "nvidia0"]))
    monkeypatch.setattr(allocator.os, "execv", lambda *arguments: pytest.fail("restarted"))
    allocator.tune_malloc()


def test_tune_malloc_does_nothing_without_glibc(monkeypatch):
    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.os, "execv", lambda *arguments: pytest.fail("restarted"))
    allocator.tune_malloc()
