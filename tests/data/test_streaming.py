"""Pictures that are decoded by worker processes while the device computes."""

import json
import multiprocessing
import os
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, command_env, command_line, set_keys
from flax.traverse_util import flatten_dict
from PIL import Image

from configs import digits
from vit_jax import data, trainer, visualize
from vit_jax.data.streaming import training_batches
from vit_jax.run import load_run
from vit_jax.runtime import resources
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training import dry_run

COUNT = 23  # training pictures of each class; batches of 16 leave 14 of an epoch out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Real digits, zeros and ones, as PNG files of 16 × 16 pixels, which lose nothing."""
    root = tmp_path_factory.mktemp("pictures")
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


def batches(split, **options):
    options = {"augment": "none", "margin_color": (127,) * 3, "batch_size": 16, "seed": 0, "num_workers": 1} | options
    options = {"first_step": 0, "num_steps": 6} | options
    return list(training_batches(split, **options))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        np.array_equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.fixture(scope="module")
def six(folder):
    """Three epochs of two batches."""
    return batches(load(folder).train)


def test_an_epoch_shows_every_picture_at_most_once_and_another_one_otherwise(folder, six):
    whole = load(folder, storage="memory").train
    known = {image.tobytes(): int(label) for image, label in zip(whole.images, whole.labels, strict=True)}
    assert len(known) == 2 * COUNT
    epochs = [[image.tobytes() for images, _ in six[first : first + 2] for image in images] for first in (0, 2, 4)]
    assert all(len(set(epoch)) == 32 and set(epoch) <= known.keys() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert all(
        known[image.tobytes()] == label for images, labels in six for image, label in zip(images, labels, strict=True)
    )


def test_a_batch_is_known_by_its_number_alone(folder, six):
    split = load(folder).train
    assert same(batches(split, first_step=3, num_workers=2), six[3:])
    assert not same(batches(split, seed=1), six)


def test_parts_of_a_batch_make_the_batch(folder, six):
    halves = [batches(load(folder).train, part=part, num_parts=2) for part in (0, 1)]
    joined = [tuple(np.concatenate(pair) for pair in zip(*parts, strict=True)) for parts in zip(*halves, strict=True)]
    assert same(joined, six)


def test_crops_are_drawn_anew_and_again_the_same(folder, six):
    split = load(folder).train
    cropped = batches(split, augment="inception")
    assert same(batches(split, augment="inception", first_step=2), cropped[2:])
    assert not np.array_equal(cropped[0][0], six[0][0])
    np.testing.assert_array_equal(cropped[0][1], six[0][1])
    padded = batches(split, augment="pad_crop", margin_color=(1, 2, 3), num_steps=1)
    assert {tuple(pixel) for pixel in padded[0][0].reshape(-1, 3)} > {(1, 2, 3)}  # some margin is seen


def test_a_picture_that_cannot_be_decoded_is_named(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/train/1/05.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1/05.png cannot be decoded \(not a picture\)"):
        batches(load(tmp_path / "copy").train)


def test_a_worker_that_is_killed_is_one_line_and_none_outlives_its_run(folder):
    stream = training_batches(
        load(folder).train,
        augment="none",
        margin_color=(0, 0, 0),
        batch_size=16,
        seed=0,
        first_step=0,
        num_steps=10_000,
        num_workers=2,
    )
    next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="a process that decodes images was ended"):
        for _ in stream:
            pass
    assert multiprocessing.active_children() == []


def test_nothing_is_left_in_shared_memory(folder, tmp_path):
    """Where batches are left over, and where none are, a process ends without a complaint."""
    script = """
    import sys
    import time

    from vit_jax import data
    from vit_jax.data.streaming import training_batches

    if __name__ == "__main__":
        train = data.load_dataset(f"folder:{sys.argv[1]}", image_size=16, storage="stream").train
        for taken in (3, 6):
            options = {"augment": "none", "margin_color": (0, 0, 0), "batch_size": 16, "seed": 0, "num_workers": 1}
            batches = training_batches(train, first_step=0, num_steps=6, **options)
            for _ in range(taken):
                next(batches)
            batches.close()
        time.sleep(3)  # Grain frees it in a thread of its own, while a run plots its curves
    """
    (tmp_path / "main.py").write_text(textwrap.dedent(script))
    env = command_env({"PYTHONPATH": str(ROOT)})
    result = subprocess.run(command_line(tmp_path / "main.py", folder), env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


# ---- whole runs


def config_for(folder, **changes):
    """A micro ViT from random parameters, three epochs of two updates."""
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16)
    config.update(num_steps=6, warmup_steps=1, log_every_steps=1, eval_every_steps=3, checkpoint_every_steps=2)
    config.update(batch_size=16, eval_batch_size=8, augment="inception", mixup_alpha=0.2)
    config.dataset.update(name=f"folder:{folder}", storage="stream", num_workers=1)
    return set_keys(config, changes)


def records_of(workdir):
    """The lines of a run without what depends on the clock."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in records]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    trainer.train_and_evaluate(config_for(folder), workdir)
    return workdir


def test_a_resumed_run_is_the_uninterrupted_one(folder, whole, tmp_path, monkeypatch):
    save = trainer.checkpoint.save

    def stop(manager, step, *arguments, **options):
        save(manager, step, *arguments, **options)
        if step == 3:
            raise InterruptedError

    auto = {"dataset.storage": "auto"}
    monkeypatch.setattr(trainer.checkpoint, "save", stop)
    with monkeypatch.context() as little_memory, pytest.raises(InterruptedError):
        little_memory.setattr(resources, "available_memory", lambda: 10_000)
        trainer.train_and_evaluate(config_for(folder, **auto), tmp_path / "run")
    assert multiprocessing.active_children() == []
    monkeypatch.setattr(trainer.checkpoint, "save", save)
    trainer.train_and_evaluate(config_for(folder, **auto, **{"dataset.num_workers": 2}), tmp_path / "run")
    assert records_of(tmp_path / "run") == records_of(whole)
    ours, theirs = (flatten_dict(trainer.load_run(workdir).params) for workdir in (tmp_path / "run", whole))
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path])


def test_accumulation_gives_the_update_of_the_large_batch(folder, whole, tmp_path):
    trainer.train_and_evaluate(config_for(folder, accumulation_steps=2), tmp_path / "run")
    for ours, theirs in zip(records_of(tmp_path / "run"), records_of(whole), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_evaluation_is_that_of_pictures_in_memory(folder, whole, tmp_path):
    """Every test picture counts once, though 22 do not divide into batches of 8; so do features of all of them."""
    run = trainer.load_run(whole)
    run.config.dataset.storage = "auto"
    assert not trainer.load_test_dataset(run).test.in_memory  # as in training
    streamed = trainer.evaluate_run(run)
    run.config.dataset.storage = "memory"
    assert streamed == pytest.approx(trainer.evaluate_run(run), abs=1e-6)
    assert records_of(whole)[-1] == pytest.approx({"step": 6, **streamed}, abs=1e-6)
    results = {}
    for storage in ("memory", "stream"):
        config = config_for(folder, trainable="head", augment="none", mixup_alpha=0.0)
        config.dataset.storage = storage
        results[storage] = trainer.train_and_evaluate(config, tmp_path / storage)
    assert results["stream"] == pytest.approx(results["memory"], abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": "inception", "image_size": 8},
        {"augment": "pad_crop", "test_augment": "square_crop"},
        {"augment": "inception", "trainable": "head", "features": "cached", "feature_views": 2, "mixup_alpha": 0.0},
    ],
    ids=["inception", "pad_crop", "cached_views"],
)
def test_train_and_evaluate_gives_the_same_run_streamed_and_in_memory(folder, tmp_path, changes):
    """Order, crops and pixels do not depend on the memory that is free."""
    for storage in ("memory", "stream"):
        config = config_for(folder, **{"dataset.storage": storage, **changes})
        trainer.train_and_evaluate(config, tmp_path / storage)
    for ours, theirs in zip(records_of(tmp_path / "stream"), records_of(tmp_path / "memory"), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
    run = trainer.load_run(tmp_path / "stream")
    evaluated = {"step": 6, **trainer.evaluate_run(run)}
    assert records_of(tmp_path / "stream")[-1] == pytest.approx(evaluated, abs=1e-5)


def test_pictures_of_a_streamed_run_are_drawn(whole):
    figures = dict(visualize.draw_all(load_run(whole), num_images=4))
    assert {"confusion", "errors", "attention_rollout"} <= figures.keys()


def test_a_dry_run_counts_batches_instead_of_pictures(folder, capsys):
    config = config_for(folder, **{"dataset.storage": "memory"})
    texts = []
    for storage in ("memory", "stream"):
        config.dataset.storage = storage
        dry_run.dry_run(config)
        texts.append(capsys.readouterr().out)
    assert "two batches at a time" in texts[1] and "two batches" not in texts[0]
    assert "decoded as they are needed" in texts[1] and "as they are needed" not in texts[0]


def test_what_lies_in_memory_anyway_is_not_streamed():
    with pytest.raises(UsageError, match="storage is 'stream', which needs folder:DIR or tfds:NAME"):
        data.load_dataset("digits", image_size=8, storage="stream")


def test_a_process_that_was_told_to_stop_saves_and_its_workers_end(folder, tmp_path):
    """SIGTERM to all of them, as a cluster sends it; then SIGKILL to the run alone."""
    keys = {"dataset.name": f"folder:{folder}", "dataset.storage": "stream", "num_steps": 100_000, "batch_size": 16}
    keys |= {"log_every_steps": 1, "checkpoint_every_steps": 50, "eval_every_steps": 100_000}
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    words = ["train.py", "--config", "configs/digits.py:scratch", "--workdir", tmp_path / "run", *words]

    def start():
        process = subprocess.Popen(
            command_line(*words),
            cwd=ROOT,
            env=command_env(),
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        wait_for(lambda: len(group(process.pid)) >= 3 and lines() > before)
        return process

    def lines():
        path = tmp_path / "run/metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    before = 0
    process = start()
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM; saved step" in out, err
    assert "Traceback" not in err
    wait_for(lambda: group(process.pid) == [])  # multiprocessing's own helper ends a moment later

    before = lines()
    process = start()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: group(process.pid) == [])


def group(pgid: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended in between
            continue
        if int(fields[2]) == pgid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(holds) -> None:
    deadline = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
