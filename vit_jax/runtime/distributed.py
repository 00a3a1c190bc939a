"""Several processes as one run: they find each other, take turns, agree on values, and end together."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.runtime.errors import UsageError, UserError, one_line
from vit_jax.runtime.watch import Watch


@contextlib.contextmanager
def initialize_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    wait_seconds: int = 300,
) -> Iterator[None]:
    """Connects the processes of a run; to be entered before any other use of JAX.

    Without flags the tasks of a SLURM step and the pods of an indexed Kubernetes job find each other; any other process
    runs alone. Standard output and progress bars of all processes but the main one are turned off.

    When one process fails or is killed, all of them end within a minute: the others with one line that names it and
    exit code 1. Otherwise each leaves when all others do.

    Args:
        coordinator: "host:port" of process 0, which listens there.
        num_processes: of the run; 1 runs alone.
        process_id: of this process, from 0.
        wait_seconds: for the other processes. If they do not come, the process exits with one line and code 1.

    Raises:
        UsageError: the three do not belong together.
        UserError: the port is taken, or JAX does not understand the variables of SLURM or Kubernetes.
    """
    detect = coordinator is None and num_processes is None and process_id is None
    if num_processes == 1 or (detect and not _is_cluster()):
        yield
        return
    if not detect:
        _check_flags(coordinator, num_processes, process_id)
    timer = threading.Timer(
        wait_seconds, _give_up, [process_id, wait_seconds]
    )  # JAX would abort with a C++ stack trace
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if detect else "deactivate",  # in SLURM it would take one device only
            initialization_timeout=wait_seconds + 60,
            shutdown_timeout_seconds=wait_seconds,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"this process could not join the others ({one_line(error)[:300]}); give --coordinator, --num_processes "
            "and --process_id; Kubernetes without them: pip install 'jax[k8s]'"
        ) from error
    finally:
        timer.cancel()
    watch = Watch()
    try:
        with contextlib.nullcontext() if is_main_process() else _silence():
            num_local = jax.local_device_count()
            print(f"{jax.process_count()} processes, {jax.device_count()} devices, {num_local} of them here")
            yield
        watch.leave()
    except (Exception, KeyboardInterrupt) as error:
        watch.fail(error)


def is_main_process() -> bool:
    """Returns whether this process writes metrics and figures: process 0, or the only one."""
    return jax.process_index() == 0


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Lets the main process run the body before the others, which find what it has downloaded."""
    if not is_main_process():
        sync_processes("main_process_first")
    try:
        yield
    finally:
        if is_main_process():
            sync_processes("main_process_first")


def sync_processes(name: str) -> None:
    """Returns when every process has called this."""
    multihost_utils.sync_global_devices(name)


def process_max(number: int) -> int:
    """Returns the largest number of all processes; each must call this at the same step."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def gather_strings(text: str) -> list[str]:
    """Returns the strings of all processes in their order, cut after 256 bytes; each must call this."""
    if jax.process_count() == 1:
        return [text]
    encoded = np.frombuffer(text.encode()[:256].ljust(256, b"\0"), np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(encoded)]


def _is_cluster() -> bool:
    """Returns whether SLURM or Kubernetes started this process as one of several."""
    is_slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return is_slurm or {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()


def _check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if (
        num_processes is None
        or process_id is None
        or not 0 <= process_id < num_processes
        or not re.fullmatch(r".+:\d+", coordinator or "")
    ):
        raise UsageError(
            f"--coordinator is {coordinator}, --num_processes {num_processes}, --process_id {process_id}; expected "
            "HOST:PORT of process 0, a positive integer, and this process's number from 0; give all three or none"
        )


def _give_up(process_id: int | None, wait_seconds: int) -> NoReturn:
    name = "this process" if process_id is None else f"process {process_id}"
    advice = "start all of them, with one --coordinator that each can reach"
    print(f"error: {name} waited {wait_seconds} seconds for the others; {advice}", file=sys.stderr, flush=True)
    os._exit(1)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield
