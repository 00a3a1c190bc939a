"""Progress bars."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

_DELAY_SECONDS = 2.0


def progress_bar(iterable: Iterable[T] | None = None, **options: object) -> "tqdm[T]":
    """Creates a progress bar on stderr that appears after two seconds and is removed at the end.

    `options` are those of `tqdm.tqdm`. It is updated ten times per second in a terminal, else every 30 seconds.
    """
    from tqdm import tqdm  # reads $TQDM_DISABLE, which all processes but the main one set

    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(iterable, **{"delay": _DELAY_SECONDS, "leave": False, "mininterval": interval, **options})
