"""Streaming of images that are decoded and cropped by worker processes."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT, command_env, command_line
from PIL import Image

from vit_jax import data
from vit_jax.data.batches import resident_batches
from vit_jax.data.streaming import BatchReader, training_batches
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UserError

NUM_TRAIN_PER_CLASS = 23  # 46 images of two classes: an epoch has two batches of 16, and 14 images are left over


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory) -> Path:
    """Directory of zeros and ones from digits, as lossless PNG files of 16 × 16 pixels."""
    root = tmp_path_factory.mktemp("images")
    dataset = data.load_dataset("digits", image_size=8)
    for name, split, count in (("train", dataset.train, NUM_TRAIN_PER_CLASS), ("test", dataset.test, 11)):
        for label in (0, 1):
            target = root / name / str(label)
            target.mkdir(parents=True)
            for i, image in enumerate(split.images[split.labels == label][:count]):
                Image.fromarray(image).resize((16, 16), Image.Resampling.NEAREST).save(target / f"{i:02}.png")
    return root


def load(image_dir, storage="stream", **options):
    options = {"image_size": 16, "validation_fraction": 0, **options}
    return data.load_dataset(f"folder:{image_dir}", storage=storage, **options)


OPTIONS = {"augment": "none", "margin_color": (127,) * 3, "batch_size": 16, "seed": 0}


def batches(split, *, first_step=0, num_steps=6, **options):
    """Returns batches read in this process; by default three epochs of two batches."""
    reader = BatchReader(split, **OPTIONS | options)
    return [reader(step) for step in range(first_step, num_steps)]


def batches_equal(actual, expected):
    return len(actual) == len(expected) and all(
        np.array_equal(a, b) for x, y in zip(actual, expected, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.fixture(scope="module")
def six_batches(image_dir):
    return batches(load(image_dir).train)


def test_training_batches_match_batch_reader(image_dir):
    split, options = load(image_dir).train, OPTIONS | {"augment": "inception", "part": 1, "num_parts": 2}
    expected = batches(split, **options, first_step=1)
    assert batches_equal(
        list(training_batches(BatchReader(split, **options), first_step=1, num_steps=6, num_workers=2)), expected
    )


def test_batch_reader_returns_each_image_at_most_once_per_epoch(image_dir, six_batches):
    in_memory = load(image_dir, storage="memory").train
    labels_by_image = {
        image.tobytes(): int(label) for image, label in zip(in_memory.images, in_memory.labels, strict=True)
    }
    assert len(labels_by_image) == 2 * NUM_TRAIN_PER_CLASS
    epochs = [
        [image.tobytes() for images, _ in six_batches[first : first + 2] for image in images] for first in (0, 2, 4)
    ]
    assert all(len(set(epoch)) == 32 and set(epoch) <= labels_by_image.keys() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(
        labels_by_image[image.tobytes()] == label
        for images, labels in six_batches
        for image, label in zip(images, labels, strict=True)
    )


def test_batch_reader_depends_only_on_seed_and_step(image_dir, six_batches):
    split = load(image_dir).train
    assert batches_equal(batches(split, first_step=3), six_batches[3:])
    assert not batches_equal(batches(split, seed=1), six_batches)


def test_batch_reader_balances_classes_as_images_in_memory(image_dir):
    train, whole = (load(image_dir, storage=storage).train for storage in ("stream", "memory"))
    rows = np.r_[
        0:NUM_TRAIN_PER_CLASS, NUM_TRAIN_PER_CLASS : NUM_TRAIN_PER_CLASS + 9
    ]  # nine images of the second class
    streamed = batches(
        dataclasses.replace(train, images=train.images.take(rows), labels=train.labels[rows]), balanced=True
    )
    mesh = sharding.create_mesh(jax.devices()[:1])
    on_device = sharding.device_put((whole.images[rows], whole.labels[rows]), sharding.replicated(mesh))
    resident = resident_batches(*on_device, mesh, batch_size=16, seed=0, balanced=True, first_step=0, num_steps=6)
    assert batches_equal(streamed, [(np.asarray(batch.inputs), np.asarray(batch.labels)) for _, batch in resident])
    assert [sum(labels.sum() for _, labels in streamed[i : i + 2]) for i in (0, 2, 4)] == [16, 16, 16]


def test_batch_reader_parts_concatenate_to_batch(image_dir, six_batches):
    halves = [batches(load(image_dir).train, part=part, num_parts=2) for part in (0, 1)]
    joined = [tuple(np.concatenate(pair) for pair in zip(*parts, strict=True)) for parts in zip(*halves, strict=True)]
    assert batches_equal(joined, six_batches)


def test_batch_reader_samples_deterministic_crops(image_dir, six_batches):
    split = load(image_dir).train
    cropped = batches(split, augment="inception")
    assert batches_equal(batches(split, augment="inception", first_step=2), cropped[2:])
    assert not np.array_equal(cropped[0][0], six_batches[0][0])
    np.testing.assert_array_equal(cropped[0][1], six_batches[0][1])
    padded = batches(split, augment="pad_crop", margin_color=(1, 2, 3), num_steps=1)
    assert {tuple(pixel) for pixel in padded[0][0].reshape(-1, 3)} > {(1, 2, 3)}  # some crops include the margin


def test_training_batches_name_undecodable_image(image_dir, tmp_path):
    import shutil

    shutil.copytree(image_dir, tmp_path / "copy")
    (tmp_path / "copy/train/1/05.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"1/05.png cannot be decoded \(not an image that Pillow can read\)"):
        next(training_batches(BatchReader(load(tmp_path / "copy").train, **OPTIONS), first_step=0, num_steps=6))


def test_training_batches_report_killed_worker(image_dir):
    stream = training_batches(
        BatchReader(load(image_dir).train, **OPTIONS), first_step=0, num_steps=10_000, num_workers=2
    )
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a worker process was killed"):
        for _ in stream:
            pass
    assert multiprocessing.active_children() == []


def test_training_batches_free_shared_memory(image_dir, tmp_path):
    """The process exits without warnings, whether or not all batches were read."""
    script = """
    import sys
    import time
    from multiprocessing import resource_tracker

    from vit_jax import data
    from vit_jax.data.streaming import BatchReader, training_batches

    def track(function, names, change):
        def call(name, kind):
            function(name, kind)
            if kind == "shared_memory":
                change(names, name)
        return call

    if __name__ == "__main__":
        open_blocks = set()  # shared memory that this process has opened and not freed
        resource_tracker.register = track(resource_tracker.register, open_blocks, set.add)
        resource_tracker.unregister = track(resource_tracker.unregister, open_blocks, set.discard)
        train = data.load_dataset(f"folder:{sys.argv[1]}", image_size=16, storage="stream").train
        for num_batches in (3, 6):
            reader = BatchReader(train, augment="none", margin_color=(0, 0, 0), batch_size=16, seed=0)
            batches = training_batches(reader, first_step=0, num_steps=6, num_workers=1)
            for _ in range(num_batches):
                next(batches)
            batches.close()
        deadline = time.monotonic() + 60
        while open_blocks and time.monotonic() < deadline:
            time.sleep(0.05)  # Grain frees it in a background thread
    """
    (tmp_path / "main.py").write_text(textwrap.dedent(script))
    env = command_env({"PYTHONPATH": str(ROOT)})
    result = subprocess.run(command_line(tmp_path / "main.py", image_dir), env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
