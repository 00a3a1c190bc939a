import json
import os
import re
import shutil

import jax
import pytest
from conftest import edit_run

import vit_jax
from configs import digits
from vit_jax import data, trainer
from vit_jax.run import load_run
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training import device_fit
from vit_jax.training.checkpoint import Checkpoints
from vit_jax.training.writer import read_records
from vit_jax.types import Dataset, Split


def small_config(**changes):
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16)
    config.update(num_steps=40, warmup_steps=5, log_every_steps=20, eval_every_steps=40, checkpoint_every_steps=40)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Directory and results of a finished run, and the number of times that it blocked on the device."""
    workdir, fetches, fetch = tmp_path_factory.mktemp("finished") / "run", [], trainer.fetch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fetch", lambda tree: fetches.append(tree) or fetch(tree))
        results = trainer.train_and_evaluate(small_config(), workdir)
    return workdir, results, len(fetches)


@pytest.fixture
def finished_copy(finished, tmp_path):
    """A finished run that a test may modify."""
    return shutil.copytree(finished[0], tmp_path / "copy")


INTERVALS = {"log_every_steps": 10, "checkpoint_every_steps": 20}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Directory of a run with `INTERVALS`, interrupted after the checkpoint of step 20."""
    workdir, save = tmp_path_factory.mktemp("interrupted") / "run", Checkpoints.save

    def save_and_stop(manager, step, *args, **kwargs):
        save(manager, step, *args, **kwargs)
        if step == 20:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Checkpoints, "save", save_and_stop)
        trainer.train_and_evaluate(small_config(**INTERVALS), workdir)
    return workdir


@pytest.fixture
def interrupted_copy(interrupted, tmp_path):
    """An interrupted run that a test may modify."""
    return shutil.copytree(interrupted, tmp_path / "copy")


def test_train_and_evaluate_fetches_metrics_only_at_log_steps(finished):
    assert finished[2] == 2  # the records of steps 20 and 40; evaluation fetches its own results


def test_train_and_evaluate_returns_last_evaluation(finished):
    workdir, results, _ = finished
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step": 40, **results} == last
    assert trainer.train_and_evaluate(small_config(), workdir) == results


def test_train_and_evaluate_chooses_on_validation_and_stops_early(tmp_path, capsys):
    """Trains with learning rate 0, so that no evaluation is better than the first, after one of three epochs."""
    config = small_config(num_steps=0, num_epochs=3, eval_every_steps=0, early_stopping_patience=1, learning_rate=0.0)
    config.dataset.update(train_split="train[:640]", validation_split="train[640:]")
    results = trainer.train_and_evaluate(config, tmp_path)
    evaluations = [record for record in read_records(tmp_path / "metrics.jsonl") if "train/loss" not in record]
    assert [record["step"] for record in evaluations] == [10, 20]
    assert ["test/loss" in record for record in evaluations] == [False, True]
    assert evaluations[0]["validation/accuracy"] == evaluations[1]["validation/accuracy"]
    run = load_run(tmp_path, step="best")
    assert run.step == 20  # the later of equals
    validation = run.evaluate(run.load_split("validation"), prefix="validation")
    assert results == pytest.approx({**run.evaluate(), **validation})
    assert trainer.train_and_evaluate(config, tmp_path) == results
    text = capsys.readouterr().out
    assert "training: 30 steps = 3 epochs of 10 steps" in text
    assert "already finished at step 20, nothing trained" in text
    accuracy = f"{results['validation/accuracy']:.2%}"
    assert text.count(f"best checkpoint       step 20 (--step best), validation accuracy {accuracy}\n") == 2
    assert "steps                 20 × 64 images, 2 epochs, of 30 (stopped early)" in text


def test_train_and_evaluate_says_that_best_is_chosen_on_test(finished, capsys):
    trainer.train_and_evaluate(small_config(), finished[0])
    accuracy = f"{finished[1]['test/accuracy']:.2%}"
    expected = f"step 40 (--step best), test accuracy {accuracy}; chosen on test, without validation images"
    assert expected in capsys.readouterr().out


def test_train_and_evaluate_prints_evaluation_call_for_own_dataset(tmp_path, capsys):
    full = data.load_dataset("digits", image_size=16)
    train, test = (Split(split.images[:64], split.labels[:64]) for split in (full.train, full.test))
    dataset = Dataset(train, test, full.class_names)
    results = trainer.train_and_evaluate(small_config(num_steps=0, warmup_steps=0), tmp_path, dataset=dataset)
    (call,) = re.findall("^next.*: (.*)$", capsys.readouterr().out, re.M)
    assert eval(call, {"vit_jax": vit_jax, "dataset": dataset}) == pytest.approx(results)


def test_train_and_evaluate_restores_missing_config_json(interrupted_copy):
    before = (interrupted_copy / "config.json").read_text()
    (interrupted_copy / "config.json").unlink()
    with pytest.raises(UsageError, match=r"another config \(learning_rate: 0.002 → 0.5\)"):
        trainer.train_and_evaluate(small_config(learning_rate=0.5, **INTERVALS), interrupted_copy)
    run = load_run(interrupted_copy)
    assert json.dumps(run.config.to_dict(), indent=2) + "\n" == before
    trainer.train_and_evaluate(small_config(**INTERVALS), interrupted_copy)
    assert (interrupted_copy / "config.json").read_text() == before


def test_train_and_evaluate_keeps_dtype_of_run(interrupted_copy, monkeypatch):
    assert json.loads((interrupted_copy / "config.json").read_text())["dtype"] == "float32"
    monkeypatch.setattr(device_fit, "auto_dtype", lambda device: "bfloat16")
    trainer.train_and_evaluate(config := small_config(**INTERVALS), interrupted_copy)
    assert load_run(interrupted_copy).config.dtype == "float32"
    assert config.dtype == "auto"  # the caller's config is not changed


def test_train_and_evaluate_saves_accumulation_steps_that_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(device_fit, "smallest_fitting", lambda divisors, measure, **bytes: measure(2) and 2)
    trainer.train_and_evaluate(small_config(num_steps=0, warmup_steps=0, accumulation_steps=0), tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["accumulation_steps"] == 2
    assert load_run(tmp_path / "run").config.accumulation_steps == 2


def test_train_and_evaluate_keeps_accumulation_steps_of_run(interrupted_copy, monkeypatch):
    edit_run(interrupted_copy, {"accumulation_steps": 2})
    monkeypatch.delattr(device_fit, "fit_accumulation")
    trainer.train_and_evaluate(small_config(**INTERVALS, accumulation_steps=0), interrupted_copy)
    assert load_run(interrupted_copy).config.accumulation_steps == 2


@pytest.mark.slow
def test_train_and_evaluate_keeps_attention_of_run(tmp_path, monkeypatch):
    """Without a GPU, "cudnn" is XLA's attention here."""
    choices = ["cudnn"]
    monkeypatch.setattr(device_fit, "can_use_cudnn", lambda device, dtype: True)
    monkeypatch.setattr(device_fit, "choose_attention", lambda shape: choices.pop())
    config = small_config(num_steps=0, warmup_steps=0)
    config.model.lock()
    trainer.train_and_evaluate(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert run.config.model.attention == run.model.attention == "cudnn"
    assert "attention" not in run.info.model.model
    trainer.train_and_evaluate(config, tmp_path / "run")  # does not choose again
    with pytest.raises(UsageError, match="model.attention: 'cudnn' → 'xla'"):
        config.model.unlock().attention = "xla"
        trainer.train_and_evaluate(config, tmp_path / "run")
    monkeypatch.undo()
    assert load_run(tmp_path / "run").model.attention == "xla"  # a CPU


def test_train_and_evaluate_resumes_on_different_number_of_devices(finished, interrupted_copy, monkeypatch):
    create_mesh = sharding.create_mesh
    monkeypatch.setattr(sharding, "create_mesh", lambda **mesh: create_mesh(jax.devices()[:1], **mesh))
    results = trainer.train_and_evaluate(small_config(**INTERVALS), interrupted_copy)
    assert results["test/loss"] == pytest.approx(finished[1]["test/loss"], abs=1e-5)


def test_train_and_evaluate_rejects_workdir_in_use(tmp_path, monkeypatch):
    save, files = Checkpoints.save, []

    def start_second(*args, **kwargs):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match="run is in use by another run; wait for it, or give another --workdir"):
            trainer.train_and_evaluate(small_config(seed=1), tmp_path / "run")
        assert sorted(tmp_path.rglob("*")) == before
        files.extend(path.name for path in before)
        save(*args, **kwargs)

    monkeypatch.setattr(Checkpoints, "save", start_second)
    trainer.train_and_evaluate(small_config(), tmp_path / "run")
    assert ".lock" in files
    assert not (tmp_path / "run/.lock").exists()


def test_train_and_evaluate_creates_no_directory_on_user_error(tmp_path):
    config = small_config()
    config.dataset.data_dir = "/nowhere"
    with pytest.raises(UserError, match="dataset.data_dir is .* does not use"):
        trainer.train_and_evaluate(config, tmp_path / "runs/mine")
    assert list(tmp_path.iterdir()) == []


def test_lock_workdir_rejects_file_system_without_locks(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    with (
        pytest.raises(UserError, match=r"cannot write to --workdir .*run: No locks available; give another"),
        trainer.lock_workdir(tmp_path / "run"),
    ):
        pass


def test_train_and_evaluate_rejects_and_keeps_damaged_metrics(interrupted_copy):
    path = interrupted_copy / "metrics.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first[:20] + "\n" + second)
    before = {path: path.stat().st_mtime_ns for path in interrupted_copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="line 1 of .*metrics.jsonl is"):
        trainer.train_and_evaluate(small_config(**INTERVALS), interrupted_copy)
    assert {path: path.stat().st_mtime_ns for path in interrupted_copy.rglob("*") if path.is_file()} == before
    path.write_text(second)  # as the error advises
    trainer.train_and_evaluate(small_config(**INTERVALS), interrupted_copy)


def test_train_and_evaluate_rejects_missing_metrics_of_finished_run(finished_copy):
    (finished_copy / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="is finished at step 40, but metrics.jsonl is missing"):
        trainer.train_and_evaluate(small_config(), finished_copy)
    assert load_run(finished_copy).evaluate()["test/accuracy"] >= 0


@pytest.mark.parametrize("num_steps", [pytest.param(0, marks=pytest.mark.slow), 20])
def test_train_and_evaluate_syncs_metrics_to_disk_before_each_checkpoint(tmp_path, monkeypatch, num_steps):
    events, fsync, save = [], os.fsync, Checkpoints.save
    metrics = tmp_path / "metrics.jsonl"

    def record_fsync(descriptor):
        fsync(descriptor)
        if metrics.exists() and os.path.samestat(os.fstat(descriptor), metrics.stat()):
            events.append(metrics.read_text())

    def record_save(manager, step, *args, **kwargs):
        assert events[-1:] == [metrics.read_text()] != [""]
        events.append(step)
        save(manager, step, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Checkpoints, "save", record_save)
    config = small_config(num_steps=num_steps, warmup_steps=0, log_every_steps=5, checkpoint_every_steps=10)
    trainer.train_and_evaluate(config, tmp_path)
    assert [event for event in events if isinstance(event, int)] == ([10, 20] if num_steps else [0])
