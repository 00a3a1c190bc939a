"""Default config, which config files override, and helpers for config files.

`python -m vit_jax.config` prints each key with its default, unit, type and range, as declared in
`vit_jax/config/keys.py`.
"""

from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

import vit_jax.config


def get_config(arg: str = "") -> ConfigDict:
    """Returns the defaults; `arg`, of `--config configs/base.py:ARG`, must be empty."""
    check_argument(arg, [""], __file__)
    return vit_jax.config.get_config()


def check_argument(arg: str, arguments: Iterable[str], file: str) -> None:
    """Raises ValueError unless `arg`, of `--config FILE:ARG`, is one of `arguments`."""
    if arg not in arguments:
        raise ValueError(f"configs/{Path(file).name} takes {', '.join(arguments) or 'no argument'}, got {arg!r}")


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Returns the number of whole batches in the training images."""
    return num_images // batch_size
