"""Orbax checkpoints with checksums; the latest and the best are kept.

A checkpoint is the directory `checkpoints/<step>`. Its items are `params` (the model's parameters, named as in the
pretrained checkpoints, and LoRA weights), `ema` (EMA parameters, if any), `training` (the rest of the `TrainState`) and
`metadata`: JSON of the caller's metadata, the accuracy on validation or test, and dtype, shape and checksum of every
array.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from orbax.checkpoint import checkpoint_managers as managers

from vit_jax.runtime import distributed
from vit_jax.runtime.checksums import checksum_json, checksums, mismatches
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.runtime.event_loops import patient_event_loops
from vit_jax.training import optim
from vit_jax.training.steps import TrainState
from vit_jax.types import Json, Params

# Errors of the file system, after which a checkpoint may still be intact.
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
_Types = dict[str, list[Json]]  # name of an array, "<item>/<path>" -> [dtype, shape]


class _Content(TypedDict):
    """Content of the item `metadata`, without its "crc32"."""

    step: int
    accuracy: float | None
    types: _Types
    checksums: dict[str, str]
    metadata: dict[str, Json]


class Checkpoints:
    """The checkpoints of one run; a context manager. Damaged files and failed saves raise UserError.

    Args:
        workdir: run directory; the first save creates `workdir/checkpoints`.
        read_only: do not save, and keep leftover files of a killed save.
    """

    def __init__(self, workdir: Path, *, read_only: bool = False):
        self._workdir = workdir
        self._directory = workdir.absolute() / "checkpoints"
        self._unfinished: set[int] = set()
        if read_only:
            return
        if distributed.is_main_process():
            # Orbax cleans up in a thread, which logs errors if the run fails first.
            _remove_half_written(self._directory)
        distributed.sync_processes("removed half-written checkpoints")
        if self._accuracies:
            with self._saving():
                _ = self._manager  # fails now rather than after training

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """Waits for the last save; raises UserError if it failed, unless another error is being raised."""
        with contextlib.suppress(UserError) if error else contextlib.nullcontext():
            self.finish()
        if "_manager" in self.__dict__:
            with contextlib.suppress(Exception):  # of a save that failed before
                self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints in ascending order, including one that is being saved."""
        finished = {int(path.name) for path in self._directory.glob("*") if path.name.isdecimal()}
        return sorted(finished | self._unfinished)

    def latest_step(self) -> int | None:
        """Returns the step that a run resumes from; None if there are no checkpoints."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step with the highest accuracy, the later of equals; None if no accuracy was measured."""
        return _best_step(self._accuracies, self.steps())

    def best_accuracy(self) -> float | None:
        """Returns the accuracy of `best_step`; None if no accuracy was measured."""
        best = self.best_step()
        return None if best is None else self._accuracies[best]

    def require_step(self, step: int | Literal["best"] | None = None) -> int:
        """Returns `step`, the best or, for None, the latest; raises UserError if there is no such checkpoint."""
        steps = self.steps()
        if steps and step == "best":
            step = self.best_step()
            if step is None:
                known = ", ".join(map(str, steps))
                raise UserError(f"{self._workdir} has no evaluated checkpoint; give one of the steps {known}")
        if steps and step in (None, *steps):
            return steps[-1] if step is None else step
        found = f"has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        nothing = "has no checkpoints; give the --workdir of a run that has saved one"
        raise UserError(f"{self._workdir} {found if steps else nothing}")

    def save(self, step: int, state: TrainState, metadata: dict[str, Json], *, accuracy: float | None) -> None:
        """Starts saving a state and any metadata; its arrays may be donated, and `finish` waits until it is on disk.

        `accuracy` is that on validation or test, if measured; it determines the best checkpoint.
        """
        items = _items(state)
        content = _Content(
            step=step, accuracy=accuracy, types=_types(items), checksums=checksums(items), metadata=metadata
        )
        saves = {item: ocp.args.StandardSave(tree) for item, tree in items.items()}
        saves["metadata"] = ocp.args.JsonSave({**content, "crc32": checksum_json(content)})
        self._accuracies[step] = accuracy
        with self._saving():
            manager = self._manager
            needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self._directory).free
            if free < needed:  # a full disk would also break the metrics
                raise OSError(f"it needs {needed:,} bytes, the disk has {free:,} left")
            manager.save(step, args=ocp.args.Composite(**saves), force=True)
            self._unfinished = {step}

    def finish(self) -> None:
        """Waits until the last save is on disk."""
        if "_manager" in self.__dict__:
            with self._saving():
                self._manager.wait_until_finished()
            self._unfinished = set()

    def read_metadata(self, step: int) -> dict[str, Json]:
        """Returns the metadata given to `save`."""
        return self._read_content(step)["metadata"]

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """Restores a state to the shardings of `abstract_state`, whose leaves are `jax.ShapeDtypeStruct`."""
        content, items = self._read_content(step), _items(abstract_state)
        for name, expected in _types(items).items():
            found = content["types"].get(name, ["missing"])
            if found != expected:
                raise UserError(
                    f"{self._directory / str(step)} is of another model or optimizer: {name} is "
                    f"{' '.join(map(str, found))}, expected {' '.join(map(str, expected))}; give another --workdir"
                )
        items = self._read_arrays(step, items, content)
        flat = flatten_dict(items["params"])
        restored = {
            name: unflatten_dict({path: flat[path] for path in flatten_dict(getattr(abstract_state, name))})
            for name in ("trainable", "frozen")
        }
        return TrainState(**restored, ema=items.get("ema", {}), **items["training"])

    def restore_params(
        self, step: int, sharding: NamedSharding, *, use_ema: bool = True
    ) -> tuple[Params, dict[str, Json]]:
        """Restores only the parameters, including LoRA weights, and the metadata.

        With `use_ema`, EMA parameters, if any, replace the trained parameters.
        """
        content, wanted = self._read_content(step), ("params", "ema") if use_ema else ("params",)
        leaves = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, (dtype, shape) in content["types"].items()
            if name.split("/")[0] in wanted
        }
        items = self._read_arrays(step, unflatten_dict(leaves, sep="/"), content)
        return optim.merge_params(items.get("ema", {}), items["params"]), content["metadata"]

    @functools.cached_property
    def _accuracies(self) -> dict[int, float | None]:
        """Accuracy of each checkpoint, and of those deleted since."""
        return {step: self._read_content(step)["accuracy"] for step in self.steps()}

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, which keeps the latest and the best; created lazily, as it creates the directory."""
        options = ocp.CheckpointManagerOptions(preservation_policy=_LatestAndBest(self._accuracies))
        return ocp.CheckpointManager(self._directory, options=options)

    def _read_content(self, step: int) -> _Content:
        with self._reading(step, "metadata"):
            return _load_content(self._directory / str(step))

    def _read_arrays(self, step: int, items: Params, content: _Content) -> Params:
        arrays = {}
        for item, tree in items.items():
            handler = ocp.StandardCheckpointHandler()
            with self._reading(step, item), patient_event_loops(), ocp.Checkpointer(handler) as checkpointer:
                path = self._directory / str(step) / item
                arrays[item] = checkpointer.restore(path, args=ocp.args.StandardRestore(tree))
                _verify(item, arrays[item], content)
        return arrays

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Converts errors of Orbax and TensorStore to UserError, and removes the files of a failed save."""
        try:
            yield
        except Exception as error:
            _remove_half_written(self._directory)
            self._unfinished = set()
            last = self.latest_step()
            kept = "none was saved before" if last is None else f"the last good one is step {last}"
            reason = one_line(error)[:200]
            advice = "free some space and " if re.search("No space|the disk has", reason) else ""
            raise UserError(
                f"the checkpoint could not be written to {self._directory} ({reason}); {kept}; "
                f"{advice}rerun the same command"
            ) from error

    @contextlib.contextmanager
    def _reading(self, step: int, item: str) -> Iterator[None]:
        """Converts errors of Orbax, TensorStore and JSON, as for damaged files, to UserError."""
        path = self._directory / str(step)
        try:
            yield
        except Exception as error:
            reason = one_line(error)[:200]
            if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
                raise UserError(f"out of memory while reading {path / item}: {reason}") from error
            if isinstance(error, OSError) and error.errno in _UNREADABLE:
                raise UserError(f"cannot read {path / item}: {reason}; check the file system and rerun") from error
            intact = [str(other) for other in self.steps() if other != step and _is_intact(path.with_name(str(other)))]
            advice = "no other checkpoint is intact; start again in another --workdir"
            if intact:
                advice = f"intact steps: {', '.join(intact)}; delete {path} and rerun to resume from step {intact[-1]}"
            raise UserError(f"{path / item} is damaged or of another version ({reason}); {advice}") from error


@dataclasses.dataclass
class _LatestAndBest:
    """Keeps the latest checkpoint and the best one."""

    accuracies: Mapping[int, float | None]  # by step

    def should_preserve(
        self, checkpoints: Sequence[managers.PolicyCheckpointInfo], *, context: object
    ) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]  # ascending
        return [step in (steps[-1], _best_step(self.accuracies, steps)) for step in steps]


def _best_step(accuracies: Mapping[int, float | None], steps: Sequence[int]) -> int | None:
    """Returns the step with the highest accuracy, the later of equals; None if no accuracy was measured."""
    measured = [(accuracy, step) for step in steps if (accuracy := accuracies.get(step)) is not None]
    return max(measured)[1] if measured else None


def _items(state: TrainState) -> Params:
    """Returns the non-empty items of a checkpoint of a state."""
    names = ("step", "opt_state", "key", "first_nonfinite_step")
    items = {
        "params": optim.merge_params(state.trainable, state.frozen),
        "ema": state.ema,
        "training": {name: getattr(state, name) for name in names},
    }
    return {name: tree for name, tree in items.items() if tree}


def _types(items: Params) -> _Types:
    leaves = jax.tree_util.tree_leaves_with_path(items)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {name(path): [leaf.dtype.name, list(leaf.shape)] for path, leaf in leaves}


def _load_content(path: Path) -> _Content:
    """Loads the item `metadata` of a checkpoint; raises any exception if it is damaged."""
    content = json.loads((path / "metadata" / "metadata").read_text())
    if content.pop("crc32") != checksum_json(content) or str(content["step"]) != path.name:
        raise ValueError("wrong checksum of the metadata")
    return cast(_Content, content)


def _verify(item: str, arrays: Params, content: _Content) -> None:
    expected = {name: crc32 for name, crc32 in content["checksums"].items() if name.startswith(f"{item}/")}
    if wrong := mismatches({item: arrays}, expected):
        raise ValueError(f"wrong checksum of {', '.join(wrong[:3])}{', …' * (len(wrong) > 3)}")


def _is_intact(path: Path) -> bool:
    """Returns True if a checkpoint can be read; with several processes, reads only its metadata."""
    try:
        content = _load_content(path)
        items = {name.split("/")[0] for name in content["types"]} if jax.process_count() == 1 else ()
        with patient_event_loops(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            for item in items:
                types = checkpointer.metadata(path / item).item_metadata.tree
                on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), types)
                arrays = checkpointer.restore(path / item, args=ocp.args.PyTreeRestore(restore_args=on_host))
                _verify(item, arrays, content)
    except Exception:
        return False
    return True


def _remove_half_written(directory: Path) -> None:
    """Removes leftover files of killed or failed saves."""
    for path in filter(ocp.utils.is_tmp_checkpoint, directory.glob("*")):
        shutil.rmtree(path, ignore_errors=True)
