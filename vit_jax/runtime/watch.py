"""Ends all processes of a run, each with one line on stderr, when one of them fails or is killed."""

import contextlib
import os
import sys
import threading
import time
import traceback
from typing import NoReturn

import jax
from jax._src import distributed  # the key-value store has no public name

from vit_jax.runtime.errors import one_line, report_error

SILENT_SECONDS = 30
"""A process that publishes nothing for this long is considered dead; JAX's own limit is 100 seconds."""
_LOST_PEER = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Words of errors that JAX raises when another process is gone."""


class Watch:
    """Ends this process when another one fails or dies; JAX itself would hang, then abort with a C++ stack trace.

    To be created after `jax.distributed.initialize`. Twice a second a thread writes the time and the status of this
    process to the key-value store of process 0, and reads those of all: "running", "done", or "failed: …". When
    process 0 is killed, JAX itself aborts the others at once.
    """

    def __init__(self) -> None:
        self._status, self._exit_code = "running", 1
        self._failing = threading.Lock()  # acquired once, by the thread that reports why this process ends
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Returns when every process has called this, so that none can fail any more."""
        self._status = "done"
        self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """Reports an error as `run_command` does, or a bug with its traceback, and ends all processes."""
        if isinstance(error, RuntimeError | ValueError) and any(word in str(error) for word in _LOST_PEER):
            time.sleep(SILENT_SECONDS + 10)  # until the thread ends this process and names the one that is gone
        if self._failing.acquire(blocking=False):
            code, reason = report_error(error), one_line(error)
            if code is None:
                traceback.print_exception(error)
                code, reason = 1, f"{type(error).__name__}: {reason}"
            self._exit_code, self._status = code, f"failed: {reason[:300]}"
        self._thread.join()  # it ends this process; only after `leave` it may have returned
        os._exit(self._exit_code)

    def _run(self) -> None:
        count = jax.process_count()
        values, last_changes = [""] * count, [time.monotonic()] * count
        while True:
            for process, value in self._exchange().items():
                if values[process] != value:
                    values[process], last_changes[process] = value, time.monotonic()
            ends = [_describe_end(*pair) for pair in zip(values, last_changes, strict=True)]
            for process, end in enumerate(ends):
                if end:
                    self._report(f"process {process} of {count} {end}")
            if all(ends):
                self._exit()
            if all(value.endswith(" done") for value in values):
                return
            time.sleep(0.5)

    def _exchange(self) -> dict[int, str]:
        """Publishes the status of this process; returns the time and status of each."""
        client = distributed.global_state.client
        assert client is not None
        try:
            key = f"vit_jax/{jax.process_index()}"
            client.key_value_set(key, f"{time.monotonic()} {self._status}", allow_overwrite=True)
            return {int(key.rpartition("/")[2]): value for key, value in client.key_value_dir_get("vit_jax/")}
        except jax.errors.JaxRuntimeError:
            self._report("process 0 cannot be reached")
            self._exit()

    def _report(self, reason: str) -> None:
        """Prints why this process ends, unless that has been reported."""
        if self._failing.locked():
            return
        time.sleep(2)  # this process may have the same error, and reports it itself
        if self._failing.acquire(blocking=False):
            print(f"error: {reason}; rerun the same command to resume from the last checkpoint", file=sys.stderr)
            self._status = f"ended because {reason}"

    def _exit(self) -> NoReturn:
        """Ends this process without JAX's shutdown, which waits for the other processes."""
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(1)  # JAX aborts a process that has lost its coordinator
        os._exit(self._exit_code)


def _describe_end(value: str, last_change: float) -> str:
    """Returns how a process ended, by what it has published; "" while it is running or done."""
    if time.monotonic() - last_change > SILENT_SECONDS:
        return f"has not responded for {SILENT_SECONDS} seconds"
    status = value.partition(" ")[2]
    return "" if status in ("", "running", "done") else status
