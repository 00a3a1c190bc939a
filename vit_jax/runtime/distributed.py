"""Several processes as one run: they find each other, take turns, agree, and only the first one writes."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

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
    """While inside, the processes of a run know each other; to be entered before any other use of JAX.

    Without flags the tasks of a SLURM step and the pods of an indexed Kubernetes job find each other; a process that is
    alone stays so. In all processes but the first, standard output and progress bars are turned off.

    When one process fails or is killed, all of them end within a minute: the others with one line that names it and
    exit code 1. Otherwise each leaves when all others do.

    Args:
        coordinator: "host:port" of the first process, which listens there.
        num_processes: of the run; 1 turns the search off.
        process_id: of this process, counted from 0.
        wait_seconds: for the others; where they do not come, one line says so and the process exits with 1.

    Raises:
        UsageError: the three do not belong together.
        UserError: the port is taken, or what SLURM or Kubernetes say of the run could not be read.
    """
    given = (coordinator, num_processes, process_id)
    if num_processes == 1 or (given == (None, None, None) and not _is_one_of_many()):
        yield
        return
    if given == (None, None, None):
        arguments: dict = {}
        here = os.environ.get("SLURM_PROCID") or os.environ["JOB_COMPLETION_INDEX"]
        who, where = f"process {here} of {os.environ.get('SLURM_NTASKS', 'its job')}", "the first of its hosts"
    else:
        arguments = _check_flags(*given)
        who, where = f"process {process_id} of {num_processes}", str(coordinator)
    with _time_limit(wait_seconds, f"{who} waited {wait_seconds} seconds at {where}"):
        try:
            jax.distributed.initialize(
                **arguments, initialization_timeout=wait_seconds + 60, shutdown_timeout_seconds=wait_seconds
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"{who} could not join the others at {where} ({one_line(error)[:300]}); "
                "give --coordinator, --num_processes and --process_id; Kubernetes without them: pip install 'jax[k8s]'"
            ) from error
    watch = Watch()
    try:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices, {jax.local_device_count()} of them here")
        if not is_main_process():
            os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        yield
        watch.leave()
    except (Exception, KeyboardInterrupt) as error:
        watch.fail(error)


def is_main_process() -> bool:
    """Whether this process is the one that writes metrics and pictures; always so where it is alone."""
    return jax.process_index() == 0


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """The first process goes through the body, then all others do: what it fetches, they find."""
    if not is_main_process():
        sync_processes("main_process_first")
    try:
        yield
    finally:
        if is_main_process():
            sync_processes("main_process_first")


def sync_processes(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def process_max(number: int) -> int:
    """The largest of the numbers that the processes bring; each must call this at the same step."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def gather_strings(text: str) -> list[str]:
    """Returns the strings of all processes in their order, cut after 256 bytes; a collective call."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    encoded = np.zeros(256, np.uint8)
    characters = np.frombuffer(text.encode()[: len(encoded)], np.uint8)
    encoded[: len(characters)] = characters
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(encoded)]


def _is_one_of_many() -> bool:
    """Whether a cluster's variables describe this process as one of several."""
    under_slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    under_kubernetes = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return under_slurm or under_kubernetes


def _check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> dict[str, Any]:
    """The flags as arguments of `jax.distributed.initialize`."""
    if num_processes is not None and num_processes < 1:
        raise UsageError(f"--num_processes is {num_processes}; expected at least 1")
    if coordinator is None or num_processes is None or process_id is None:
        raise UsageError("--coordinator, --num_processes and --process_id belong together; give all three or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UsageError(f"--coordinator is {coordinator!r}; expected HOST:PORT of the first process")
    if not 0 <= process_id < num_processes:
        raise UsageError(
            f"--process_id is {process_id}; expected 0 to {num_processes - 1} of {num_processes} processes"
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
        "cluster_detection_method": "deactivate",  # under SLURM it would take one device and leave the others
    }


@contextlib.contextmanager
def _time_limit(seconds: int, message: str) -> Iterator[None]:
    """Ends the process with one line when its body takes longer: JAX would abort it, which cannot be caught."""

    def give_up() -> None:
        print(f"error: {message}; start all processes, with one --coordinator that each can reach", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
