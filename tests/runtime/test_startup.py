"""Tests of `vit_jax.runtime.startup`: real processes restart with glibc's settings, or do not."""

import os
import platform
import subprocess
import sys

import pytest

from vit_jax.runtime import startup

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

SCRIPT = """
import os, sys
from vit_jax.runtime.startup import prepare_process
print("start", flush=True)
prepare_process()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], "jax" in sys.modules)
"""


@pytest.fixture
def clean(monkeypatch, tmp_path):
    """Removes the variables that `prepare_process` sets, and sets an empty cache directory."""
    cache = ("COMPILATION_CACHE_DIR", "COMPILATION_CACHE_MAX_SIZE", "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    malloc = [name for name in os.environ if name.startswith("MALLOC_")]
    for name in ("GLIBC_TUNABLES", *malloc, *(f"JAX_{name}" for name in cache)):
        monkeypatch.setenv(name, "")  # restores it at the end of the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    return monkeypatch


@pytest.fixture
def without_restart(clean):
    """Fails if the process restarts."""
    clean.setattr(startup.os, "execv", lambda *arguments: pytest.fail("restarted"))
    return clean


def run_script() -> list[str]:
    result = subprocess.run([sys.executable, "-c", SCRIPT, "a b"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@needs_glibc
def test_prepare_process_restarts_once_with_same_arguments(clean):
    assert run_script() == ["start", "start", f"{startup.TUNABLES} ['a b'] False"]


@needs_glibc
@pytest.mark.parametrize(("name", "value"), [("GLIBC_TUNABLES", ""), ("MALLOC_ARENA_MAX", "2")])
def test_prepare_process_keeps_settings_of_user(clean, name, value):
    clean.setenv(name, value)
    assert run_script() == ["start", f"{value if name == 'GLIBC_TUNABLES' else None} ['a b'] False"]


def test_prepare_process_does_not_restart_with_accelerator(without_restart):
    without_restart.setenv("JAX_PLATFORMS", "")
    without_restart.setattr(startup.Path, "glob", lambda path, pattern: iter([path / "nvidia0"]))
    startup.prepare_process()


def test_prepare_process_does_not_restart_without_glibc(without_restart):
    without_restart.setattr(startup.platform, "libc_ver", lambda: ("", ""))
    startup.prepare_process()


def test_prepare_process_keeps_compiled_programs_of_each_cpu_apart(without_restart, tmp_path):
    without_restart.setenv("GLIBC_TUNABLES", "")
    startup.prepare_process()
    first = os.environ.pop("JAX_COMPILATION_CACHE_DIR")
    assert first.startswith(str(tmp_path / "cache" / "compiled"))
    without_restart.setattr(startup.Path, "read_text", lambda path: "flags : sse avx999\n")
    startup.prepare_process()
    assert os.environ.pop("JAX_COMPILATION_CACHE_DIR") != first


def test_prepare_process_keeps_compilation_cache_of_user(without_restart):
    without_restart.setenv("GLIBC_TUNABLES", "")
    without_restart.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    startup.prepare_process()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/somewhere"


def test_prepare_process_works_without_writable_cache(without_restart, tmp_path):
    without_restart.setenv("GLIBC_TUNABLES", "")
    (tmp_path / "cache").write_text("a file, not a directory")
    startup.prepare_process()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
