"""Images that are decoded by worker processes while the device computes."""

import multiprocessing
import os
import signal
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, command_env, command_line
from PIL import Image

from vit_jax import data
from vit_jax.data.streaming import BatchReader, training_batches
from vit_jax.runtime.errors import UserError

COUNT = 23  # training images of each class; batches of 16 leave 14 of an epoch out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Real digits, zeros and ones, as PNG files of 16 × 16 pixels, which lose nothing."""
    root = tmp_path_factory.mktemp("images")
    dataset = data.load_dataset("digits", image_size=8)
    for name, split, count in (("train", dataset.train, COUNT), ("test", dataset.test, 11)):
        for label in (0, 1):
            target = root / name / str(label)
            target.mkdir(parents=True)
            for i, image in enumerate(split.images[split.labels == label][:count]):
                Image.fromarray(image).resize((16, 16), Image.Resampling.NEAREST).save(target / f"{i:02}.png")
    return root


def load(folder, storage="stream", **options):
    return data.load_dataset(f"folder:{folder}", image_size=16, storage=storage, **options)


OPTIONS = {"augment": "none", "margin_color": (127,) * 3, "batch_size": 16, "seed": 0}


def batches(split, *, first_step=0, num_steps=6, **options):
    """Read in this process: three epochs of two batches."""
    read = BatchReader(split, **OPTIONS | options)
    return [read(step) for step in range(first_step, num_steps)]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        np.array_equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.fixture(scope="module")
def six(folder):
    return batches(load(folder).train)


def test_training_batches_gives_those_of_the_reader(folder):
    split, options = load(folder).train, OPTIONS | {"augment": "inception", "part": 1, "num_parts": 2}
    expected = batches(split, **options, first_step=1)
    assert same(
        list(training_batches(BatchReader(split, **options), first_step=1, num_steps=6, num_workers=2)), expected
    )


def test_batch_reader_shows_every_image_at_most_once_an_epoch(folder, six):
    whole = load(folder, storage="memory").train
    known = {image.tobytes(): int(label) for image, label in zip(whole.images, whole.labels, strict=True)}
    assert len(known) == 2 * COUNT
    epochs = [[image.tobytes() for images, _ in six[first : first + 2] for image in images] for first in (0, 2, 4)]
    assert all(len(set(epoch)) == 32 and set(epoch) <= known.keys() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(
        known[image.tobytes()] == label for images, labels in six for image, label in zip(images, labels, strict=True)
    )


def test_batch_reader_depends_on_the_step_alone(folder, six):
    split = load(folder).train
    assert same(batches(split, first_step=3), six[3:])
    assert not same(batches(split, seed=1), six)


def test_batch_reader_has_parts_that_make_the_batch(folder, six):
    halves = [batches(load(folder).train, part=part, num_parts=2) for part in (0, 1)]
    joined = [tuple(np.concatenate(pair) for pair in zip(*parts, strict=True)) for parts in zip(*halves, strict=True)]
    assert same(joined, six)


def test_batch_reader_samples_the_same_crops_again(folder, six):
    split = load(folder).train
    cropped = batches(split, augment="inception")
    assert same(batches(split, augment="inception", first_step=2), cropped[2:])
    assert not np.array_equal(cropped[0][0], six[0][0])
    np.testing.assert_array_equal(cropped[0][1], six[0][1])
    padded = batches(split, augment="pad_crop", margin_color=(1, 2, 3), num_steps=1)
    assert {tuple(pixel) for pixel in padded[0][0].reshape(-1, 3)} > {(1, 2, 3)}  # some margin is seen


def test_training_batches_names_an_image_that_cannot_be_decoded(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/train/1/05.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"1/05.png cannot be decoded \(not an image\)"):
        next(training_batches(BatchReader(load(tmp_path / "copy").train, **OPTIONS), first_step=0, num_steps=6))


def test_training_batches_reports_a_worker_that_is_killed(folder):
    stream = training_batches(BatchReader(load(folder).train, **OPTIONS), first_step=0, num_steps=10_000, num_workers=2)
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a worker process was killed"):
        for _ in stream:
            pass
    assert multiprocessing.active_children() == []


def test_training_batches_leaves_nothing_in_shared_memory(folder, tmp_path):
    """Where batches are left over, and where none are, a process ends without a complaint."""
    script = """
    import sys
    import time
    from multiprocessing import resource_tracker

    from vit_jax import data
    from vit_jax.data.streaming import BatchReader, training_batches

    def note(function, names, change):
        def call(name, kind):
            function(name, kind)
            if kind == "shared_memory":
                change(names, name)
        return call

    if __name__ == "__main__":
        held = set()  # memory that this process opened and has not freed
        resource_tracker.register = note(resource_tracker.register, held, set.add)
        resource_tracker.unregister = note(resource_tracker.unregister, held, set.discard)
        train = data.load_dataset(f"folder:{sys.argv[1]}", image_size=16, storage="stream").train
        for taken in (3, 6):
            read = BatchReader(train, augment="none", margin_color=(0, 0, 0), batch_size=16, seed=0)
            batches = training_batches(read, first_step=0, num_steps=6, num_workers=1)
            for _ in range(taken):
                next(batches)
            batches.close()
        deadline = time.monotonic() + 60
        while held and time.monotonic() < deadline:
            time.sleep(0.05)  # Grain frees it in a thread of its own, while a run plots its curves
    """
    (tmp_path / "main.py").write_text(textwrap.dedent(script))
    env = command_env({"PYTHONPATH": str(ROOT)})
    result = subprocess.run(command_line(tmp_path / "main.py", folder), env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
