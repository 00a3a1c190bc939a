"""Ends all processes of a run, each with one line on stderr, when one of them fails or is killed."""

import contextlib
import functools
import itertools
import os
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the key-value store has no public name

from vit_jax.runtime.errors import one_line, run_command

SILENT_SECONDS = 30
"""A process that writes nothing for this long is considered dead; JAX's own limit is 100 seconds."""
_ADVICE = "rerun the same command to resume from the last checkpoint"
_LOST_PEER = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED")
"""Words of errors that JAX raises when another process is gone."""


class Watch:
    """Ends this process when another one fails or dies; by itself JAX would hang, then abort with a C++ stack.

    To be created after `jax.distributed.initialize`. A thread writes to the key-value store that process 0 hosts, and
    reads there about the others: `vit_jax/alive/ID` is a counter, `vit_jax/end/ID` says how a process ended. Where
    process 0 is killed, JAX itself aborts the others at once.
    """

    def __init__(self) -> None:
        self._state: Any = distributed.global_state
        self._stopped = threading.Event()
        self._ending = threading.Lock()  # held by the thread that ends this process
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Waits until every process has called this, so that none can fail any more, and stops the thread."""
        self._write_end("done")
        while self._read_ends().count("done") < self._state.num_processes:
            time.sleep(0.1)
        self._stopped.set()
        self._thread.join()  # Python must not end while a thread is inside JAX

    def fail(self, error: BaseException) -> NoReturn:
        """Ends all processes; reports the error as `run_command` does, or a bug with its traceback."""
        if isinstance(error, RuntimeError | ValueError) and any(word in str(error) for word in _LOST_PEER):
            time.sleep(SILENT_SECONDS + 10)  # until the thread ends this process and says which one is gone
        self._ending.acquire()
        how = "was interrupted" if isinstance(error, KeyboardInterrupt) else f"failed: {one_line(error)[:300]}"
        trace = traceback.format_exc()
        try:
            code = run_command(functools.partial(_throw, error))
        except Exception:
            print(trace, end="", file=sys.stderr)
            code, how = 1, f"failed: {type(error).__name__}: {one_line(error)[:300]}"
        self._exit(code, how)

    def _run(self) -> None:
        count = self._state.num_processes
        last_beats: dict[int, str] = {}
        last_seen = dict.fromkeys(range(count), time.monotonic())
        for beat in itertools.count():
            try:
                key = f"vit_jax/alive/{self._state.process_id}"
                self._state.client.key_value_set(key, str(beat), allow_overwrite=True)
                beats, ends = self._read("alive"), self._read("end")
            except jax.errors.JaxRuntimeError:
                self._give_up(f"process 0 of {count} cannot be reached")
            now = time.monotonic()
            for number in range(count):
                if beats.get(number) != last_beats.get(number):
                    last_seen[number] = now
                if ends.get(number, "done") != "done":
                    self._give_up(f"process {number} of {count} {ends[number]}")
                if number not in ends and now - last_seen[number] > SILENT_SECONDS:
                    self._give_up(f"process {number} of {count} has not responded for {SILENT_SECONDS} seconds")
            last_beats = beats
            if self._stopped.wait(1):
                return

    def _give_up(self, reason: str) -> None:
        time.sleep(2)  # this process may have the same error, and reports it itself
        if not self._ending.acquire(blocking=False):
            sys.exit()  # this thread only
        print(f"error: {reason}; {_ADVICE}", file=sys.stderr)
        self._exit(1, f"ended because {reason}")

    def _exit(self, code: int, how: str) -> NoReturn:
        """Ends this process without JAX's shutdown, which waits for processes that wait for this one."""
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # process 0, which has the store, may be gone
            self._write_end(how)
            deadline = time.monotonic() + 10
            while self._num_failed() < self._state.num_processes and time.monotonic() < deadline:
                time.sleep(0.1)  # without this process the others would fail, too, each in its own way
            if self._state.process_id == 0:
                time.sleep(1)  # JAX aborts a process that has lost its coordinator
        os._exit(code)

    def _num_failed(self) -> int:
        return sum(how != "done" for how in self._read_ends())

    def _write_end(self, how: str) -> None:
        self._state.client.key_value_set(f"vit_jax/end/{self._state.process_id}", how, allow_overwrite=True)

    def _read_ends(self) -> list[str]:
        return list(self._read("end").values())

    def _read(self, name: str) -> dict[int, str]:
        """Process -> its value of a key."""
        entries = self._state.client.key_value_dir_get(f"vit_jax/{name}/")
        return {int(key.rsplit("/", 1)[1]): value for key, value in entries}


def _throw(error: BaseException) -> NoReturn:
    raise error
