"""Measures the speed of `predict` on image files, relative to `evaluate` on the same images in memory.

    python benchmarks/predict.py                                  crops of scikit-learn's two sample images
    VIT_JAX_CIFAR10=ARCHIVE python benchmarks/predict.py          test images of CIFAR-10 (cifar-10-binary.tar.gz)

The micro ViT at 32 px on 1,000 files of 32 × 32 pixels (`--size`), alternately PNG and JPEG, in one call. Both run once
to compile, then in alternating rounds; start-up is not counted. Prints images/s of each round, the medians, their ratio
and the ratio of CPU seconds. Exits with 1 if the first ratio is below 0.8.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import vit_jax
from vit_jax import data, predict
from vit_jax.classifier import Classifier
from vit_jax.runtime.arguments import parse_arguments
from vit_jax.runtime.errors import UsageError, UserError, run_command
from vit_jax.types import Split

MIN_RATIO = 0.8


def load_images(number: int, size: int) -> np.ndarray:
    """Returns natural images, uint8 [n h w 3]."""
    from PIL import Image

    archive = os.environ.get("VIT_JAX_CIFAR10")
    if archive:
        images = data.load_dataset("cifar10", data_dir=archive, image_size=32).test.images[:number]
        return np.stack([np.asarray(Image.fromarray(image).resize((size, size))) for image in images])
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    crops = []
    for i in range(number):
        photograph = photographs[i % len(photographs)]
        top, left = (int(rng.integers(length - size + 1)) for length in photograph.shape[:2])
        crops.append(photograph[top : top + size, left : left + size])
    return np.stack(crops)


def write_images(images: np.ndarray, directory: Path) -> list[str]:
    """Writes images as files, alternately PNG and JPEG, and returns their paths."""
    from PIL import Image

    paths = [directory / f"{i:06}{('.png', '.jpg')[i % 2]}" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return [str(path) for path in paths]


def make_evaluate(classifier: Classifier, images: np.ndarray) -> Callable[[], object]:
    """Returns the evaluation that is timed."""
    split = Split(images=images, labels=np.zeros(len(images), np.int32))
    return functools.partial(classifier.evaluate, split)


def measure(run: Callable[[], object]) -> tuple[float, float]:
    """Returns wall-clock seconds, and CPU seconds of this process, which exclude other load on the machine."""
    started, started_working = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - started_working


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and checks."""
    parser = argparse.ArgumentParser(description="Speed of predict relative to evaluate.")
    parser.add_argument("--num_images", type=int, default=1000, metavar="N")
    parser.add_argument("--size", type=int, default=32, metavar="PIXELS", help="size of the files (default: 32)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N")
    arguments = parse_arguments(parser, argv)
    if min(arguments.num_images, arguments.rounds) < 1 or not 1 <= arguments.size <= 400:
        raise UsageError("expected at least one image and round, and --size from 1 to 400")

    classifier = vit_jax.load("micro")
    images = load_images(arguments.num_images, arguments.size)
    with tempfile.TemporaryDirectory() as directory:
        paths = write_images(images, Path(directory))
        runs: dict[str, Callable[[], object]] = {
            "evaluate": make_evaluate(classifier, images),
            "predict": lambda: list(predict.predict_files(classifier, paths)),
        }
        for run in runs.values():
            run()
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                seconds[name].append(measure(run))
    print(f"jax {jax.__version__}, {len(paths):,} files of {arguments.size} × {arguments.size} pixels, images/s")
    medians, working = {}, {}
    for name, pairs in seconds.items():
        speeds = [len(paths) / clock for clock, _ in pairs]
        medians[name], working[name] = statistics.median(speeds), statistics.median(work for _, work in pairs)
        numbers = " ".join(f"{speed:6,.0f}" for speed in speeds)
        print(f"{name:<10}{numbers}   median {medians[name]:,.0f}; {working[name]:.2f} s of CPU per round")
    ratio = medians["predict"] / medians["evaluate"]
    print(f"ratio {ratio:.2f}; by CPU {working['evaluate'] / working['predict']:.2f}")
    if ratio < MIN_RATIO:
        raise UserError(f"predict runs at {ratio:.2f} of evaluate's speed, expected at least {MIN_RATIO}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
