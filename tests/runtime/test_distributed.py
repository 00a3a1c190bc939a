"""Two processes with four devices each, connected over localhost."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, command_env, command_line
from PIL import Image

from vit_jax import data
from vit_jax.runtime import distributed
from vit_jax.runtime.errors import UsageError

SMALL = (
    "--config.model.hidden_size=32",
    "--config.model.num_layers=1",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=128",
    "--config.dataset.train_split=train[:160]",
    "--config.dataset.test_split=test[:44]",
    "--config.batch_size=32",
    "--config.num_steps=12",
    "--config.warmup_steps=1",
    "--config.log_every_steps=2",
    "--config.eval_every_steps=12",
    "--config.checkpoint_every_steps=4",
    "--config.mesh.fsdp=8",
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_processes(log: Path, *arguments: object, each=((), ()), env=({}, {}), stdout=None) -> list[subprocess.Popen]:
    """Starts a command in two processes, which log to log.0 and log.1.

    Args:
        log: path of the logs, without suffix.
        arguments: of both processes.
        each: additional arguments of the first and of the second process.
        env: additional environment variables of the first and of the second process.
        stdout: destination of standard output instead of the logs.
    """
    processes = []
    for i in range(2):
        variables = command_env({"XLA_FLAGS": "--xla_force_host_platform_device_count=4", **env[i]})
        with log.with_suffix(f".{i}").open("w") as output:
            command = command_line(*arguments, *each[i])
            process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=stdout or output, stderr=output)
            processes.append(process)
    return processes


def start_training(workdir: Path, *overrides: str, second: tuple[str, ...] = ()) -> list[subprocess.Popen]:
    flags = ("--coordinator", f"localhost:{free_port()}", "--num_processes", 2, "--wait_seconds", 100)
    ids = (("--process_id", 0), ("--process_id", 1, *second))
    return start_processes(workdir, *training(workdir), *overrides, *flags, each=ids)


def training(workdir: Path) -> list[object]:
    return ["train.py", "--config", "configs/digits.py:scratch", "--workdir", workdir, *SMALL, "--noreport"]


def wait(processes: list[subprocess.Popen], timeout: float = 240) -> list[int]:
    try:
        return [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_for(path: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.time() + 200
    while not path.exists():
        assert time.time() < deadline, f"{path} did not appear"
        assert all(process.poll() is None for process in processes), "a process ended early"
        time.sleep(0.05)


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_train_and_evaluate_resumes_two_killed_processes_and_matches_one_process(tmp_path, run_command):
    processes = start_training(tmp_path / "pair")
    wait_for(tmp_path / "pair/checkpoints/4", processes)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait()
    processes[0].kill()
    processes[0].wait()

    exit_codes = wait(start_training(tmp_path / "pair"))
    first, second = ((tmp_path / f"pair.{i}").read_text() for i in range(2))
    assert exit_codes == [0, 0], first + second
    assert "resuming from step" in first
    assert "2 processes, 8 devices, 4 of them local" in first
    assert "test accuracy" in first
    assert "test accuracy" not in second

    eight_devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    single = run_command(*training(tmp_path / "single"), env=eight_devices)
    assert single.returncode == 0, single.stderr
    for actual, expected in zip(records(tmp_path / "pair"), records(tmp_path / "single"), strict=True):
        actual.pop("images_per_second", None), expected.pop("images_per_second", None)
        assert actual == pytest.approx(expected, abs=1e-5)

    evaluated = run_command("-m", "vit_jax.evaluate", "--workdir", tmp_path / "pair", "--json")  # one device
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads(evaluated.stdout.splitlines()[-1])
    expected = records(tmp_path / "pair")[-1]
    assert {key: results[key] for key in expected} == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_train_and_evaluate_with_two_streaming_processes_matches_one_process(tmp_path, run_command):
    """Each process decodes half of every batch and half of the test images."""
    dataset = data.load_dataset("digits", image_size=8)
    for name, split, count in (("train", dataset.train, 160), ("test", dataset.test, 44)):
        for i in range(count):
            directory = tmp_path / "images" / name / str(split.labels[i])
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(split.images[i]).save(directory / f"{i:03}.png")
    overrides = [f"--config.dataset.name=folder:{tmp_path}/images", "--config.dataset.storage=stream"]
    overrides += [
        "--config.dataset.num_workers=1",
        "--config.dataset.train_split=train",
        "--config.dataset.test_split=test",
    ]
    overrides += ["--config.augment=square_crop", "--config.mixup_alpha=0.2"]
    exit_codes = wait(start_training(tmp_path / "pair", *overrides))
    assert exit_codes == [0, 0], (tmp_path / "pair.0").read_text() + (tmp_path / "pair.1").read_text()
    eight_devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    single = run_command(*training(tmp_path / "single"), *overrides, env=eight_devices)
    assert single.returncode == 0, single.stderr
    for actual, expected in zip(records(tmp_path / "pair"), records(tmp_path / "single"), strict=True):
        actual.pop("images_per_second", None), expected.pop("images_per_second", None)
        assert actual == pytest.approx(expected, abs=1e-5)


def test_train_and_evaluate_stops_both_processes_at_same_step_after_sigterm(tmp_path):
    processes = start_training(tmp_path / "run", "--config.num_steps=2000")
    wait_for(tmp_path / "run/checkpoints/4", processes)
    processes[1].send_signal(signal.SIGTERM)
    assert wait(processes) == [0, 0]
    text = (tmp_path / "run.0").read_text()
    assert "stopped by SIGTERM; saved checkpoint" in text
    step = int(text.split("saved checkpoint ")[1].split()[0])
    assert step % 2 == 0
    assert (tmp_path / f"run/checkpoints/{step}").is_dir()
    assert records(tmp_path / "run")[-1]["step"] == step


def test_train_and_evaluate_exits_on_error_without_waiting_for_other_process(tmp_path):
    processes = start_training(tmp_path / "run", second=("--config.dataset.data_dir=/nowhere",))
    try:
        assert processes[1].wait(60) == 2
    finally:
        wait(processes[1:]), processes[0].kill(), processes[0].wait()
    last = (tmp_path / "run.1").read_text().splitlines()[-1]
    assert last == "error: dataset.data_dir is '/nowhere', which 'digits' does not use; leave it empty"


def test_create_experiment_rejects_processes_with_different_datasets(tmp_path):
    processes = start_training(tmp_path / "run", second=("--config.dataset.train_split=train[:150]",))
    assert wait(processes, 100) == [1, 1]
    first, second = (text.splitlines()[-1] for text in read_logs(tmp_path / "run"))
    assert first == second
    assert first.startswith("error: process 1 read 150 training and 44 test images of 10 classes (digest ")
    assert "the first process read 160 training and 44 test images of 10 classes (digest " in first


def test_initialize_processes_times_out_when_other_processes_are_missing(tmp_path, run_command):
    port = free_port()
    for process_id in range(2):
        flags = ("--coordinator", f"localhost:{port}", "--num_processes", 2, "--process_id", process_id)
        result = run_command(*training(tmp_path), *flags, "--wait_seconds", 3)
        assert result.returncode == 1
        assert result.stderr.splitlines() == [
            "error: waited 3 seconds for the other processes; "
            "start all of them, with the same --coordinator, which each can reach"
        ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("localhost:1234", None, None), "--coordinator is localhost:1234, --num_processes None, --process_id None; "),
        ((None, 2, 0), "--coordinator is None, --num_processes 2, --process_id 0; expected HOST:PORT of process 0"),
        (("localhost", 2, 0), "--coordinator is localhost, "),
        (("localhost:http", 2, 0), "--coordinator is localhost:http, "),
        (("localhost:1234", 2, 2), "--process_id 2; expected "),
        (("localhost:1234", 2, -1), "--process_id -1; expected "),
        (("localhost:1234", 0, 0), "--num_processes 0, --process_id 0; expected "),
    ],
)
def test_initialize_processes_rejects_inconsistent_flags(flags, message):
    with pytest.raises(UsageError) as error, distributed.initialize_processes(*flags):
        pass
    assert message in str(error.value)


FAIL = """
import os, sys, time
from vit_jax.runtime import distributed
from vit_jax.runtime.errors import UserError, run_command

def fail(reason):
    import jax.numpy as jnp
    if reason == "out of memory":
        jnp.ones(10**14).block_until_ready()  # 400 TB
    if reason == "bug":
        raise KeyError("bug")
    if reason == "user error":
        raise UserError("the disk is full")
    if reason == "kill":
        os.kill(os.getpid(), 9)

def main():
    coordinator, count, reason, failing, process_id = sys.argv[1:]
    distributed.SILENT_SECONDS = 5
    with distributed.initialize_processes(coordinator, int(count), int(process_id)):
        distributed.process_max(1)
        if reason == "late":
            if process_id == failing:
                time.sleep(3)
                raise UserError("the disk is full")
            return 0
        if process_id == failing or failing == "all":
            fail(reason)
        distributed.process_max(1)
    return 0

sys.exit(run_command(main))
"""
RESUME = "; rerun the same command to resume from the last checkpoint"


def start_failing(log: Path, reason: str, failing: object) -> list[subprocess.Popen]:
    """Starts two processes, of which one or "all" fail between two collective operations, and logs standard error."""
    arguments = ("-c", FAIL, f"localhost:{free_port()}", 2, reason, failing)
    return start_processes(log, *arguments, each=((0,), (1,)), stdout=subprocess.DEVNULL)


def read_logs(log: Path) -> list[str]:
    return [log.with_suffix(f".{i}").read_text() for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_initialize_processes_stops_all_processes_when_one_is_out_of_memory(tmp_path, failing):
    assert wait(start_failing(tmp_path / "log", "out of memory", failing), 60) == [1, 1]
    logs = read_logs(tmp_path / "log")
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 400000000000000 bytes"
    assert logs[failing].startswith(f"error: {message}; to train, set more --config.accumulation_steps")
    assert logs[failing].count("\n") == 1
    assert logs[1 - failing] == f"error: process {failing} of 2 failed: {message}.{RESUME}\n"


def test_initialize_processes_prints_traceback_only_in_failing_process(tmp_path):
    assert wait(start_failing(tmp_path / "log", "bug", 1), 60) == [1, 1]
    logs = read_logs(tmp_path / "log")
    assert logs[0] == f"error: process 1 of 2 failed: KeyError: 'bug'{RESUME}\n"
    assert logs[1].startswith("Traceback") and "in fail" in logs[1]
    assert logs[1].endswith("KeyError: 'bug'\n")


def test_initialize_processes_reports_shared_error_in_each_process(tmp_path):
    assert wait(start_failing(tmp_path / "log", "user error", "all"), 60) == [1, 1]
    assert read_logs(tmp_path / "log") == ["error: the disk is full\n"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_initialize_processes_stops_waiting_process_when_other_fails_late(tmp_path, failing):
    assert wait(start_failing(tmp_path / "log", "late", failing), 60) == [1, 1]
    logs = read_logs(tmp_path / "log")
    assert logs[failing] == "error: the disk is full\n"
    assert logs[1 - failing] == f"error: process {failing} of 2 failed: the disk is full{RESUME}\n"


@pytest.mark.slow
def test_initialize_processes_stops_main_process_when_other_is_killed(tmp_path):
    assert wait(start_failing(tmp_path / "log", "kill", 1), 60) == [1, -signal.SIGKILL]
    assert read_logs(tmp_path / "log")[0] == f"error: process 1 of 2 has not responded for 5 seconds{RESUME}\n"


GATHER = """
import sys, time
from vit_jax.runtime import distributed
with distributed.initialize_processes():
    import jax
    index = jax.process_index()
    largest = distributed.process_max(7 + index)
    texts = distributed.gather_strings("grün"[:3 + index])
    with distributed.main_process_first():
        if index == 0:
            time.sleep(1)
        with open(sys.argv[1], "a") as file:
            file.write(f"{index} of {jax.process_count()}, {largest}, {texts}\\n")
"""


def test_initialize_processes_connects_slurm_tasks(tmp_path):
    """Sets the variables that `srun --ntasks=2` sets for its tasks."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    env = tuple({**job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2))
    output = tmp_path / "output"
    processes = start_processes(tmp_path / "log", "-c", GATHER, output, env=env)
    assert wait(processes, 100) == [0, 0]
    assert output.read_text() == "0 of 2, 8, ['grü', 'grün']\n1 of 2, 8, ['grü', 'grün']\n"


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # a batch script, outside srun
        {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod
    ],
)
def test_initialize_processes_runs_alone_in_single_process_cluster_job(variables, run_command):
    script = (
        "from vit_jax.runtime import distributed\n"
        "with distributed.initialize_processes():\n    import jax; print(jax.process_count())"
    )
    result = run_command("-c", script, env=variables)
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr


def test_initialize_processes_suggests_missing_jax_k8s_extra(tmp_path, run_command):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    result = run_command(*training(tmp_path), env=pod)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: cannot connect to the other processes")
    assert "pip install 'jax[k8s]'" in last
