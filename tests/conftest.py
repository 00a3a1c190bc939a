"""Eight simulated devices, and what several tests share."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ml_collections import ConfigDict

# JAX reads these when it is imported: by the tests, not by anything above.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Tests and processes that compile the same compile it once between them; pytest's workers inherit the place.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE_FOLDER = tempfile.TemporaryDirectory(prefix="vit_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE_FOLDER.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def cifar10_archive() -> Path:
    """The real CIFAR-10 pictures as a binary archive."""
    path = os.environ.get("VIT_JAX_CIFAR10")
    if not path:
        pytest.skip("needs the real pictures: set VIT_JAX_CIFAR10 to a cifar-10-binary.tar.gz")
    return Path(path)


@pytest.fixture(scope="session")
def run_command():
    """Runs a command of the project in a process of its own: one device, no terminal.

    The eight devices simulated here do not leak into it.
    """

    def run(*arguments: object, timeout: float = 300, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            command_line(*arguments), cwd=ROOT, env=command_env(env), timeout=timeout, capture_output=True, text=True
        )

    return run


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def command_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The environment of a user's shell, on the CPU."""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return {**env, "JAX_PLATFORMS": "cpu", **(extra or {})}


def set_keys(config: ConfigDict, changes: dict[str, object]) -> ConfigDict:
    """Sets keys such as "optimizer.name" of a config, which it returns."""
    for key, value in changes.items():
        parent, _, name = key.rpartition(".")
        (config[parent] if parent else config)[name] = value
    return config
