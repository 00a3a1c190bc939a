"""`train.py` and `evaluate` as a user runs them: real processes, exit codes, files, kills."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, command_env, command_line

from configs import digits
from vit_jax import trainer
from vit_jax.run import load_run
from vit_jax.runtime.errors import UserError
from vit_jax.training import optim

SMALL = (
    "--config.model.hidden_size=32",
    "--config.model.num_layers=2",
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


def train(workdir: Path, *overrides: str) -> list[str]:
    return command_line("train.py", "--config", "configs/digits.py:scratch", "--workdir", workdir, *SMALL, *overrides)


def records(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def assert_same_parameters(first: Path, second: Path) -> None:
    one, other = load_run(first), load_run(second)
    assert one.step == other.step
    for ours, theirs in zip(_leaves(one.params), _leaves(other.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def _leaves(params: dict) -> list[np.ndarray]:
    from jax import tree

    return [np.asarray(leaf) for leaf in tree.leaves(params)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_command) -> tuple[Path, subprocess.CompletedProcess]:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    result = run_command(*train(workdir)[1:])
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_train_leaves_what_the_contract_names(finished):
    workdir, _ = finished
    names = {path.name.split(".")[0] for path in workdir.iterdir()}
    assert names == {"config", "metrics", "events", "checkpoints", "curves"}
    assert json.loads((workdir / "config.json").read_text())["batch_size"] == 64
    steps = [line["step"] for line in records(workdir) if "train/loss" in line]
    assert steps == list(range(5, 61, 5))
    assert [line["step"] for line in records(workdir) if "test/loss" in line] == [30, 60]


def test_train_lines_hold_the_contracts_keys(finished):
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    training = {"step", "train/loss", "train/accuracy", "learning_rate", "images_per_second"}
    testing = {"step", "test/loss", "test/accuracy", "test/accuracy_top5"}
    assert {frozenset(line) for line in lines} == {frozenset(training), frozenset(testing)}
    # 360 test pictures, each counted once: the accuracy is a whole number of 360ths.
    assert (lines[-1]["test/accuracy"] * 360) % 1 == pytest.approx(0, abs=1e-9)


def test_train_learns(finished):
    losses = [line["train/loss"] for line in records(finished[0]) if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.2


def test_train_ends_with_a_table_and_what_to_type_next(finished):
    workdir, result = finished
    accuracy = records(workdir)[-1]["test/accuracy"]
    assert f"test accuracy         {accuracy:.2%}" in result.stdout
    (command,) = re.findall(r"^next: (.*)$", result.stdout, re.M)
    again = subprocess.run([*command.split(), "--json"], cwd=ROOT, env=command_env(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["test/accuracy"] == accuracy
    assert "images/s" in result.stderr


def test_a_finished_run_started_again_prints_its_table(finished, run_command):
    workdir, first = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = run_command(*train(workdir)[1:])
    assert again.returncode == 0
    assert again.stdout.strip() in first.stdout
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_evaluate_gives_the_same_test_accuracy(finished, run_command):
    workdir, _ = finished
    result = run_command("-m", "vit_jax.evaluate", "--workdir", workdir, "--json")
    assert result.returncode == 0, result.stderr
    ours, theirs = json.loads(result.stdout.splitlines()[-1]), records(workdir)[-1]
    assert ours["step"] == 60
    assert ours["test/accuracy"] == theirs["test/accuracy"]
    assert ours["test/loss"] == pytest.approx(theirs["test/loss"], rel=1e-5)


def test_another_config_in_the_same_workdir_is_refused_with_a_diff(finished, run_command):
    result = run_command(*train(finished[0], "--config.learning_rate=0.5", "--config.seed=3")[1:])
    assert result.returncode == 2
    assert "learning_rate: 0.001 → 0.5; seed: 0 → 3" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("moment", ["compiling", "training", "saving"])
def test_a_run_killed_at_any_moment_ends_bit_identical(finished, tmp_path, moment):
    workdir = tmp_path / "run"
    process = subprocess.Popen(train(workdir), cwd=ROOT, env=command_env(), stderr=subprocess.PIPE, text=True)
    _wait_for(moment, workdir, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    result = subprocess.run(train(workdir), cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert records(workdir) == records(finished[0])
    assert_same_parameters(workdir, finished[0])


def _wait_for(moment: str, workdir: Path, process: subprocess.Popen) -> None:
    """Returns when a run has come to a moment; `saving`: while a checkpoint is being written."""
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
    pytest.fail(f"the run never came to {moment}: {process.poll()}")


def test_sigterm_saves_and_exits_0(finished, tmp_path):
    workdir = tmp_path / "run"
    # A thousand times as many steps, so that the signal comes in the middle.
    command = train(workdir, "--config.num_steps=60000")
    process = subprocess.Popen(
        command, cwd=ROOT, env=command_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _wait_for("training", workdir, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM; saved step" in out
    run = load_run(workdir)
    assert f"saved step {run.step} " in out
    assert run.step >= 25


def test_sigint_saves_and_exits_130(tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        train(workdir, "--config.num_steps=60000"),
        cwd=ROOT,
        env=command_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for("training", workdir, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert load_run(workdir).step >= 25


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, run_command):
    workdir = tmp_path / "run"
    result = run_command(*train(workdir, "--config.learning_rate=1e30")[1:])
    assert result.returncode == 1
    # The first update of a warmed-up run has rate 0, the second blows up.
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "was not finite at step 2; no checkpoint had been written" in line
    assert "Traceback" not in result.stderr


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    """The learning rate of update 25, counted from 1, is not a number; checkpoints are written every 10 steps."""
    config = digits.get_config("scratch")
    config.model = dict(patch_size=4, hidden_size=32, num_layers=1, num_heads=2, mlp_dim=32)
    config.update(num_steps=60, log_every_steps=5, checkpoint_every_steps=10, eval_every_steps=60)
    monkeypatch.setattr(optim, "make_schedule", lambda *_, **__: lambda i: jnp.where(i == 24, jnp.nan, 0.01))
    with pytest.raises(UserError, match="not finite at step 25; the last good checkpoint is step 20"):
        trainer.train_and_evaluate(config, tmp_path)
    run = load_run(tmp_path)
    assert run.step == 20
    assert all(np.isfinite(leaf).all() for leaf in _leaves(run.params))


def test_no_steps_evaluate_and_save_what_the_run_starts_from(tmp_path, run_command):
    workdir = tmp_path / "run"
    result = run_command(*train(workdir, "--config.num_steps=0", "--config.warmup_steps=0")[1:])
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in records(workdir)] == [0]
    assert load_run(workdir).step == 0


def test_a_write_that_fails_keeps_the_last_good_checkpoint(finished, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(train(workdir), cwd=ROOT, env=command_env(), stderr=subprocess.PIPE, text=True)
    _wait_for("training", workdir, process)
    process.kill()
    process.communicate()
    step = max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())

    # No file may grow beyond 20 KiB, and a checkpoint's do.
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *train(workdir)]
    result = subprocess.run(limited, cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    # Threads of TensorStore and Orbax may print tracebacks of their own beside our line.
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "could not be written" in line
    assert f"the last good one is step {step}" in line
    assert not list((workdir / "checkpoints").glob("*tmp*"))

    assert subprocess.run(train(workdir), cwd=ROOT, env=command_env(), capture_output=True).returncode == 0
    assert_same_parameters(workdir, finished[0])


def test_a_full_disk_is_one_line(tmp_path):
    """A real disk of 100 KiB, mounted in a name space of the process's own."""
    script = 'mount -t tmpfs -o size=100k tmpfs "$0" && exec "$@"'
    inside = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script, str(tmp_path)]
    if subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk (unshare --user --mount)")
    command = [*inside, *train(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, env=command_env(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "the disk has" in line and "there is no earlier one; free some space" in line
    assert "Traceback" not in result.stderr


def test_parameters_of_another_seed_differ(finished, tmp_path, run_command):
    workdir = tmp_path / "run"
    assert run_command(*train(workdir, "--config.seed=1")[1:]).returncode == 0
    assert records(workdir) != records(finished[0])
