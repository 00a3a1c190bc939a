"""A run's config: checked key by key, written to `config.json`, and compared with that of the run it resumes."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vit_jax import models
from vit_jax.data import preprocess
from vit_jax.runtime.errors import UsageError, UserError, one_line
from vit_jax.runtime.files import write_atomically
from vit_jax.training import optim

_LARGEST_WHOLE = 2**31 - 1
"""Steps and the like are 32 bits wide on the device."""
_LARGEST_NUMBER = 1e38
"""Of float32, about."""


class _Rule(NamedTuple):
    types: tuple[type, ...]
    expected: str
    holds: Callable[[Any], bool]


def _whole(least: int, most: int = _LARGEST_WHOLE) -> _Rule:
    expected = f"a whole number of at least {least}, at most {most:,}"
    return _Rule((int,), expected, lambda value: least <= value <= most)


def _number(expected: str, holds: Callable[[float], bool]) -> _Rule:
    return _Rule((int, float), expected, lambda value: abs(value) <= _LARGEST_NUMBER and holds(value))


def _one_of(*names: str) -> _Rule:
    return _Rule((str,), "one of " + ", ".join(names), lambda value: value in names)


def _are_shares(values: Any) -> bool:
    return len(values) == 3 and all(isinstance(value, int | float) and 0 <= value <= 1 for value in values)


_TEXT = _Rule((str,), "a text", lambda value: True)
_NAME = _Rule((str,), "a text that is not empty", bool)
_SHARE = _number("a number of at least 0 and below 1", lambda value: 0 <= value < 1)
_NOT_NEGATIVE = _number("a number of at least 0", lambda value: value >= 0)
_FLOATS = _one_of("float32", "bfloat16")

_RULES = {
    "seed": _whole(0),
    "architecture": _one_of(*models.ARCHITECTURES),
    "dtype": _FLOATS,
    "pretrained": _TEXT,
    "dataset.name": _NAME,
    "dataset.data_dir": _TEXT,
    "dataset.train_split": _NAME,
    "dataset.test_split": _NAME,
    "dataset.classes": _Rule(
        (tuple, list), "a tuple of class names", lambda value: all(isinstance(x, str) for x in value)
    ),
    "dataset.storage": _one_of("auto", "memory", "stream"),
    "dataset.num_workers": _whole(0, 1024),
    "image_size": _whole(1, 16_384),
    "image_mean": _Rule((tuple, list), "three numbers from 0 to 1", _are_shares),
    "image_std": _Rule(
        (tuple, list), "three numbers above 0, at most 1", lambda value: _are_shares(value) and min(value) > 0
    ),
    "augment": _one_of(*preprocess.AUGMENTATIONS),
    "test_augment": _one_of(*preprocess.AUGMENTATIONS),
    "trainable": _Rule((str, tuple, list), "a mode's name or a tuple of regular expressions", bool),
    "frozen_dropout": _Rule((bool,), "True or False", lambda value: True),
    "features": _one_of("auto", "cached", "fresh"),
    "feature_views": _whole(1),
    "lora.rank": _whole(1),
    "lora.alpha": _number("a number above 0", lambda value: value > 0),
    "lora.targets": _Rule((tuple, list), "a tuple of regular expressions", bool),
    "optimizer.name": _one_of(*optim.OPTIMIZERS),
    "optimizer.momentum": _SHARE,
    "optimizer.momentum_dtype": _FLOATS,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.decayed": _one_of(*optim.DECAYED),
    "optimizer.layer_decay": _number("a number above 0, at most 1", lambda value: 0 < value <= 1),
    "optimizer.clip_norm": _NOT_NEGATIVE,
    "learning_rate": _NOT_NEGATIVE,
    "schedule": _one_of(*optim.SCHEDULES),
    "schedule_steps": _whole(0),
    "schedule_every_steps": _whole(1),
    "warmup_steps": _whole(0),
    "label_smoothing": _SHARE,
    "mixup_alpha": _NOT_NEGATIVE,
    "cutmix_alpha": _NOT_NEGATIVE,
    "ema_decay": _SHARE,
    "batch_size": _whole(1),
    "eval_batch_size": _whole(1),
    "accumulation_steps": _whole(1),
    "remat": _one_of("none", *models.REMAT_POLICIES),
    "mesh.fsdp": _whole(1),
    "mesh.data": _whole(0),
    "num_steps": _whole(0),
    "log_every_steps": _whole(1),
    "eval_every_steps": _whole(1),
    "checkpoint_every_steps": _whole(1),
}

_ADDED_LATER = {"dataset.storage": "auto", "dataset.num_workers": 0}
"""Keys that runs may be older than, with the value that changes nothing."""

# A run may go on with these changed: they do not touch what it computes.
_FREE = (
    "dataset.data_dir",
    "dataset.num_workers",
    "eval_batch_size",
    "remat",
    "mesh.fsdp",
    "mesh.data",
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_steps",
)


def check_config(config: ConfigDict) -> None:
    """Checks every key's presence, type and range, as far as that needs neither data nor model.

    Raises:
        UsageError: names the first key that is wrong, what was got and what was expected.
    """
    flat = _flatten(config.to_dict())
    for key in flat:
        if key not in _RULES and not key.startswith("model."):
            near = difflib.get_close_matches(key, _RULES, n=1)
            raise UsageError(f"config.{key}: no such key" + (f"; did you mean config.{near[0]}?" if near else ""))
    for key in _RULES:
        if key not in flat:
            raise UsageError(f"config.{key} is missing: start from configs/base.py, which holds every key")
        wrong = complaint(key, flat[key])
        if wrong:
            raise UsageError(f"config.{wrong}")
    optim.trainable_patterns(config.trainable)
    optim.check_patterns(config.lora.targets, key="lora.targets")
    if config.batch_size % config.accumulation_steps:
        raise UsageError(
            f"config.batch_size {config.batch_size} does not divide into {config.accumulation_steps} accumulation_steps"
        )
    if config.warmup_steps > config.num_steps:
        raise UsageError(f"config.warmup_steps {config.warmup_steps} is above num_steps {config.num_steps}")
    if config.num_steps == config.warmup_steps == 1:
        raise UsageError(
            "config.num_steps and warmup_steps are both 1, so that the only update has learning rate 0; "
            "set warmup_steps to 0"
        )
    if 0 < config.schedule_steps <= config.warmup_steps:
        raise UsageError(
            f"config.schedule_steps {config.schedule_steps} is not above warmup_steps {config.warmup_steps}, so that "
            "the learning rate is 0 after its peak; raise schedule_steps, or set it to 0 to decay until num_steps"
        )


def complaint(key: str, value: Any) -> str:
    """What is wrong with the type or range of one key's value; empty where it is right."""
    rule = _RULES[key]
    if isinstance(value, rule.types) and isinstance(value, bool) == (bool in rule.types) and rule.holds(value):
        return ""
    return f"{key} is {value!r}; expected {rule.expected}"


def check_same(config: ConfigDict, workdir: Path, *, saved: dict[str, Any] | None = None) -> None:
    """Compares a config with the one that a workdir was started with.

    Args:
        config: to resume with.
        workdir: of the run.
        saved: the config in the latest checkpoint, as JSON values; None reads config.json.

    Raises:
        UsageError: something that matters differs; the message is the difference.
        UserError: the run's own config cannot be read.
    """
    old_config = load_config(workdir) if saved is None else _complete(saved, workdir / "checkpoints")
    old, new = _flatten(old_config.to_dict()), _flatten(json.loads(json.dumps(config.to_dict())))
    keys = [key for key in sorted(old.keys() | new.keys()) if key not in _FREE and old.get(key) != new.get(key)]
    if keys:
        changes = "; ".join(f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in keys)
        raise UsageError(
            f"{workdir} belongs to a run with another config ({changes}); "
            "give another --workdir, or delete this one to start afresh"
        )


def save_config(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir/config.json`."""
    write_atomically(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")


def load_config(workdir: Path, *, saved: dict[str, Any] | None = None) -> ConfigDict:
    """Reads `workdir/config.json`; keys that were added after the run was started get their neutral values.

    Args:
        workdir: of the run.
        saved: the config in a checkpoint, as JSON values; replaces a config.json that is missing or damaged.

    Raises:
        UserError: it is missing, not JSON, or lacks keys.
    """
    path = workdir / "config.json"
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError as error:
        if saved is None:
            raise UserError(
                f"{path} is missing, and the checkpoint, of an older version, does not hold the config; "
                "put the file back, or give another --workdir"
            ) from error
        tree = saved
    except (ValueError, OSError) as error:
        if saved is None:
            raise UserError(f"{path} could not be read: {one_line(error)}; give the --workdir of a run") from error
        tree = saved
    return _complete(tree, path)


def _complete(tree: Any, path: Path) -> ConfigDict:
    """A config from JSON, with the keys that were added after it was written.

    Raises:
        UserError: it lacks other keys; the message names `path`, where it was read.
    """
    flat = _ADDED_LATER | (_flatten(tree) if isinstance(tree, dict) else {})
    missing = [key for key in _RULES if key not in flat]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing[:3])}: it is damaged, or no run's; give the --workdir of a run"
        )
    config = ConfigDict(tree)
    for key in _ADDED_LATER:
        parent, _, name = key.rpartition(".")
        (config[parent] if parent else config)[name] = flat[key]
    return config


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries -> one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
