"""Progress bars."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

_DELAY_SECONDS = 2.0
_MIN_INTERVAL_SECONDS = 30.0
"""Of bars in a log file; on a terminal they are drawn ten times a second."""


def progress_bar(iterable: Iterable[T] | None = None, **options: object) -> "tqdm[T]":
    """Returns a bar on stderr that appears after two seconds of work, and is removed at the end.

    Args:
        iterable: counted by the bar.
        **options: of `tqdm.tqdm`.
    """
    from tqdm import tqdm  # reads $TQDM_DISABLE, which all processes but the main one set

    interval = 0.1 if sys.stderr.isatty() else _MIN_INTERVAL_SECONDS
    return tqdm(iterable, **{"delay": _DELAY_SECONDS, "leave": False, "mininterval": interval, **options})
