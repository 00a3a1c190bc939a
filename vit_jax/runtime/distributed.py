"""Multi-process runs: initialization, synchronization, collectives and failure detection."""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
import numpy as np
from jax._src.distributed import global_state  # its key-value store has no public name
from jax.experimental import multihost_utils

from vit_jax.runtime import resources
from vit_jax.runtime.errors import UsageError, UserError, one_line, report_error

SILENT_SECONDS = 30  # a process that publishes nothing for this long is considered dead; JAX's own limit is 100
_LOST_PEER = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")  # in JAX's errors if another process is gone


@contextlib.contextmanager
def initialize_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    wait_seconds: int = 300,
) -> Iterator[None]:
    """Connects the processes of a run; must be entered before any other use of JAX.

    Without arguments, the tasks of a SLURM step or the pods of an indexed Kubernetes job are detected; any other run
    has one process. Only the main process prints. If a process fails or is killed, the others exit within a minute
    with code 1 and one line that names it; a process also exits if the others do not connect in `wait_seconds`.

    Args:
        coordinator: "host:port" of process 0, which listens there.
        num_processes: number of processes; 1 disables detection.
        process_id: index of this process, from 0.
        wait_seconds: timeout for the connection.
    """
    detect = coordinator is None and num_processes is None and process_id is None
    if num_processes == 1 or (detect and not resources.is_cluster_job()):
        yield
        return
    if not detect:
        _check_flags(coordinator, num_processes, process_id)
    timer = threading.Timer(wait_seconds, _give_up, [wait_seconds])  # JAX would abort with a C++ stack trace
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if detect else "deactivate",  # SLURM detection would use one device only
            initialization_timeout=wait_seconds + 60,
            shutdown_timeout_seconds=wait_seconds,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"cannot connect to the other processes ({one_line(error)[:300]}); give --coordinator, --num_processes "
            "and --process_id, or on Kubernetes pip install 'jax[k8s]'"
        ) from error
    finally:
        timer.cancel()
    watch = _Watch()
    try:
        with contextlib.nullcontext() if is_main_process() else _silence():
            num_local = jax.local_device_count()
            print(f"{jax.process_count()} processes, {jax.device_count()} devices, {num_local} of them local")
            yield
        watch.leave()
    except (Exception, KeyboardInterrupt) as error:
        watch.fail(error)


def is_main_process() -> bool:
    """Returns True for process 0, which prints and writes metrics and figures."""
    return jax.process_index() == 0


@contextlib.contextmanager
def main_process_first() -> Iterator[None]:
    """Runs the body in the main process first, so that the others find its downloads."""
    if not is_main_process():
        sync_processes("main_process_first")
    try:
        yield
    finally:
        if is_main_process():
            sync_processes("main_process_first")


def sync_processes(name: str) -> None:
    """Waits until every process has called this."""
    multihost_utils.sync_global_devices(name)


def process_max(number: int) -> int:
    """Returns the maximum over all processes; a collective call."""
    return int(np.max(multihost_utils.process_allgather(np.int32(number)))) if jax.process_count() > 1 else number


def gather_strings(text: str) -> list[str]:
    """Returns the strings of all processes in order, truncated to 256 bytes; a collective call."""
    encoded = np.frombuffer(text.encode()[:256].ljust(256, b"\0"), np.uint8)
    gathered = np.reshape(multihost_utils.process_allgather(encoded), (jax.process_count(), 256))
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in gathered]


def _check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    is_address = re.fullmatch(r".+:\d+", coordinator or "")
    if not is_address or num_processes is None or process_id is None or not 0 <= process_id < num_processes:
        raise UsageError(
            f"--coordinator is {coordinator}, --num_processes {num_processes}, --process_id {process_id}; expected "
            "HOST:PORT of process 0, a positive integer, and this process's index from 0; give all three or none"
        )


def _give_up(wait_seconds: int) -> NoReturn:
    advice = "start all of them, with the same --coordinator, which each can reach"
    print(f"error: waited {wait_seconds} seconds for the other processes; {advice}", file=sys.stderr, flush=True)
    os._exit(1)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        yield


class _Watch:
    """Ends this process when another one fails or dies; JAX itself would hang, then abort with a C++ stack trace.

    Twice a second, a thread publishes the time and the status of this process in the key-value store of process 0, and
    reads those of all processes. A status is "running", "done", or "failed: …".
    """

    def __init__(self) -> None:
        self._status, self._exit_code = "running", 1
        self._failing = threading.Lock()  # acquired once, by the thread that reports why this process ends
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Waits until every process has called this, so that none can fail afterwards."""
        self._status = "done"
        self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Reports an error as `run_command` does, or a bug with its traceback; ends all processes."""
        if isinstance(error, RuntimeError | ValueError) and any(word in str(error) for word in _LOST_PEER):
            time.sleep(SILENT_SECONDS + 10)  # the thread ends this process and names the one that is gone
        if self._failing.acquire(blocking=False):
            code, reason = report_error(error), one_line(error)
            if code is None:
                traceback.print_exception(error)
                reason = f"{type(error).__name__}: {reason}"
            self._exit_code, self._status = code or 1, f"failed: {reason[:300]}"
        self._thread.join()  # it ends this process; it returns only after `leave`
        os._exit(self._exit_code)

    def _run(self) -> None:
        count = jax.process_count()
        seen = dict.fromkeys(range(count), ("", time.monotonic()))  # process -> (its last value, when it was new)
        while not all(value.endswith(" done") for value, _ in seen.values()):
            time.sleep(0.5)
            for process, value in self._exchange().items():
                if value != seen[process][0]:
                    seen[process] = value, time.monotonic()
            ends = {process: end for process, pair in seen.items() if (end := _describe_end(*pair))}
            for process, end in ends.items():
                self._report(f"process {process} of {count} {end}")
            if len(ends) == count:
                self._exit()

    def _exchange(self) -> dict[int, str]:
        """Publishes the time and the status of this process; returns {process: published value}."""
        assert global_state.client is not None
        try:
            key, value = f"vit_jax/{jax.process_index()}", f"{time.monotonic()} {self._status}"
            global_state.client.key_value_set(key, value, allow_overwrite=True)
            values = global_state.client.key_value_dir_get("vit_jax/")
        except jax.errors.JaxRuntimeError:
            self._report("process 0 cannot be reached")
            self._exit()
        return {int(key.rpartition("/")[2]): value for key, value in values}

    def _report(self, reason: str) -> None:
        if not self._failing.locked():
            time.sleep(2)  # this process may have the same error, and reports it itself
        if self._failing.acquire(blocking=False):
            print(f"error: {reason}; rerun the same command to resume from the last checkpoint", file=sys.stderr)
            self._status = f"ended because {reason}"

    def _exit(self) -> NoReturn:
        """Ends this process without JAX's shutdown, which waits for the other processes."""
        if is_main_process():
            time.sleep(1)  # JAX aborts a process that has lost its coordinator
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(self._exit_code)


def _describe_end(value: str, changed: float) -> str:
    """Describes how a process failed, from its last published value; "" if it is running or done."""
    if time.monotonic() - changed > SILENT_SECONDS:
        return f"has not responded for {SILENT_SECONDS} seconds"
    status = value.partition(" ")[2]
    return "" if status in ("", "running", "done") else status
