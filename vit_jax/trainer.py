"""The training loop.

Examples:
    >>> from vit_jax import config, trainer
    >>> settings = config.get_config()
    >>> settings.dataset.name = "digits"
    >>> settings.update(pretrained="micro", image_size=16)
    >>> settings.update(trainable="head", learning_rate=0.1, num_steps=100)
    >>> results = trainer.train_and_evaluate(settings, "runs/head")
    digits: 1,437 training and 360 test images of 8 × 8 pixels, 10 classes
    ...
    >>> results["test/accuracy"] > 0.8
    True
"""

import contextlib
import dataclasses
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
from ml_collections import ConfigDict

from vit_jax.config import check_config, resume_config, save_config
from vit_jax.data.findings import save_findings, save_lines
from vit_jax.data.images import DamagedImagesError
from vit_jax.data.preprocess import Augment
from vit_jax.runtime import distributed
from vit_jax.runtime.errors import UserError
from vit_jax.runtime.signals import stop_requested, stop_signals
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.experiment import Examples, Experiment, Optimizer, create_experiment
from vit_jax.training.run_info import RunInfo
from vit_jax.training.steps import TrainState
from vit_jax.training.writer import Writer, checksum_of, format_number, read_records, read_results
from vit_jax.types import Dataset


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | Path,
    *,
    dataset: Dataset | None = None,
    augment: Augment | None = None,
    optimizer: Optimizer | None = None,
) -> dict[str, float]:
    """Trains, evaluates and saves checkpoints; resumes where an earlier run in `workdir` stopped.

    Args:
        config: config of the run; `python -m vit_jax.config` prints all keys.
        workdir: run directory, for config.json, metrics.jsonl, TensorBoard events, checkpoints and curves.png.
        dataset: your own images and labels, instead of the config's dataset.
        augment: your own augmentation of training images, (key, uint8 image [h w 3]) -> uint8 image [h' w' 3].
        optimizer: your own optax transformation, or a function from the config's learning-rate schedule to one. With
            a transformation, "learning_rate" is not logged.

    Returns:
        "test/loss", "test/accuracy", "test/accuracy_top5" after the last step; "validation/…" likewise if there are
        validation images; with EMA also "test_raw/…" and "validation_raw/…", the results without EMA. Empty if SIGTERM
        stopped the run, and in all processes but the first.

    Raises:
        UsageError: the config is invalid, or differs from the config of the run in `workdir`.
        UserError: another run uses `workdir`; data, checkpoint or disk failed; or the loss is not finite.
        KeyboardInterrupt: Ctrl-C; the state was saved first.
    """
    workdir = Path(workdir)
    check_config(config)
    with lock_workdir(workdir), Checkpoints(workdir) as checkpoints:
        config, saved = find_run(config, workdir, checkpoints)
        step = checkpoints.latest_step() or 0
        if saved and saved.is_finished(step):
            print(f"already finished at step {step:,}, nothing trained")
            return summarize(config, workdir, checkpoints)
        with list_damaged_images(workdir):
            experiment, state = create_experiment(
                config, dataset=dataset, augment=augment, optimizer=optimizer, saved=saved
            )
        if saved:
            print(f"resuming from step {step:,}, epoch {format_number(step / experiment.steps_per_epoch)}")
            state = checkpoints.restore(step, state)
        if distributed.is_main_process():
            save_config(experiment.config, workdir)
            save_findings(experiment.dataset.findings, workdir)
        finished = train(experiment, state, step, workdir, checkpoints)
        checkpoints.finish()
        return summarize(experiment.config, workdir, checkpoints) if finished else {}


def train(experiment: Experiment, state: TrainState, step: int, workdir: Path, checkpoints: Checkpoints) -> bool:
    """Trains a state after `step` updates to the end of the run; returns False if a signal stopped it before."""
    config, info, per_epoch = experiment.config, experiment.info, experiment.steps_per_epoch
    train_step = experiment.compile_train_step()
    examples = experiment.load_examples(state)
    silent = not distributed.is_main_process()
    with (
        contextlib.closing(experiment.train_batches(examples, step)) as batches,
        Writer(workdir, step=step, num_steps=config.num_steps, steps_per_epoch=per_epoch, silent=silent) as writer,
        stop_signals() as signals,
    ):
        for step, batch in batches:
            state, metrics = train_step(state, batch)

            last = step == config.num_steps
            logging = last or step % config.log_every_steps == 0
            stopping = stop_requested(signals, synchronize=logging)
            evaluating = last or step % config.eval_every_steps == 0
            saving = evaluating or stopping or step % config.checkpoint_every_steps == 0
            if logging or saving:
                metrics, nonfinite_step = fetch((metrics, state.first_nonfinite_step))
                if nonfinite_step:
                    raise UserError(describe_nonfinite(nonfinite_step, checkpoints))
            if logging:
                writer.log_training(step, metrics, batch_size=config.batch_size)
            accuracy = None
            if evaluating:
                accuracy, info = evaluate(experiment, state, examples, info, step, checkpoints, writer)
                last = info.is_finished(step)
            if saving:
                save(step, state, info, checkpoints, writer, accuracy=accuracy)
            if stopping and not last:
                checkpoints.finish()
                report_stop(stopping, f"saved checkpoint {step} to {workdir}; rerun to resume")
                return False
            if last:
                break
        if config.num_steps == 0:
            accuracy, info = evaluate(experiment, state, examples, info, 0, checkpoints, writer)
            save(0, state, info, checkpoints, writer, accuracy=accuracy)
    return True


def evaluate(
    experiment: Experiment,
    state: TrainState,
    examples: Examples,
    info: RunInfo,
    step: int,
    checkpoints: Checkpoints,
    writer: Writer,
) -> tuple[float, RunInfo]:
    """Evaluates on validation, and at the end of the run on test; always on test without validation images.

    Returns the accuracy that determines the best checkpoint, and `info` with the evaluation counted.
    """
    split = experiment.selection_split
    results = experiment.evaluate(state, examples, split)
    accuracy = results[f"{split}/accuracy"]
    info = info.count_evaluation(accuracy, best=checkpoints.best_accuracy())
    if split != "test" and info.is_finished(step):
        results |= experiment.evaluate(state, examples, "test")
    writer.log_evaluation(step, results)
    return accuracy, info


@contextlib.contextmanager
def list_damaged_images(workdir: Path) -> Iterator[None]:
    """Writes damaged.txt if more images are damaged than the error message lists."""
    try:
        yield
    except DamagedImagesError as error:
        lines = [f"{each.path} ({each.reason})" for each in error.errors]
        if distributed.is_main_process() and save_lines(lines, workdir / "damaged.txt"):
            raise UserError(f"{error}; {workdir / 'damaged.txt'} lists all") from error
        raise


def save(
    step: int, state: TrainState, info: RunInfo, checkpoints: Checkpoints, writer: Writer, *, accuracy: float | None
) -> None:
    """Saves a checkpoint after flushing its metrics to disk, so that no checkpoint lacks its metrics."""
    writer.flush()
    info = dataclasses.replace(info, metrics_checksum=writer.checksum)
    checkpoints.save(step, state, info.to_json(), accuracy=accuracy)
    writer.start_clock(step)


def fetch(tree: Any) -> Any:
    """Copies device scalars to the host; training waits for the devices only here and to save a checkpoint."""
    return jax.tree.map(lambda leaf: leaf.item(), jax.device_get(tree))


def find_run(config: ConfigDict, workdir: Path, checkpoints: Checkpoints) -> tuple[ConfigDict, RunInfo | None]:
    """Returns the config and the `RunInfo` of the run to resume, None for a new run; raises UserError if they differ.

    What was chosen for the device at the start of the run, such as dtype "auto", is set in the returned config.
    """
    step, metrics = checkpoints.latest_step(), workdir / "metrics.jsonl"
    saved = None if step is None else RunInfo.from_json(checkpoints.read_metadata(step))
    if saved or (workdir / "config.json").exists():
        config = resume_config(config, workdir, saved=saved.config if saved else None)
    read_records(metrics)  # raises here, before compilation, if a line is damaged
    if saved and checksum_of(read_records(metrics, last_step=step)) != saved.metrics_checksum:
        print(f"warning: {metrics} was changed since step {step}", file=sys.stderr)
    distributed.sync_processes("checked what to resume")
    return config, saved


def report_stop(stopping: signal.Signals, message: str) -> None:
    """Prints why a run stops; after SIGINT, raises KeyboardInterrupt instead."""
    message = f"stopped by {stopping.name}; {message}"
    if stopping == signal.SIGINT:
        raise KeyboardInterrupt(message)
    print(message)


def describe_nonfinite(step: int, checkpoints: Checkpoints) -> str:
    """Waits for the last save; returns the error message for a non-finite loss or update at `step`."""
    checkpoints.finish()
    saved_step = checkpoints.latest_step()
    kept = f"the last good checkpoint is step {saved_step}" if saved_step else "no checkpoint had been written"
    return (
        f"the loss or the update was not finite at step {step}; {kept}; "
        "start again in another --workdir with a lower learning_rate, a longer warmup_steps, or optimizer.clip_norm"
    )


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Locks a run directory against other runs; on exit, removes the directories that it created if they are empty.

    The operating system releases the lock when the process ends, even by SIGKILL. The main process holds it.
    """
    if not distributed.is_main_process():
        yield
        return
    created = [path for path in (workdir, *workdir.parents) if not path.exists()]
    lock = filelock.FileLock(workdir / ".lock")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f"{workdir} is in use by another run; wait for it, or give another --workdir") from error
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror}; give another --workdir") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # before the release: afterwards it may be another run's
        lock.release()
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def summarize(config: ConfigDict, workdir: Path, checkpoints: Checkpoints) -> dict[str, float]:
    """Plots the curves of a finished run, prints its results and the next command; returns the results."""
    if not distributed.is_main_process():
        return {}
    from vit_jax.visualization import plotting  # matplotlib takes long to import

    step = checkpoints.require_step()
    info = RunInfo.from_json(checkpoints.read_metadata(step))
    records, results = read_results(workdir, step, info.metrics_checksum)
    plotting.plot_curves(records, title=workdir.name).savefig(workdir / "curves.png", dpi=120)
    epochs = format_number(step / (info.dataset.num_train // config.batch_size))
    early = f", of {config.num_steps:,} (stopped early)" if step < config.num_steps else ""
    split = "validation" if "validation/accuracy" in results else "test"
    best = f"step {checkpoints.best_step():,} (--step best), {split} accuracy {checkpoints.best_accuracy():.2%}"
    warning = "; chosen on test, without validation images" if split == "test" else ""
    speeds = [record["images_per_second"] for record in records if "images_per_second" in record]
    rows = {
        "test accuracy": f"{results['test/accuracy']:.2%}",
        **({"top-5 accuracy": f"{results['test/accuracy_top5']:.2%}"} if len(info.dataset.class_names) > 5 else {}),
        "test loss": f"{results['test/loss']:.4f}",
        **({"without EMA": f"{results['test_raw/accuracy']:.2%}"} if "test_raw/accuracy" in results else {}),
        **({f"{split} accuracy": f"{results[f'{split}/accuracy']:.2%}"} if split != "test" else {}),
        "best checkpoint": best + warning,
        "steps": f"{step:,} × {config.batch_size} images, {epochs} epochs{early}",
        "images/s, median": format_number(statistics.median_high(speeds)) if speeds else "–",
        "checkpoints": workdir / "checkpoints",
        "metrics": workdir / "metrics.jsonl",
        "curves": workdir / "curves.png",
        "TensorBoard events": workdir,
    }
    print("\n" + "\n".join(f"{name:<22}{value}" for name, value in rows.items()) + "\n")
    if "dataset" in info.custom:  # given from Python: no command can load it
        print(f"next, in Python: vit_jax.load({str(workdir)!r}).evaluate(dataset.test)")
    else:
        python = sys.executable.removeprefix(f"{Path.cwd()}/")
        print(f"next: {python} -m vit_jax.evaluate --workdir {workdir}")
    return {key: value for key, value in results.items() if key != "step"}
