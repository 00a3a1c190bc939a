"""The config of a run: written, read, and compared on resume."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax.config.keys import DEFAULT_NUM_STEPS, KEYS, check_config, flatten, get_config
from vit_jax.runtime.errors import UsageError, UserError, one_line
from vit_jax.runtime.files import write_atomically


def resume_config(config: ConfigDict, workdir: Path, *, saved: dict[str, Any] | None = None) -> ConfigDict:
    """Returns a copy of the config in which the run's choices replace "auto", accumulation_steps 0 and num_steps.

    For `saved`, see `load_config`.

    Raises:
        UsageError: other keys differ from the run's that must not change on resume.
    """
    config, run_config = config.copy_and_resolve_references(), load_config(workdir, saved=saved)
    _adopt_choices(config, run_config)
    old, new = (flatten(json.loads(json.dumps(each.to_dict()))) for each in (run_config, config))
    fixed = sorted((old.keys() | new.keys()) - {key.name for key in KEYS if key.resumable})
    changes = [f"{name}: {old.get(name)!r} → {new.get(name)!r}" for name in fixed if old.get(name) != new.get(name)]
    if changes:
        raise UsageError(
            f"{workdir} was started with another config ({'; '.join(changes)}); delete it or give another --workdir"
        )
    return config


def _adopt_choices(config: ConfigDict, run_config: ConfigDict) -> None:
    if config.dtype == "auto":
        config.dtype = run_config.dtype
    if config.dataset.test_resize == "auto":
        config.dataset.test_resize = run_config.dataset.test_resize
    if config.num_epochs and config.num_steps in (0, DEFAULT_NUM_STEPS):
        config.num_steps = run_config.num_steps
    if config.accumulation_steps == 0:
        config.accumulation_steps = run_config.accumulation_steps
    if config.model.get("attention", "auto") == "auto" and "attention" in run_config.model:
        config.model.unlock().attention = run_config.model.attention


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir/config.json`."""
    write_atomically(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def load_config(workdir: Path, *, saved: dict[str, Any] | None = None) -> ConfigDict:
    """Loads the config of a run; keys that are newer than the run get their defaults.

    `saved` is the config from a checkpoint, as JSON values; None reads config.json, which has no checksum.
    """
    path, config = workdir / ("config.json" if saved is None else "checkpoints"), get_config()
    config.dataset.test_resize = "squash"  # before the key
    try:
        with config.unlocked():
            config.update(json.loads(path.read_text()) if saved is None else saved)
        check_config(config)
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged, or of another version of vit_jax: {one_line(error)}") from error
    return config
