"""`train.py` as users run it: exit codes, files and signals; as a subprocess where necessary."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, command_env, command_line

import train
from configs import digits
from vit_jax import trainer
from vit_jax.run import load_run
from vit_jax.runtime import distributed
from vit_jax.runtime.errors import UserError
from vit_jax.training import optim

SMALL = (
    "--config.model.hidden_size=32",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=64",
    "--config.num_steps=60",
    "--config.warmup_steps=10",
    "--config.log_every_steps=5",
    "--config.eval_every_steps=30",
    "--config.checkpoint_every_steps=10",
    "--config.augment=flip",
    "--noreport",
)


def arguments(workdir: Path, *overrides: str) -> list[str]:
    return ["--config", "configs/digits.py:scratch", "--workdir", str(workdir), *SMALL, *overrides]


def start(workdir: Path, *overrides: str) -> subprocess.Popen:
    """Starts training in a subprocess."""
    command = command_line("train.py", *arguments(workdir, *overrides))
    return subprocess.Popen(
        command, cwd=ROOT, env=command_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def records(workdir: Path) -> list[dict]:
    """Returns the records of metrics.jsonl without the throughput."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def assert_same_parameters(workdir: Path, expected_workdir: Path) -> None:
    run, expected_run = load_run(workdir), load_run(expected_workdir)
    assert run.step == expected_run.step
    for actual, expected in zip(jax.tree.leaves(run.params), jax.tree.leaves(expected_run.params), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.fixture(scope="module")
def finished(create_once, run_command) -> tuple[Path, str, str]:
    """Run directory, stdout and stderr of a finished run in a subprocess."""

    def create(directory):
        result = run_command("train.py", *arguments(directory / "run"))
        assert result.returncode == 0, result.stderr
        (directory / "stdout").write_text(result.stdout)
        (directory / "stderr").write_text(result.stderr)

    directory = create_once("finished_process", create)
    return directory / "run", (directory / "stdout").read_text(), (directory / "stderr").read_text()


def test_train_writes_documented_files(finished):
    workdir = finished[0]
    names = {path.name.split(".")[0] for path in workdir.iterdir()}
    assert names == {"config", "metrics", "events", "checkpoints", "curves"}
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 64
    steps = [line["step"] for line in records(workdir) if "train/loss" in line]
    assert steps == list(range(5, 61, 5))
    assert [line["step"] for line in records(workdir) if "test/loss" in line] == [30, 60]


def test_train_writes_documented_metrics(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    training = {"step", "train/loss", "train/accuracy", "learning_rate", "images_per_second"}
    testing = {"step", "test/loss", "test/accuracy", "test/accuracy_top5"}
    assert {frozenset(line) for line in lines} == {frozenset(training), frozenset(testing)}
    # 360 test images, each counted once: the accuracy is a multiple of 1/360.
    assert (lines[-1]["test/accuracy"] * 360) % 1 == pytest.approx(0, abs=1e-9)


def test_train_reduces_loss(finished):
    losses = [line["train/loss"] for line in records(finished[0]) if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.2


def test_train_prints_table_and_next_command(finished):
    workdir, stdout, stderr = finished
    last = records(workdir)[-1]
    assert f"test accuracy         {last['test/accuracy']:.2%}" in stdout
    assert "steps                 60 × 64 images, 2.7 epochs\n" in stdout
    assert "images/s" in stderr
    (command,) = re.findall(r"^next: (.*)$", stdout, re.M)
    again = subprocess.run([*command.split(), "--json"], cwd=ROOT, env=command_env(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    results = json.loads(again.stdout.splitlines()[-1])
    assert results["step"] == 60
    assert results["test/accuracy"] == last["test/accuracy"]
    assert results["test/loss"] == pytest.approx(last["test/loss"], rel=1e-5)


def test_train_prints_table_of_finished_run(finished, run_cli):
    workdir, stdout, _ = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = run_cli("train", arguments(workdir))
    assert again.code == 0
    notice, table = again.stdout.split("\n", maxsplit=1)
    assert notice == "already finished at step 60, nothing trained"
    assert table.strip() in stdout
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_train_rejects_different_config_in_same_workdir(finished, run_cli):
    result = run_cli("train", arguments(finished[0], "--config.learning_rate=0.5", "--config.seed=3"))
    assert result.code == 2
    assert "learning_rate: 0.002 → 0.5; seed: 0 → 3" in result.stderr
    assert result.stderr.count("\n") == 1


def kill(workdir: Path, moment: str) -> None:
    process = start(workdir)
    _wait_for(moment, workdir, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "moment",
    ["saving", pytest.param("compiling", marks=pytest.mark.slow), pytest.param("training", marks=pytest.mark.slow)],
)
def test_train_resumes_bit_exactly_after_sigkill(finished, tmp_path, run_command, moment):
    workdir = tmp_path / "run"
    kill(workdir, moment)
    result = run_command("train.py", *arguments(workdir))
    assert result.returncode == 0, result.stderr
    assert records(workdir) == records(finished[0])
    assert_same_parameters(workdir, finished[0])


def _wait_for(moment: str, workdir: Path, process: subprocess.Popen) -> None:
    """Waits until a run reaches a moment; "saving": while a checkpoint is being written."""
    deadline = time.monotonic() + 120
    metrics, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    while time.monotonic() < deadline and process.poll() is None:
        if moment == "compiling" and (workdir / "config.json").exists():
            return
        if moment == "training" and metrics.exists() and '"step": 25' in metrics.read_text():
            return
        if moment == "saving" and any("tmp" in path.name for path in checkpoints.glob("[23]*")):
            return
        time.sleep(0.002)
    pytest.fail(f"the run did not reach {moment}: {process.poll()}")


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGTERM, 0, "stopped by SIGTERM; saved checkpoint {} "),
        pytest.param(signal.SIGINT, 130, "", marks=pytest.mark.slow),
    ],
)
def test_train_saves_checkpoint_on_signal(tmp_path, number, code, message):
    workdir = tmp_path / "run"
    process = start(workdir, "--config.num_steps=60000")  # the signal arrives during training
    _wait_for("training", workdir, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    run = load_run(workdir)
    assert run.step >= 25
    assert message.format(run.step) in stdout


def test_train_stops_at_nonfinite_loss(tmp_path, run_cli):
    result = run_cli("train", arguments(tmp_path / "run", "--config.learning_rate=1e30"))
    assert result.code == 1
    # The first update of a warmed-up run has rate 0, the second diverges.
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "was not finite at step 2; no checkpoint had been written" in line


@pytest.mark.slow
def test_train_and_evaluate_keeps_last_checkpoint_before_nonfinite_loss(tmp_path, monkeypatch):
    """The learning rate of update 25 (from 1) is NaN, and checkpoints are saved every 10 steps."""
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=32, num_layers=1, num_heads=2, mlp_dim=32)
    config.update(num_steps=60, log_every_steps=5, checkpoint_every_steps=10, eval_every_steps=60)
    monkeypatch.setattr(optim, "make_schedule", lambda *_, **__: lambda i: jnp.where(i == 24, jnp.nan, 0.01))
    with pytest.raises(UserError, match="not finite at step 25; the last good checkpoint is step 20"):
        trainer.train_and_evaluate(config, tmp_path)
    run = load_run(tmp_path)
    assert run.step == 20
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.params))


def test_train_with_zero_steps_evaluates_and_saves_checkpoint(tmp_path, run_cli):
    workdir = tmp_path / "run"
    result = run_cli("train", arguments(workdir, "--config.num_steps=0", "--config.warmup_steps=0"))
    assert result.code == 0, result.stderr
    assert [line["step"] for line in records(workdir)] == [0]
    assert load_run(workdir).step == 0


@pytest.mark.slow
def test_train_keeps_last_checkpoint_after_failed_write(finished, tmp_path, run_command):
    workdir = tmp_path / "run"
    kill(workdir, "training")
    step = max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())

    # The file size is limited to 20 KiB, which a checkpoint exceeds.
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *command_line("train.py", *arguments(workdir))]
    result = subprocess.run(limited, cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    # Threads of TensorStore and Orbax may print tracebacks in addition to the line of error.
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "could not be written" in line
    assert f"the last good one is step {step}" in line
    assert not list((workdir / "checkpoints").glob("*tmp*"))

    assert run_command("train.py", *arguments(workdir)).returncode == 0
    assert_same_parameters(workdir, finished[0])


@pytest.mark.slow
def test_train_reports_full_disk_in_one_line(tmp_path):
    """The run directory is on a tmpfs of 100 KiB, mounted in a namespace of the subprocess."""
    script = 'mount -t tmpfs -o size=100k tmpfs "$0" && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, str(tmp_path)]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk (unshare --user --mount)")
    command = [*inside, *command_line("train.py", *arguments(tmp_path / "run"))]
    result = subprocess.run(command, cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "the disk has" in line and "none was saved before; free some space" in line
    assert "Traceback" not in result.stderr


SLURM_STEP = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("environment", "flags", "splits"),
    [
        ({}, [], True),
        (SLURM_STEP, [], False),
        (SLURM_STEP, ["--num_processes=1"], True),
        ({}, ["--coordinator=localhost:1", "--num_processes=2", "--process_id=0"], False),
    ],
)
def test_main_splits_cpu_only_of_single_process(monkeypatch, environment, flags, splits):
    """Several processes split the batch; each of them is one device."""
    calls = []
    stop = mock.Mock(side_effect=UserError("stopped before training"))
    monkeypatch.setattr(train, "split_cpu", lambda maximum, **options: calls.append((maximum, options)))
    monkeypatch.setattr(distributed, "initialize_processes", stop)
    for name in SLURM_STEP:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="stopped before training"):
        train.main(["--config", "configs/digits.py", "--config.mesh.cpu_devices=0", *flags])
    assert calls == ([(0, {"batch_size": 64})] if splits else [])
