"""SIGTERM and Ctrl-C, which stop a run after the current step."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax

from vit_jax.runtime import distributed


@contextlib.contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Yields a list that SIGTERM and Ctrl-C are appended to; a second one has its default effect."""
    received: list[signal.Signals] = []
    usual: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number))
        signal.signal(number, usual[number])
        print("stopping after this step; a checkpoint is being written …", file=sys.stderr)

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError):  # signals can be handled in the main thread only
            usual[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for known, handler in usual.items():
            signal.signal(known, handler)


def stop_requested(signals: list[signal.Signals], *, synchronize: bool) -> signal.Signals | None:
    """Returns the signal that requests a stop, if any; several processes agree on it if they `synchronize`."""
    number = int(signals[0]) if signals else 0  # read once, as a signal can arrive at any time
    number = distributed.process_max(number) if synchronize or jax.process_count() == 1 else 0
    return signal.Signals(number) if number else None
