"""Checkpoints through Orbax: the latest and the best are kept, and a broken save never replaces a good one.

A checkpoint of step k is the folder `checkpoints/k` of items: `params` (the model's whole tree, names as in the
released files, and low-rank factors where they train), `ema` (averages of what trains, where they are kept), `training`
(everything else a run needs to go on) and `about` (JSON: metadata of the model, and the config of the run).
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding
from orbax.checkpoint import checkpoint_managers as managers

from vit_jax.runtime import distributed
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.runtime.sharding import with_sharding
from vit_jax.training import optim
from vit_jax.training.steps import TrainState
from vit_jax.types import Params

_ACCURACY = "test/accuracy"
# What Orbax and TensorStore raise for a disk that is full or fails, and for a checkpoint that is damaged.
_STORAGE_ERRORS = (OSError, ValueError, RuntimeError, KeyError)


def open_manager(workdir: Path, *, read_only: bool = False) -> ocp.CheckpointManager:
    """The manager of `workdir/checkpoints`; remains of a killed save are removed unless `read_only`."""
    directory = workdir.absolute() / "checkpoints"
    if not read_only and directory.exists() and distributed.is_main_process():
        # Orbax's own cleaning is a thread that complains if an error ends the run first.
        _remove_half_written(directory)
    distributed.sync_processes("half-written checkpoints are gone")
    best = managers.BestN(get_metric_fn=lambda metrics: metrics[_ACCURACY], n=1, keep_checkpoints_without_metrics=False)
    options = ocp.CheckpointManagerOptions(
        # Either policy may keep a step; `max_to_keep` together with `best_fn` would delete the latest one.
        preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(1), best]),
        best_fn=lambda metrics: metrics[_ACCURACY],
        best_mode="max",
        create=not read_only,
        read_only=read_only,
    )
    handlers = {
        "params": ocp.StandardCheckpointHandler(),
        "ema": ocp.StandardCheckpointHandler(),
        "training": ocp.StandardCheckpointHandler(),
        "about": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def latest_step(workdir: Path) -> int | None:
    """The step that a run in `workdir` would go on from; None where it would start."""
    if not (workdir / "checkpoints").is_dir():
        return None
    with open_manager(workdir, read_only=True) as manager:
        return manager.latest_step()


def require_step(workdir: Path) -> int:
    """Returns the step of the latest checkpoint of a run.

    Raises:
        UserError: there is no checkpoint.
    """
    step = latest_step(workdir)
    if step is None:
        raise UserError(f"{workdir} holds no run with a checkpoint; give the --workdir of a run that has saved one")
    return step


def read_about(workdir: Path) -> dict[str, Any]:
    """Reads the metadata in the latest checkpoint of a run: the JSON given to `save`.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    step = require_step(workdir)
    with open_manager(workdir, read_only=True) as manager:
        return _restore(manager, step, {})["about"]


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState, about: dict[str, Any], *, accuracy: float | None
) -> None:
    """Saves the state under its step; writing goes on in the background, `finish` waits for it.

    Args:
        manager: of the run.
        step: that of the state.
        state: its arrays may be donated as soon as this returns.
        about: metadata as JSON values: of the model, and under "config" the config of the run.
        accuracy: on the test split after this step, where it was measured: what "best" means.

    Raises:
        UserError: this save, or the one before it, could not be written.
    """
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
    items = ocp.args.Composite(**arrays, about=ocp.args.JsonSave(about))
    metrics = None if accuracy is None else {_ACCURACY: accuracy}
    _check_space(manager, state)
    try:
        manager.save(step, args=items, metrics=metrics, force=True)
    except _STORAGE_ERRORS as error:
        raise _save_error(manager, error) from error


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until the last save is on disk.

    Raises:
        UserError: it could not be written.
    """
    try:
        manager.wait_until_finished()
    except _STORAGE_ERRORS as error:
        raise _save_error(manager, error) from error


def restore(manager: ocp.CheckpointManager, state: TrainState, step: int) -> TrainState:
    """Reads a whole checkpoint onto the devices that `state` names, however many wrote it.

    Args:
        manager: of the run.
        state: structure, shapes, dtypes and places; leaves are `jax.ShapeDtypeStruct` with shardings.
        step: which checkpoint.

    Raises:
        UserError: the checkpoint is damaged, or its arrays have other names or shapes.
    """
    wanted = _items(state)
    for item, tree in wanted.items():
        _check_shapes(tree, manager.item_metadata(step)[item], manager.directory / str(step) / item)
    items = _restore(manager, step, wanted)
    flat = flatten_dict(items["params"])
    trainable, frozen = (
        unflatten_dict({path: flat[path] for path in flatten_dict(part)}) for part in (state.trainable, state.frozen)
    )
    return TrainState(trainable=trainable, frozen=frozen, ema=items.get("ema", {}), **items["training"])


def restore_params(
    manager: ocp.CheckpointManager, step: int, sharding: NamedSharding, *, use_ema: bool = True
) -> tuple[Params, dict[str, Any]]:
    """Reads the parameters alone, and what they are.

    Args:
        manager: of the run.
        step: which checkpoint.
        sharding: where every parameter goes.
        use_ema: whether they are read, where there are any.

    Returns:
        (params, about): the model's whole tree, averages in the place of what they average, and the JSON given to
        `save`.

    Raises:
        UserError: the checkpoint is damaged.
    """
    try:
        metadata = manager.item_metadata(step)
        names = ("params", "ema") if use_ema and "ema" in metadata.keys() else ("params",)
        wanted = {name: with_sharding(dict(metadata[name]), sharding) for name in names}
    except (*_STORAGE_ERRORS, TypeError, AttributeError) as error:
        raise _read_error(manager, step, error) from error
    items = _restore(manager, step, wanted)
    return optim.merge_params(items.get("ema", {}), items["params"]), items["about"]


def _items(state: TrainState) -> dict[str, Any]:
    """The state as the items of a checkpoint."""
    names = ("step", "opt_state", "key", "first_nonfinite_step")
    items = {
        "params": optim.merge_params(state.trainable, state.frozen),
        "ema": state.ema,
        "training": {name: getattr(state, name) for name in names},
    }
    return {name: tree for name, tree in items.items() if tree}


def _restore(manager: ocp.CheckpointManager, step: int, wanted: dict[str, Any]) -> Any:
    """Restores array items into abstract trees, and `about`."""
    arrays = {item: ocp.args.StandardRestore(tree) for item, tree in wanted.items()}
    try:
        return manager.restore(step, args=ocp.args.Composite(**arrays, about=ocp.args.JsonRestore()))
    except _STORAGE_ERRORS as error:
        raise _read_error(manager, step, error) from error


def _check_shapes(wanted: Any, found: Any, path: Any) -> None:
    """Compares names and shapes before a restore: Orbax's own error would name no parameter."""
    wanted_shapes, found_shapes = _shapes(wanted), _shapes(found)
    for name, shape in wanted_shapes.items():
        if found_shapes.get(name) != shape:
            there = f"is of shape {found_shapes[name]}" if name in found_shapes else "is not in it"
            raise UserError(
                f"{path} was written by another model or optimizer: {name} {there}, this run has {shape}; "
                "use another --workdir"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Joined names -> shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _check_space(manager: ocp.CheckpointManager, state: TrainState) -> None:
    """Refuses to begin a save that the disk cannot hold: a disk filled to the brim would take the metrics with it."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(manager.directory).free
    if free < needed:
        raise _save_error(manager, f"it needs {needed:,} bytes, the disk has {free:,} left")


def _remove_half_written(directory: Path) -> None:
    """Removes what a save left behind that was killed or failed."""
    for path in filter(ocp.utils.is_tmp_checkpoint, directory.iterdir()):
        shutil.rmtree(path)


def _save_error(manager: ocp.CheckpointManager, reason: Exception | str) -> UserError:
    _remove_half_written(Path(manager.directory))
    manager.reload()  # it counts a step as gone as soon as the save that replaces it begins
    last = manager.latest_step()
    kept = f"the last good one is step {last}" if last is not None else "there is no earlier one"
    return UserError(
        f"the checkpoint could not be written to {manager.directory} ({one_line(reason)[:200]}); {kept}; "
        "free some space and start the same command again"
    )


def _read_error(manager: ocp.CheckpointManager, step: int, error: Exception) -> UserError:
    return UserError(
        f"the checkpoint {manager.directory / str(step)} could not be read: {one_line(error)[:300]}; "
        "if it is damaged, delete that folder and start training again: it goes on from an earlier one"
    )
