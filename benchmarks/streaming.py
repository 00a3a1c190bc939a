"""Measures decoding by worker processes, and streamed training relative to training from device memory.

    python benchmarks/streaming.py               decoding only: JPEG files of 500 × 375 pixels, cropped to 224
    python benchmarks/streaming.py DIR           also training of the micro ViT at 32 px on `folder:DIR`

Images are cropped by "inception". Streamed and in-memory training alternate in rounds; start-up and compilation are not
counted. Prints images/s of each round, medians and their ratio.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import digits
from vit_jax import data
from vit_jax.data.streaming import BatchReader, training_batches
from vit_jax.runtime.arguments import parse_arguments
from vit_jax.runtime.errors import UsageError, run_command
from vit_jax.training.experiment import create_experiment
from vit_jax.types import Split

_READY_BATCHES = 8  # not timed, as this many may be prefetched


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Speed of streamed training.")
    parser.add_argument("directory", nargs="?", metavar="DIR")
    parser.add_argument("--batch_size", type=int, default=128, metavar="N")
    parser.add_argument("--num_steps", type=int, default=50, metavar="N", help="steps per round")
    parser.add_argument("--num_workers", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    arguments = parse_arguments(parser, argv)
    if min(arguments.batch_size, arguments.num_steps, arguments.num_workers, arguments.rounds) < 1:
        raise UsageError("expected positive integers")
    if arguments.directory is None:
        with tempfile.TemporaryDirectory() as directory:
            report("decoding", [time_decoding(write_images(Path(directory)), arguments)])
        return 0

    whole = data.load_dataset(f"folder:{arguments.directory}", image_size=32, storage="stream", validation_fraction=0)
    report("decoding", [time_decoding(whole.train, arguments)])
    speeds: dict[str, list[float]] = {"memory": [], "stream": []}
    with contextlib.ExitStack() as stack:
        steppers = {storage: stack.enter_context(open_run(storage, arguments)) for storage in speeds}
        for _ in range(arguments.rounds):
            for storage, step in steppers.items():
                speeds[storage].append(time_calls(step, arguments))
    medians = {storage: report(storage, values) for storage, values in speeds.items()}
    print(f"ratio {medians['stream'] / medians['memory']:.2f}")
    return 0


def report(name: str, speeds: Sequence[float]) -> float:
    """Prints images/s of each round, and returns their median."""
    median = statistics.median(speeds)
    print(f"{name:<10}{' '.join(f'{speed:6,.0f}' for speed in speeds)}   median {median:,.0f}")
    return median


def write_images(directory: Path) -> Split:
    """Writes JPEG files of 500 × 375 pixels, crops of scikit-learn's sample images."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        for split, count in (("train", 256), ("test", 1)):
            (directory / split / name).mkdir(parents=True)
            for i in range(count):
                top, left = rng.integers(427 - 375), rng.integers(640 - 500)
                part = photograph[top : top + 375, left : left + 500]
                Image.fromarray(part).save(directory / split / name / f"{i:03}.jpg", quality=90)
    return data.load_dataset(f"folder:{directory}", image_size=224, storage="stream", validation_fraction=0).train


def time_decoding(split: Split, arguments: argparse.Namespace) -> float:
    """Returns the images/s that the worker processes decode if nothing else runs."""
    read = BatchReader(
        split, augment="inception", margin_color=(127, 127, 127), batch_size=arguments.batch_size, seed=0
    )
    num_steps = _READY_BATCHES + arguments.num_steps
    batches = training_batches(read, first_step=0, num_steps=num_steps, num_workers=arguments.num_workers)
    with contextlib.closing(batches):
        for _ in range(_READY_BATCHES):
            next(batches)
        return time_calls(lambda: next(batches), arguments)


@contextlib.contextmanager
def open_run(storage: str, arguments: argparse.Namespace) -> Iterator[Callable[[], object]]:
    """Yields a function that runs one training step and waits for it."""
    config = digits.get_config("scratch")
    config.update(image_size=32, batch_size=arguments.batch_size, augment="inception", num_steps=10**6)
    config.dataset.update(name=f"folder:{arguments.directory}", storage=storage, num_workers=arguments.num_workers)
    experiment, state = create_experiment(config)
    train_step = experiment.compile_train_step()
    batches = experiment.train_batches(experiment.load_examples(state), 0)

    def step() -> None:
        nonlocal state
        _, batch = next(batches)
        state, _ = train_step(state, batch)
        jax.block_until_ready(state.step)

    with contextlib.closing(batches):
        for _ in range(_READY_BATCHES):
            step()
        yield step


def time_calls(call: Callable[[], object], arguments: argparse.Namespace) -> float:
    """Returns the images/s of one round."""
    start = time.perf_counter()
    for _ in range(arguments.num_steps):
        call()
    return float(arguments.num_steps * arguments.batch_size / (time.perf_counter() - start))


if __name__ == "__main__":
    sys.exit(run_command(main))
