"""Progress bars of long work."""

import sys
from typing import Any

_DELAY_SECONDS = 2.0


def progress_bar(*arguments: Any, **options: Any) -> Any:
    """A bar on stderr that shows itself only where the work takes long, and goes when it is done.

    Where nobody watches it is a line every half minute and not ten a second.

    Args:
        *arguments: of `tqdm.tqdm`.
        **options: of `tqdm.tqdm`.
    """
    from tqdm import tqdm  # when a bar is made: a process of several may have turned bars off by then

    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(*arguments, **{"delay": _DELAY_SECONDS, "leave": False, "mininterval": interval, **options})
