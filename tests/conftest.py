"""Shared fixtures: eight simulated CPU devices, commands run in-process or as a subprocess, and finished runs."""

import contextlib
import importlib
import importlib.metadata
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, beartype
from filelock import FileLock
from ml_collections import ConfigDict

# JAX reads these variables when it is imported, which the test modules do after conftest.py.
os.environ["JAX_PLATFORMS"] = "cpu"
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"

ROOT = Path(__file__).resolve().parent.parent
TINY = {"patch_size": 4, "hidden_size": 24, "num_layers": 1, "num_heads": 3, "mlp_dim": 40}
"""Arguments of a tiny VisionTransformer."""


def pytest_configure(config: pytest.Config) -> None:
    """Sets the flags of XLA: the quick tests compile without optimizations, since most programs run only once.

    The slow tests, some of which measure time, compile with the default flags.
    """
    os.environ["XLA_FLAGS"] = _EIGHT_DEVICES
    if config.option.markexpr == "not slow":
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if importlib.metadata.version("jaxlib") < "0.11":  # 0.11 no longer has the older, faster emitters
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and child processes inherit it
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_compilation_cache(config))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jaxtyping.install_import_hook("vit_jax", "conftest.check_types")


def check_types(function: Callable) -> Callable:
    """Checks the types of a function if its annotations contain array shapes; used by the import hook of jaxtyping."""
    if any(map(_has_shape, function.__annotations__.values())):
        return beartype(function, conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
    return function


def _has_shape(annotation: object) -> bool:
    is_array = isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)
    return is_array or any(map(_has_shape, typing.get_args(annotation)))


def _compilation_cache(config: pytest.Config) -> Path:
    """Returns the directory of JAX's compilation cache, inside pytest's cache, so that later sessions reuse it."""
    try:
        directory = config.cache.mkdir("jax")
        for path in directory.iterdir():
            if path.stat().st_mtime < time.time() - 7 * 24 * 3600:
                path.unlink()
        return directory
    except OSError:  # a read-only checkout
        temporary = tempfile.TemporaryDirectory(prefix="vit_jax_tests_")
        config.add_cleanup(temporary.cleanup)
        return Path(temporary.name)


@pytest.fixture(scope="session")
def cifar10_archive() -> Path:
    """Path of the CIFAR-10 binary archive."""
    path = os.environ.get("VIT_JAX_CIFAR10")
    if not path:
        pytest.skip("needs CIFAR-10: set VIT_JAX_CIFAR10 to the path of cifar-10-binary.tar.gz")
    return Path(path)


class Result(NamedTuple):
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Result]:
    """Returns a function that runs a command in-process, through its `main(argv)`."""
    return _run_cli


def _run_cli(
    module: str, argv: list, *, env: dict[str, str] | None = None, stdin: str = "", cwd: Path = ROOT
) -> Result:
    """Runs a command in-process, on eight devices; unexpected exceptions propagate.

    Args:
        module: name of a module with a `main`, such as "train" or "vit_jax.evaluate".
        argv: command-line arguments, converted to strings.
        env: additional environment variables.
        stdin: text on standard input.
        cwd: working directory.
    """
    from vit_jax.runtime.errors import run_command

    main = importlib.import_module(module).main
    stdout, stderr, logger = io.StringIO(), io.StringIO(), logging.getLogger("absl")
    level = logger.level
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        try:
            code = run_command(lambda: main(list(map(str, argv))))
        except SystemExit as error:  # argparse, after --help
            code = error.code
        finally:
            logger.setLevel(level)
    return Result(code or 0, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess]:
    """Returns a function that runs a command as a subprocess: one device, no terminal.

    `run_cli` is faster where no subprocess is needed.
    """

    def run(*arguments: object, timeout: float = 300, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(
            command_line(*arguments), cwd=ROOT, env=command_env(env), timeout=timeout, capture_output=True, text=True
        )

    return run


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def command_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Returns the environment of a subprocess: CPU, one device."""
    return {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(_EIGHT_DEVICES, ""), **(extra or {})}


def config_with(**changes) -> ConfigDict:
    """Returns the digits config with keys such as `optimizer.name` set to any value, without type checks."""
    from configs import digits

    config = digits.get_config().to_dict()
    for key, value in changes.items():
        *parents, name = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[name] = value
    return ConfigDict(config)


def set_keys(config: ConfigDict, changes: dict[str, object]) -> ConfigDict:
    """Sets keys such as "optimizer.name" of a config and returns the config."""
    for key, value in changes.items():
        parent, _, name = key.rpartition(".")
        (config[parent] if parent else config)[name] = value
    return config


def edit_run(workdir: Path, changes: dict[str, object], *, metrics: str | None = None) -> None:
    """Changes the config in config.json and all checkpoints of a run, and optionally metrics.jsonl."""
    from vit_jax.runtime import checksums
    from vit_jax.training import writer

    if metrics is not None:
        (workdir / "metrics.jsonl").write_text(metrics)
    for path in workdir.glob("checkpoints/*/metadata/metadata"):
        content = json.loads(path.read_text())
        info = content["metadata"]
        for key, value in changes.items():
            parent, _, name = key.rpartition(".")
            (info["config"][parent] if parent else info["config"])[name] = value
        records = writer.read_records(workdir / "metrics.jsonl", last_step=content["step"])
        info["metrics_checksum"] = writer.checksum_of(records)
        del content["crc32"]
        path.write_text(json.dumps({**content, "crc32": checksums.checksum_json(content)}))
        (workdir / "config.json").write_text(json.dumps(info["config"]))


# ---- created once and shared by pytest's workers; read-only: a test that modifies a run copies it (shutil.copytree)


@pytest.fixture(scope="session")
def create_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Returns `get(name, create) -> path`: the first worker calls `create(path)`, the others wait for it."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # common to all workers

    def get(name: str, create: Callable[[Path], object]) -> Path:
        path = shared / "shared" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            done = path.with_name(f"{name}.done")
            if not done.exists():
                create(path)
                done.touch()
        return path

    return get


def _train_digits(workdir: Path, **changes: object) -> None:
    from configs import digits
    from vit_jax import trainer

    config = digits.get_config()
    config.update(num_steps=20, warmup_steps=5, eval_every_steps=20, checkpoint_every_steps=20)
    trainer.train_and_evaluate(set_keys(config, changes), workdir)


@pytest.fixture(scope="session")
def finished_run(create_once) -> Path:
    """Run directory of the micro checkpoint, fully fine-tuned on digits for 20 steps. Read-only."""
    return create_once("finished_run", _train_digits)


@pytest.fixture(scope="session")
def lora_run(create_once) -> Path:
    """Run directory like `finished_run`, with LoRA and EMA parameters that differ from the parameters. Read-only."""
    return create_once("lora_run", lambda workdir: _train_digits(workdir, trainable="lora", ema_decay=0.9))


@pytest.fixture(scope="session")
def tiny_npz(create_once) -> Path:
    """Path of a checkpoint in the original ViT format: `TINY`, 16 px, 3 classes, random values. Read-only."""
    return create_once("tiny.npz", save_tiny_npz)


def save_tiny_npz(path: Path, **changes: object) -> None:
    """Saves random parameters in the original ViT checkpoint format.

    Args:
        path: output file.
        **changes: overrides of `TINY` and of the other arguments of `reference.released_shapes`.
    """
    import reference
    from flax.traverse_util import unflatten_dict

    from vit_jax import pretrained

    sizes = {**TINY, "representation_size": None, "num_classes": 3, "num_tokens": 17, **changes}
    rng = np.random.default_rng(0)
    flat = {
        key: rng.standard_normal(shape, dtype=np.float32) for key, shape in reference.released_shapes(**sizes).items()
    }
    pretrained.save_npz(path, unflatten_dict(flat, sep="/"))
