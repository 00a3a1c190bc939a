"""Damaged run directories: each file is flipped, truncated, removed or swapped; loading is exact or raises an error."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import vit_jax
from configs import digits
from vit_jax import trainer
from vit_jax.runtime.errors import UserError
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.writer import read_records, read_results

BEST, LATEST = 2, 4


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory and its contents before any damage."""

    workdir: Path
    abstract_state: object
    states: dict[int, list[bytes]]
    metadata: dict
    params: list[bytes]
    config: dict
    records: list[dict]
    files: dict[Path, bytes]


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run with parameters, EMA parameters, momentum and scalars, whose best checkpoint is not the latest."""
    workdir = tmp_path_factory.mktemp("damage") / "run"
    config = digits.get_config("scratch")
    config.model = dict(patch_size=8, hidden_size=8, num_layers=1, num_heads=2, mlp_dim=8)
    config.update(trainable=("head/.*", "cls"), ema_decay=0.9, num_steps=LATEST, warmup_steps=1)
    config.update(log_every_steps=1, eval_every_steps=2, checkpoint_every_steps=2)
    config.optimizer.name, config.mesh.data = "sgd", 1
    saved, save = {}, Checkpoints.save

    def record_and_save(checkpoints, step, state, metadata, *, accuracy):
        saved[step] = jax.device_get(state)
        save(checkpoints, step, state, metadata, accuracy=2.0 if step == BEST else accuracy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", record_and_save)
        trainer.train_and_evaluate(config, workdir)
    (workdir / "report.html").write_text("<html></html>")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = vit_jax.load(workdir)
    with Checkpoints(workdir, read_only=True) as checkpoints:
        metadata = checkpoints.read_metadata(LATEST)
    return Run(
        workdir,
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), saved[LATEST]),
        {step: bits(state) for step, state in saved.items()},
        metadata,
        bits(loaded.params),
        loaded.config.to_dict(),
        read_records(workdir / "metrics.jsonl"),
        {path: path.read_bytes() for path in sorted(workdir.rglob("*")) if path.is_file()},
    )


# Damages: (rng, path, run) -> new content of each changed file, None for a removed file.


def flip(rng: np.random.Generator, path: Path, run: Run) -> dict[Path, bytes | None]:
    content = np.frombuffer(run.files[path], np.uint8).copy()
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return {path: content.tobytes()}


def truncate(rng: np.random.Generator, path: Path, run: Run) -> dict[Path, bytes | None]:
    return {path: run.files[path][: rng.integers(len(run.files[path]))]}


def remove(rng: np.random.Generator, path: Path, run: Run) -> dict[Path, bytes | None]:
    return {path: None}


def swap(rng: np.random.Generator, path: Path, run: Run) -> dict[Path, bytes | None]:
    """Swaps a file with one of the same kind: of another checkpoint or item, or with another hash as its name."""

    def kind(path: Path) -> list[str]:
        varying = (str(BEST), str(LATEST), "params", "ema", "training")
        return ["" if part in varying or len(part) == 32 else part for part in path.parts]

    alike = [other for other in run.files if kind(other) == kind(path) and other != path] or [path]
    other = alike[rng.integers(len(alike))]
    return {path: run.files[other], other: run.files[path]}


DAMAGES = (flip, truncate, remove, swap)


# Readers: each raises AssertionError for undetected damage.


def resume(run: Run) -> None:
    with Checkpoints(run.workdir) as checkpoints:
        assert checkpoints.latest_step() == LATEST
        assert checkpoints._accuracies[BEST] == 2.0 > checkpoints._accuracies[LATEST]
        assert checkpoints.read_metadata(LATEST) == run.metadata
        assert bits(checkpoints.restore(LATEST, run.abstract_state)) == run.states[LATEST]


def restore_best(run: Run) -> None:
    with Checkpoints(run.workdir, read_only=True) as checkpoints:
        assert bits(checkpoints.restore(BEST, run.abstract_state)) == run.states[BEST]


def load(run: Run) -> None:
    loaded = vit_jax.load(run.workdir)
    assert loaded.step == LATEST
    assert bits(loaded.params) == run.params
    assert loaded.config.to_dict() == run.config


def read_metrics(run: Run) -> None:
    records, results = read_results(run.workdir, LATEST, run.metadata["metrics_checksum"])
    assert records == run.records
    assert results["step"] == LATEST


def readers_of(path: Path, run: Run) -> list[Callable[[Run], None]]:
    """Returns the readers to test with a damaged file."""
    location = path.relative_to(run.workdir).parts[:2]
    if location == ("checkpoints", str(LATEST)):
        return [resume, load]
    return [restore_best] if location == ("checkpoints", str(BEST)) else [load, read_metrics]


def problem(reader: Callable[[Run], None], changed: dict[Path, bytes | None], run: Run) -> str:
    """Returns a description of the failure of a reader, or "" if it passes."""
    checkpoints = run.workdir / "checkpoints"
    try:
        reader(run)
    except UserError as error:
        message = str(error)
        if "\n" in message or str(run.workdir) not in message:
            return message
        damaged = {path.parts[len(checkpoints.parts)] for path in changed if checkpoints in path.parents}
        if reader is load and str(LATEST) not in damaged:
            return f"rejected because of an unrelated file: {message}"
        advice = f"delete {checkpoints / str(LATEST)} and rerun to resume from step {BEST}"
        return "" if reader is read_metrics or damaged != {str(LATEST)} or advice in message else message
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return ""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_load_and_resume_detect_damaged_files(run, seed):
    problems, num_cases = [], 0
    for damage in DAMAGES:
        for number, path in enumerate(run.files):
            rng = np.random.default_rng([seed, DAMAGES.index(damage), number])
            changed = damage(rng, path, run)
            for file, content in changed.items():
                file.unlink()
                if content is not None:
                    file.write_bytes(content)
            readers = readers_of(path, run)
            for reader in readers if seed else [readers[rng.integers(len(readers))]]:
                found = problem(reader, changed, run)
                problems += [f"{damage.__name__} {path}: {reader.__name__}: {found}"] * bool(found)
            num_cases += 1
            for file in changed:
                file.write_bytes(run.files[file])
    assert not problems, "\n".join(problems)
    assert num_cases >= 300


@pytest.mark.parametrize(
    ("first", "second"), [("2", "4"), ("2/params", "4/params"), ("4/params", "4/ema"), ("2/metadata", "4/metadata")]
)
def test_load_and_resume_detect_swapped_directories(run, first, second):
    checkpoints = run.workdir / "checkpoints"

    def exchange() -> None:
        os.rename(checkpoints / first, checkpoints / "other")
        os.rename(checkpoints / second, checkpoints / first)
        os.rename(checkpoints / "other", checkpoints / second)

    exchange()
    try:
        for reader in (resume, load):
            with pytest.raises(UserError, match=r"checkpoints/\d/\w+ is damaged"):
                reader(run)
    finally:
        exchange()


def test_load_rejects_renamed_checkpoint(run):
    checkpoints = run.workdir / "checkpoints"
    os.rename(checkpoints / str(LATEST), checkpoints / "6")
    try:
        with pytest.raises(UserError, match="checkpoints/6/metadata is damaged"):
            load(run)
    finally:
        os.rename(checkpoints / "6", checkpoints / str(LATEST))
