import dataclasses
import json
import os

import jax
import pytest

from configs import digits
from vit_jax import trainer
from vit_jax.run import load_run
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training.checkpoint import Checkpoints


def small_config(**changes):
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16)
    config.update(num_steps=40, warmup_steps=5, log_every_steps=20, eval_every_steps=40, checkpoint_every_steps=40)
    config.update(changes)
    return config


def test_a_run_waits_for_its_device_on_log_and_evaluation_steps_only(tmp_path, monkeypatch):
    fetches = []
    fetch = trainer.fetch
    monkeypatch.setattr(trainer, "fetch", lambda tree: fetches.append(tree) or fetch(tree))
    trainer.train_and_evaluate(small_config(), tmp_path)
    assert len(fetches) == 3  # the lines of steps 20 and 40, and one evaluation


def test_train_and_evaluate_returns_the_last_evaluation(tmp_path):
    results = trainer.train_and_evaluate(small_config(), tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step": 40, **results} == last
    assert trainer.train_and_evaluate(small_config(), tmp_path) == results


@pytest.mark.parametrize(("optimizer", "trainable"), [("adamw", "full"), ("adamw", "head"), ("sgd", "head")])
def test_load_run_gives_model_and_parameters(tmp_path, optimizer, trainable):
    config = small_config(trainable=trainable, dtype="bfloat16")
    config.optimizer.name = optimizer
    results = trainer.train_and_evaluate(config, tmp_path)
    run = load_run(tmp_path)
    assert run.step == 40
    assert run.class_names == tuple("0123456789")
    assert run.model.dtype == jax.numpy.bfloat16
    assert run.evaluate() == pytest.approx(results, rel=1e-5)


def test_load_run_names_the_checkpoints_that_there_are(tmp_path):
    trainer.train_and_evaluate(small_config(), tmp_path)
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 40"):
        load_run(tmp_path, step=7)


def interrupt(config, workdir, monkeypatch, *, step):
    """Trains until the checkpoint of a step is saved."""
    save = Checkpoints.save

    def save_and_stop(checkpoints, saved_step, *args, **kwargs):
        save(checkpoints, saved_step, *args, **kwargs)
        if saved_step == step:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Checkpoints, "save", save_and_stop)
        trainer.train_and_evaluate(config, workdir)


def test_train_and_evaluate_takes_a_missing_config_json_from_the_checkpoint(tmp_path, monkeypatch):
    interrupt(small_config(checkpoint_every_steps=20), tmp_path, monkeypatch, step=20)
    before = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match=r"another config \(learning_rate: 0.001 → 0.5\)"):
        trainer.train_and_evaluate(small_config(learning_rate=0.5), tmp_path)
    run = load_run(tmp_path)
    assert json.dumps(run.config.to_dict(), indent=2) + "\n" == before
    assert "config" not in run.about
    trainer.train_and_evaluate(small_config(checkpoint_every_steps=20), tmp_path)
    assert (tmp_path / "config.json").read_text() == before


def test_train_and_evaluate_refuses_a_checkpoint_without_any_config(tmp_path, monkeypatch):
    """Checkpoints of version 0.1 hold no config: config.json is the only copy."""
    read_metadata = Checkpoints.read_metadata
    old = lambda *args: {key: value for key, value in read_metadata(*args).items() if key != "config"}  # noqa: E731
    monkeypatch.setattr(Checkpoints, "read_metadata", old)
    trainer.train_and_evaluate(small_config(), tmp_path)
    trainer.train_and_evaluate(small_config(), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="config.json cannot be read: "):
        trainer.train_and_evaluate(small_config(), tmp_path)


def test_evaluate_run_refuses_other_classes(tmp_path):
    trainer.train_and_evaluate(small_config(), tmp_path)
    run = load_run(tmp_path)
    other = dataclasses.replace(run, class_names=("cat", "dog"))
    with pytest.raises(UserError, match="the run knows 2 classes, cat, dog, …; the dataset has 10, 0, 1, 2, 3, 4, …"):
        other.evaluate()


def test_steps_compiled_once_serve_a_resumed_run(tmp_path, monkeypatch):
    """A run interrupted in one process and resumed in another number of devices goes on from its step."""
    from vit_jax.runtime import sharding

    trainer.train_and_evaluate(small_config(), tmp_path / "whole")
    everything = sharding.create_mesh
    config = small_config(checkpoint_every_steps=20)
    interrupt(config, tmp_path / "halves", monkeypatch, step=20)
    monkeypatch.setattr(sharding, "create_mesh", lambda **mesh: everything(jax.devices()[:1], **mesh))
    results = trainer.train_and_evaluate(config, tmp_path / "halves")
    whole = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert results["test/loss"] == pytest.approx(whole["test/loss"], abs=1e-5)


def test_train_and_evaluate_refuses_a_workdir_that_another_run_uses(tmp_path, monkeypatch):
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


def test_train_and_evaluate_leaves_no_directory_where_it_refuses(tmp_path):
    config = small_config()
    config.dataset.data_dir = "/nowhere"
    with pytest.raises(UserError, match="does not read data_dir"):
        trainer.train_and_evaluate(config, tmp_path / "runs/mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(37, "No locks available"), NotImplementedError("no flock")])
def test_lock_workdir_reports_a_file_system_without_locks(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    with (
        pytest.raises(UserError, match=r"cannot lock --workdir .*run: .*(locks|flock)"),
        trainer.lock_workdir(tmp_path / "run"),
    ):
        pass


def test_train_and_evaluate_refuses_damaged_metrics_and_keeps_them(tmp_path, monkeypatch):
    config = small_config(log_every_steps=10, checkpoint_every_steps=20)
    interrupt(config, tmp_path, monkeypatch, step=20)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first[:20] + "\n" + second)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="line 1 of .*metrics.jsonl is"):
        trainer.train_and_evaluate(config, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    path.write_text(second)  # as the message says
    trainer.train_and_evaluate(config, tmp_path)


def test_train_and_evaluate_says_that_a_finished_run_has_no_metrics(tmp_path):
    trainer.train_and_evaluate(small_config(), tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="is finished at step 40, but metrics.jsonl is missing"):
        trainer.train_and_evaluate(small_config(), tmp_path)
    assert load_run(tmp_path).evaluate()["test/accuracy"] >= 0


@pytest.mark.parametrize("num_steps", [0, 20])
def test_train_and_evaluate_writes_metrics_to_disk_before_each_checkpoint(tmp_path, monkeypatch, num_steps):
    events, fsync, save = [], os.fsync, Checkpoints.save
    metrics = tmp_path / "metrics.jsonl"

    def note_fsync(descriptor):
        fsync(descriptor)
        if metrics.exists() and os.path.samestat(os.fstat(descriptor), metrics.stat()):
            events.append(metrics.read_text())

    def note_save(checkpoints, step, *args, **kwargs):
        assert events[-1:] == [metrics.read_text()] != [""]
        events.append(step)
        save(checkpoints, step, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Checkpoints, "save", note_save)
    config = small_config(num_steps=num_steps, warmup_steps=0, log_every_steps=5, checkpoint_every_steps=10)
    trainer.train_and_evaluate(config, tmp_path)
    assert [event for event in events if isinstance(event, int)] == ([10, 20] if num_steps else [0])
