"""Eight simulated devices, commands in this process and in their own, and runs that many tests read."""

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

# JAX reads these when it is imported: by the tests, not by anything above.
os.environ["JAX_PLATFORMS"] = "cpu"
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"

ROOT = Path(__file__).resolve().parent.parent
TINY = {"patch_size": 4, "hidden_size": 24, "num_layers": 1, "num_heads": 3, "mlp_dim": 40}
"""Arguments of the smallest VisionTransformer in use."""


def pytest_configure(config: pytest.Config) -> None:
    """Sets how XLA compiles: most of the time of the quick tests would go into optimizing programs that run once.

    The slow tests, some of which measure time, compile as users do.
    """
    os.environ["XLA_FLAGS"] = _EIGHT_DEVICES
    if config.option.markexpr == "not slow":
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        if importlib.metadata.version("jaxlib") < "0.11":  # 0.11 has the older, quicker emitters no more
            os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and child processes inherit it
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_compilation_cache(config))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jaxtyping.install_import_hook("vit_jax", "conftest.check_types")


def check_types(function: Callable) -> Callable:
    """Checks arguments and results of a function whose annotations have shapes of arrays; see `jaxtyping`."""
    if any(map(_has_shape, function.__annotations__.values())):
        return beartype(function, conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
    return function


def _has_shape(annotation: object) -> bool:
    is_array = isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray)
    return is_array or any(map(_has_shape, typing.get_args(annotation)))


def _compilation_cache(config: pytest.Config) -> Path:
    """The directory of JAX's compilation cache: in pytest's own, so that the next session finds it."""
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
    """The real CIFAR-10 images as a binary archive."""
    path = os.environ.get("VIT_JAX_CIFAR10")
    if not path:
        pytest.skip("needs the real images: set VIT_JAX_CIFAR10 to a cifar-10-binary.tar.gz")
    return Path(path)


class Result(NamedTuple):
    """Outcome of a command."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Result]:
    """Returns a function that calls `main(argv)` of a command in this process, as its own process would."""
    return _run_cli


def _run_cli(
    module: str, argv: list, *, env: dict[str, str] | None = None, stdin: str = "", cwd: Path = ROOT
) -> Result:
    """Runs a command in this process, which has eight devices; a bug in the command raises.

    Args:
        module: "train", "vit_jax.evaluate", …: a module with a `main`.
        argv: the words behind the command; each is made a string.
        env: further environment variables.
        stdin: what the command reads from standard input.
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
    """Returns a function that runs a command in a process of its own: one device, no terminal.

    The eight devices simulated here do not leak into it. Where the process does not matter, `run_cli` is quicker.
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
    return {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(_EIGHT_DEVICES, ""), **(extra or {})}


def set_keys(config: ConfigDict, changes: dict[str, object]) -> ConfigDict:
    """Sets keys such as "optimizer.name" of a config, which it returns."""
    for key, value in changes.items():
        parent, _, name = key.rpartition(".")
        (config[parent] if parent else config)[name] = value
    return config


def edit_run(workdir: Path, changes: dict[str, object], *, metrics: str | None = None) -> None:
    """Changes the config in all checkpoints of a run, and metrics.jsonl, as if it had been trained so."""
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


# ---- made once, and shared by pytest's workers; read-only: a test that changes one copies it (shutil.copytree)


@pytest.fixture(scope="session")
def create_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Returns `(name, create) -> path`: `create(path)` is called by the first worker that asks, the others wait."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of the workers' own directories

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
    """Run directory: the shipped micro ViT, fully fine-tuned on digits for 20 steps. Read-only."""
    return create_once("finished_run", _train_digits)


@pytest.fixture(scope="session")
def lora_run(create_once) -> Path:
    """Run directory as `finished_run`, with LoRA and an EMA that differs from the parameters. Read-only."""
    return create_once("lora_run", lambda workdir: _train_digits(workdir, trainable="lora", ema_decay=0.9))


@pytest.fixture(scope="session")
def tiny_npz(create_once) -> Path:
    """A file in the original ViT checkpoint format, `TINY` at 16 px with 3 classes and random values. Read-only."""
    return create_once("tiny.npz", save_tiny_npz)


def save_tiny_npz(path: Path, **changes: object) -> None:
    """Saves random parameters in the original ViT checkpoint format.

    Args:
        path: of the file.
        **changes: to `TINY` and to the arguments of `reference.released_shapes`.
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
