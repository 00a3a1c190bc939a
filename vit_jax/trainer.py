"""A run from its config to its results, and back from its folder."""

import contextlib
import dataclasses
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import classifier
from vit_jax import config as settings
from vit_jax.classifier import Classifier
from vit_jax.pretrained import ModelMetadata
from vit_jax.runtime import distributed, sharding
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.training import checkpoint, features, lora, metrics, steps
from vit_jax.training.job import create_evaluate, create_job, crop_on_host, load_dataset
from vit_jax.training.program import Program, test_options
from vit_jax.training.writer import Writer, format_number, read_records, read_results
from vit_jax.types import Dataset, Split


def train_and_evaluate(config: ConfigDict, workdir: str | Path) -> dict[str, float]:
    """Trains, evaluates and checkpoints; goes on where an earlier run in `workdir` stopped.

    Args:
        config: laid out as in `configs/base.py`.
        workdir: the run's folder; will hold config.json, metrics.jsonl, TensorBoard events, checkpoints, curves.png.

    Returns:
        "test/loss", "test/accuracy", "test/accuracy_top5" after the last step, and "test_raw/…" of the parameters
        without EMA where EMA parameters are kept; empty where SIGTERM ended the run early, and in all processes but the
        first.

    Raises:
        UsageError: the config is wrong, or not the one that `workdir` was started with.
        UserError: another run uses `workdir`; data, pretrained file or storage failed; or the loss is no longer finite.
        KeyboardInterrupt: Ctrl-C; the state was saved first.
    """
    workdir = Path(workdir)
    settings.check_config(config)
    check_writable(workdir)
    with lock_workdir(workdir) if distributed.is_main_process() else contextlib.nullcontext():
        return _train_and_evaluate(config, workdir)


def _train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains in a workdir that is locked."""
    restored_step = checkpoint.latest_step(workdir)
    about = {} if restored_step is None else checkpoint.read_about(workdir)
    if restored_step is not None or (workdir / "config.json").exists():
        settings.check_same(config, workdir, saved=about.get("config"))
    distributed.sync_processes("every process has seen where the run stands")
    if restored_step == config.num_steps:
        return summarize(config, workdir)
    read_records(workdir / "metrics.jsonl")  # raises here, before compilation, if a line is damaged
    job, create_state = create_job(config, saved=about)
    # Before anything is written: the pretrained file may not fit.
    state = create_state() if restored_step is None else job.program.abstract_state
    del create_state
    with checkpoint.open_manager(workdir) as checkpoints:
        if restored_step is not None:
            print(f"going on from step {restored_step}")
            state = checkpoint.restore(checkpoints, state, restored_step)
        if distributed.is_main_process():
            settings.save_config(config, workdir)
        train_steps = job.compile_train_steps()
        step = restored_step or 0
        arrays, evaluate = job.open_arrays(state, step=step)
        permutation = job.program.permute(state)

        silent = not distributed.is_main_process()
        with (
            contextlib.closing(arrays),
            Writer(workdir, step=step, num_steps=config.num_steps, silent=silent) as writer,
            stop_signals() as signals,
        ):
            while step < config.num_steps:
                if step % job.program.steps_per_epoch == 0:
                    permutation = job.program.permute(state)
                count = steps_until_stop(step, config, job.program) if job.program.cached else 1
                state, scalars = train_steps(state, *next(arrays), permutation, count=count)
                step += count

                last = step == config.num_steps
                logging = last or step % config.log_every_steps == 0
                stopping = stop_asked(signals, now=logging)
                evaluating = last or step % config.eval_every_steps == 0
                saving = evaluating or stopping or step % config.checkpoint_every_steps == 0
                if logging or saving:
                    scalars, nonfinite_step = fetch((scalars, state.first_nonfinite_step))
                    stop_if_nonfinite(nonfinite_step, checkpoints.latest_step())
                if logging:
                    writer.log_training(step, scalars, batch_size=config.batch_size)
                results = means_of(fetch(evaluate(state))) if evaluating else {}
                if evaluating:
                    writer.log_evaluation(step, results)
                if saving:
                    writer.flush()
                    checkpoint.save(checkpoints, step, state, job.about, accuracy=results.get("test/accuracy"))
                    writer.start_clock(step)
                if stopping and not last:
                    checkpoint.finish(checkpoints)
                    return report_interruption(signal.Signals(stopping), step, workdir)
            if config.num_steps == 0:
                results = means_of(fetch(evaluate(state)))
                writer.log_evaluation(0, results)
                writer.flush()
                checkpoint.save(checkpoints, 0, state, job.about, accuracy=results["test/accuracy"])
        checkpoint.finish(checkpoints)
    return summarize(config, workdir)


def steps_until_stop(step: int, config: ConfigDict, program: Program) -> int:
    """How many steps the device may take before the host logs, evaluates, saves, or begins an epoch."""
    intervals = (
        config.log_every_steps,
        config.eval_every_steps,
        config.checkpoint_every_steps,
        program.steps_per_epoch,
        config.num_steps,
    )
    return min(every - step % every for every in intervals)


def means_of(totals: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns the results of an evaluation, from its totals by prefix."""
    return {key: value for prefix, sums in totals.items() for key, value in metrics.means(sums, prefix=prefix).items()}


def fetch(tree: Any) -> Any:
    """Brings device arrays to the host: the one place where a run waits for its device."""
    return jax.tree.map(lambda leaf: leaf.item(), jax.device_get(tree))


@dataclasses.dataclass(frozen=True)
class Run(Classifier):
    """A finished or interrupted run, read from its folder: a classifier, and how it came to be.

    Attributes:
        config: laid out as in `configs/base.py`.
        step: of the checkpoint.
        mesh: of all devices, where `params` lie.
        metadata: of the model.
        about: the same as JSON, with what else the checkpoint says; "command" is the one that trained it.
    """

    config: ConfigDict
    step: int
    mesh: Mesh
    metadata: ModelMetadata
    about: dict[str, Any]


def load_run(workdir: str | Path, *, step: int | None = None, use_ema: bool = True) -> Run:
    """Reads config, model and parameters of a run from its folder alone.

    Args:
        workdir: of the run.
        step: which checkpoint; None takes the latest.
        use_ema: whether averages of parameters, where the run kept them, stand in for what they average.

    Raises:
        UserError: no run there, no such checkpoint, or a damaged one.
    """
    workdir = Path(workdir)
    latest = checkpoint.require_step(workdir)
    step = latest if step is None else step
    mesh = sharding.create_mesh()
    with checkpoint.open_manager(workdir, read_only=True) as checkpoints:
        there = sorted(checkpoints.all_steps())
        if step not in there:
            raise UserError(f"{workdir} has no checkpoint of step {step}; it has {', '.join(map(str, there))}")
        params, about = checkpoint.restore_params(checkpoints, step, sharding.replicated(mesh), use_ema=use_ema)
    config = settings.load_config(workdir, saved=about.pop("config", None))  # out of `about`, which exports write
    params = lora.merge_lora_weights(params, alpha=config.lora.alpha)
    about = {"dtype": config.dtype} | about  # not in checkpoints of older versions
    metadata = ModelMetadata.from_json(about)
    return Run(
        **classifier.fields(params, metadata), metadata=metadata, config=config, step=step, mesh=mesh, about=about
    )


def evaluate_run(run: Run, *, test: Split | None = None, prefix: str = "test") -> dict[str, float]:
    """Evaluates a run's parameters over every test image.

    Args:
        run: of `load_run`.
        test: as `load_test_dataset` gives it; read from the dataset in the run's config unless given.
        prefix: of the names of the results.

    Raises:
        UserError: the dataset cannot be read, or its classes are not those of the run.
    """
    test = load_test_dataset(run).test if test is None else test
    forward = steps.image_forward(run.model, **test_options(run.config, in_memory=test.in_memory))
    test = dataclasses.replace(test, images=crop_on_host(run.config, test.images, run.config.test_augment))
    evaluate = create_evaluate(forward, test, run.mesh, batch_size=run.config.eval_batch_size)
    return metrics.means(fetch(evaluate(run.params)), prefix=prefix)


def load_test_dataset(run: Run) -> Dataset:
    """The dataset in a run's config.

    Raises:
        UserError: it cannot be read, or its classes are not those of the run.
    """
    # A run that streamed its images is evaluated so, whatever memory is available now; the pixels are the same anyway.
    streamed = run.config.dataset.storage == "auto" and run.about.get("storage") == "stream"
    dataset = load_dataset(run.config, storage="stream" if streamed else "")
    if dataset.class_names != run.class_names:
        raise UserError(
            f"the run knows {len(run.class_names)} classes, {', '.join(run.class_names[:5])}, …; the dataset has "
            f"{len(dataset.class_names)}, {', '.join(dataset.class_names[:5])}, …; "
            "give the --data_dir that the run was trained on"
        )
    return dataset


def predict(run: Run, images: np.ndarray) -> np.ndarray:
    """Predicts class probabilities with a run's test-time preprocessing.

    Args:
        run: of `load_run`.
        images: uint8 [n h w 3], or `data.EncodedImages`.

    Returns:
        float32 [n classes]: probabilities.
    """
    forward = steps.image_forward(run.model, **test_options(run.config, in_memory=isinstance(images, np.ndarray)))
    logits = features.apply_to_all(
        run.model,
        run.params,
        crop_on_host(run.config, images, run.config.test_augment),
        run.mesh,
        prepare=forward.prepare,
        batch_size=run.config.eval_batch_size,
    )
    return np.asarray(jax.nn.softmax(logits))


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """While inside, SIGTERM and Ctrl-C are noted in the list that this yields; a second one acts as usual."""
    received: list[signal.Signals] = []
    usual: dict[int, Any] = {}

    def note(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, usual[number])
        print("stopping after this step; a checkpoint is being written …", file=sys.stderr)

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # signals can be handled in the main thread only
            usual[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for known, handler in usual.items():
            signal.signal(known, handler)


def stop_asked(signals: list[signal.Signals], *, now: bool) -> int:
    """The signal that asks for an end, 0 for none; several processes ask each other on log steps only (`now`)."""
    number = int(signals[0]) if signals else 0  # one may come at any moment: read once a step
    if jax.process_count() == 1:
        return number
    return distributed.process_max(number) if now else 0


def stop_if_nonfinite(nonfinite_step: int, saved_step: int | None) -> None:
    """Raises UserError where some step's loss or update was not finite."""
    if nonfinite_step:
        kept = f"the last good checkpoint is step {saved_step}" if saved_step else "no checkpoint had been written"
        raise UserError(
            f"the loss or the update was not finite at step {nonfinite_step}; {kept}; "
            "start again in another --workdir with a lower learning_rate, a longer warmup_steps, or optimizer.clip_norm"
        )


def report_interruption(number: signal.Signals, step: int, workdir: Path) -> dict[str, float]:
    """Says what a signal led to; SIGTERM is a wish fulfilled, Ctrl-C goes on as KeyboardInterrupt."""
    print(f"stopped by {number.name}; saved step {step} in {workdir}: the same command goes on from there")
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    return {}


def check_writable(workdir: Path) -> None:
    """Refuses a folder that cannot be made or written: now, not after the data were read."""
    ancestor = next(path for path in (workdir.absolute(), *workdir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=ancestor):
            pass
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}; give another") from error


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of a workdir; removes the directories that it created if nothing was written to them.

    The lock is the operating system's, which releases it when the process ends, even by SIGKILL.

    Raises:
        UserError: another run holds the lock, or the file system has no locks.
    """
    created = [path for path in (workdir, *workdir.parents) if not path.exists()]
    lock = filelock.FileLock(workdir / ".lock")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"{workdir} is in use by another run; wait for it, or give another --workdir") from error
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"cannot lock --workdir {workdir}: {one_line(error)}; give a --workdir on another file system"
        ) from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # before the release: afterwards it may be another run's
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def summarize(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Plots a finished run's curves, prints its results and what to type next; returns the results.

    Raises:
        UserError: metrics.jsonl is missing or damaged.
    """
    if not distributed.is_main_process():
        return {}
    from vit_jax.visualization import plotting  # matplotlib takes long to import, and who only loads a run needs none

    records, results = read_results(workdir, config.num_steps)
    plotting.plot_curves(records, title=workdir.name).savefig(workdir / "curves.png", dpi=120)
    speeds = sorted(record["images_per_second"] for record in records if "images_per_second" in record)
    rows = [
        ("test accuracy", f"{results['test/accuracy']:.2%}"),
        ("test accuracy, top 5", f"{results['test/accuracy_top5']:.2%}"),
        ("test loss", f"{results['test/loss']:.4f}"),
        *([("without EMA", f"{results['test_raw/accuracy']:.2%}")] if "test_raw/accuracy" in results else []),
        ("steps", f"{config.num_steps:,} × {config.batch_size} pictures"),
        ("pictures/s, median", format_number(speeds[len(speeds) // 2]) if speeds else "–"),
        ("checkpoints", str(workdir / "checkpoints")),
        ("metrics", str(workdir / "metrics.jsonl")),
        ("curves", str(workdir / "curves.png")),
        ("TensorBoard events", str(workdir)),
    ]
    print("\n" + "\n".join(f"{name:<22}{value}" for name, value in rows))
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    print(f"\nnext: {python} -m vit_jax.evaluate --workdir {workdir}")
    return {key: value for key, value in results.items() if key != "step"}
