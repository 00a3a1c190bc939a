"""Training runs on images that are streamed by worker processes."""

import json
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, command_env, command_line, set_keys
from flax.traverse_util import flatten_dict
from PIL import Image

from configs import digits
from vit_jax import data, predict, trainer, visualize
from vit_jax.run import load_run
from vit_jax.runtime import resources
from vit_jax.training import dry_run
from vit_jax.training.checkpoint import Checkpoints

COUNT = 23  # training images per class; 14 of 46 images do not fill a batch of 16


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory) -> Path:
    """Directory of real digits, zeros and ones, as PNG files of 16 × 16 pixels."""
    root = tmp_path_factory.mktemp("images")
    dataset = data.load_dataset("digits", image_size=8)
    for name, split, count in (("train", dataset.train, COUNT), ("test", dataset.test, 11)):
        for label in (0, 1):
            target = root / name / str(label)
            target.mkdir(parents=True)
            for i, image in enumerate(split.images[split.labels == label][:count]):
                Image.fromarray(image).resize((16, 16), Image.Resampling.NEAREST).save(target / f"{i:02}.png")
    return root


def config_for(image_dir, **changes):
    """Returns a config of a tiny ViT, trained from scratch for three epochs of two updates."""
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16)
    config.update(num_steps=6, warmup_steps=1, log_every_steps=1, eval_every_steps=3, checkpoint_every_steps=2)
    config.update(batch_size=16, eval_batch_size=8, augment=("inception", "erase"), mixup_alpha=0.2)
    config.dataset.update(sampling="balanced", name=f"folder:{image_dir}", storage="stream", num_workers=1)
    return set_keys(config, changes)


def records_of(workdir):
    """Returns the records of metrics.jsonl without the throughput."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "images_per_second"} for record in records]


@pytest.fixture(scope="module")
def uninterrupted(image_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    trainer.train_and_evaluate(config_for(image_dir), workdir)
    return workdir


def test_train_and_evaluate_resumes_streamed_run_bit_exactly(image_dir, uninterrupted, tmp_path, monkeypatch):
    save = Checkpoints.save

    def stop(checkpoints, step, *arguments, **options):
        save(checkpoints, step, *arguments, **options)
        if step == 3:
            raise InterruptedError

    auto = {"dataset.storage": "auto"}
    monkeypatch.setattr(Checkpoints, "save", stop)
    with monkeypatch.context() as context, pytest.raises(InterruptedError):
        context.setattr(resources, "available_memory", lambda: 10_000)
        trainer.train_and_evaluate(config_for(image_dir, **auto), tmp_path / "run")
    assert multiprocessing.active_children() == []
    monkeypatch.setattr(Checkpoints, "save", save)
    trainer.train_and_evaluate(config_for(image_dir, **auto, **{"dataset.num_workers": 2}), tmp_path / "run")
    assert records_of(tmp_path / "run") == records_of(uninterrupted)
    actual, expected = (flatten_dict(load_run(workdir).params) for workdir in (tmp_path / "run", uninterrupted))
    for path, leaf in actual.items():
        np.testing.assert_array_equal(leaf, expected[path])


@pytest.mark.slow
def test_train_and_evaluate_accumulates_gradients_of_streamed_batches(image_dir, uninterrupted, tmp_path):
    trainer.train_and_evaluate(config_for(image_dir, accumulation_steps=2), tmp_path / "run")
    for actual, expected in zip(records_of(tmp_path / "run"), records_of(uninterrupted), strict=True):
        assert actual == pytest.approx(expected, abs=1e-5)


def test_predict_resizes_as_evaluation(image_dir, uninterrupted, tmp_path):
    """Images of a folder are center-cropped, unless they have the model's size."""
    run = load_run(uninterrupted)
    assert run.config.dataset.test_resize == run.metadata.test_resize == "center_crop"
    images = run.load_test_split().images
    paths = [str(path) for label in "01" for path in sorted((image_dir / "test" / label).iterdir())]
    np.testing.assert_array_equal(np.stack([run.decode(path) for path in paths]), images[:])
    predicted = np.stack([probabilities for _, probabilities in predict.predict_files(run, paths)])
    np.testing.assert_allclose(predicted, run.predict(images), atol=1e-6)
    wide = Image.open(paths[0]).resize((48, 24))
    wide.save(tmp_path / "wide.png")
    on_device = np.asarray(run.preprocess(np.asarray(wide)[None])[0])
    np.testing.assert_array_equal(run.decode(tmp_path / "wide.png"), np.round(on_device * 127.5 + 127.5))


def test_evaluate_matches_in_memory_results_for_streamed_images(image_dir, uninterrupted, tmp_path):
    """Every test image counts once, although 22 is not divisible by the batch size of 8; also with cached features."""
    run = load_run(uninterrupted)
    run.config.dataset.storage = "auto"
    assert not run.load_test_split().in_memory  # as in training
    streamed = run.evaluate()
    run.config.dataset.storage = "memory"
    assert streamed == pytest.approx(run.evaluate(), abs=1e-6)
    last = records_of(uninterrupted)[-1]
    assert {key: last[key] for key in ("step", *streamed)} == pytest.approx({"step": 6, **streamed}, abs=1e-6)
    results = {}
    for storage in ("memory", "stream"):
        config = config_for(image_dir, trainable="head", augment="none", mixup_alpha=0.0)
        config.dataset.storage = storage
        results[storage] = trainer.train_and_evaluate(config, tmp_path / storage)
    assert results["stream"] == pytest.approx(results["memory"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"augment": ("inception", "trivial", "erase"), "image_size": 8, "dataset.sampling": "balanced"},
            id="inception",
        ),
        pytest.param({"augment": "pad_crop", "ablation.test_augment": "square_crop"}, id="pad_crop"),
        pytest.param(
            {
                "augment": ("inception", "color_jitter"),
                "trainable": "head",
                "features": "cached",
                "feature_views": 2,
                "mixup_alpha": 0.0,
            },
            id="cached_views",
        ),
    ],
)
def test_train_and_evaluate_matches_in_memory_run_for_streamed_images(image_dir, tmp_path, changes):
    """Order, crops and pixels do not depend on the available memory."""
    for storage in ("memory", "stream"):
        config = config_for(image_dir, **{"dataset.storage": storage, **changes})
        trainer.train_and_evaluate(config, tmp_path / storage)
    for actual, expected in zip(records_of(tmp_path / "stream"), records_of(tmp_path / "memory"), strict=True):
        assert actual == pytest.approx(expected, abs=2e-3)
    run = load_run(tmp_path / "stream")
    evaluated = {"step": 6, **run.evaluate()}
    last = records_of(tmp_path / "stream")[-1]
    assert {key: last[key] for key in evaluated} == pytest.approx(evaluated, abs=1e-5)


def test_draw_all_plots_images_of_streamed_run(uninterrupted):
    figures = dict(visualize.draw_all(load_run(uninterrupted), num_images=4))
    assert {"confusion", "errors", "attention_rollout"} <= figures.keys()


@pytest.mark.slow
def test_dry_run_counts_two_batches_for_streamed_images(image_dir, capsys):
    config = config_for(image_dir, **{"dataset.storage": "memory"})
    outputs = []
    for storage in ("memory", "stream"):
        config.dataset.storage = storage
        dry_run.dry_run(config)
        outputs.append(capsys.readouterr().out)
    assert ", two batches" in outputs[1] and "two batches" not in outputs[0]
    assert ", streamed" in outputs[1] and ", streamed" not in outputs[0]


@pytest.mark.slow
def test_train_ends_worker_processes_after_sigterm_and_sigkill(image_dir, tmp_path):
    """Sends SIGTERM to the process group, as a cluster does, then SIGKILL to the main process alone."""
    keys = {"dataset.name": f"folder:{image_dir}", "dataset.storage": "stream", "num_steps": 100_000, "batch_size": 16}
    keys |= {"log_every_steps": 1, "checkpoint_every_steps": 50, "eval_every_steps": 100_000}
    argv = [f"--config.{key}={value}" for key, value in keys.items()]
    argv = ["train.py", "--config", "configs/digits.py:scratch", "--workdir", tmp_path / "run", *argv]

    def start():
        process = subprocess.Popen(
            command_line(*argv),
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
    assert process.returncode == 0 and "stopped by SIGTERM; saved checkpoint" in out, err
    assert "Traceback" not in err
    wait_for(lambda: group(process.pid) == [])  # multiprocessing's helper process ends later

    before = lines()
    process = start()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    wait_for(lambda: group(process.pid) == [])


def group(pgid: int) -> list[int]:
    """Returns the running processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has just ended
            continue
        if int(fields[2]) == pgid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(condition) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
