"""The mesh of devices, and where arrays live on it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.runtime import resources
from vit_jax.runtime.errors import UsageError

_SMALLEST_SHARDED = 4096
"""Arrays of fewer numbers are on every device: to collect them would cost more than they take."""


def create_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = 0, fsdp: int = 1) -> Mesh:
    """A mesh of the axes `data` and `fsdp`; batches are split over both, parameters over `fsdp`.

    The axes are of type Auto: under Explicit, which has become JAX's default, Linen modules fail.

    Args:
        devices: to choose from; all devices of all processes unless given.
        data: number of copies of the parameters; 0 takes as many as there are devices for.
        fsdp: number of devices that share one copy.

    Raises:
        UsageError: there are not as many devices, or some process would have none of them.
    """
    devices = jax.devices() if devices is None else list(devices)
    wanted = data * fsdp or len(devices)
    if wanted > len(devices) or wanted % fsdp:
        raise UsageError(
            f"config.mesh: data {data} × fsdp {fsdp} does not fit {len(devices)} devices; "
            "fsdp must divide their number, and data 0 takes the rest"
        )
    if wanted < len(devices) and jax.process_count() > 1:
        raise UsageError(
            f"config.mesh: data {data} × fsdp {fsdp} leaves some of {len(devices)} devices out; "
            "several processes must use all: set data to 0"
        )
    shape = (wanted // fsdp, fsdp)
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices[:wanted])


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """Where parameters and all that has their shapes go.

    An array of at least 4,096 numbers is split over `fsdp` along its longest axis that divides; any other is
    replicated. The rule knows shapes only, so that it holds for every model and optimizer.

    Args:
        tree: arrays, or shapes of arrays.
        mesh: of `create_mesh`.

    Returns:
        The tree with a `NamedSharding` for each leaf.
    """
    fsdp = mesh.shape["fsdp"]

    def place_of(leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % fsdp == 0]
        if fsdp == 1 or not axes or math.prod(leaf.shape) < _SMALLEST_SHARDED:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(place_of, tree)


def with_sharding(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes -> shapes, dtypes and places; `shardings`: one for all, or a tree of them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        _for_each(tree, shardings),
    )


def device_put(tree: Any, shardings: Any) -> Any:
    """Puts host arrays on the mesh.

    Args:
        tree: arrays that every process holds whole and equal.
        shardings: where each leaf goes; one for all, or a tree of them.

    Returns:
        The tree of global arrays. `make_array_from_callback` serves one process and several alike.
    """

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, _for_each(tree, shardings))


def shard_rows(images: Any, rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Puts some of a split's pictures on the mesh, split over all devices; each process reads only its own of them.

    Args:
        images: uint8 [n h w 3] on the host, or what reads like it.
        rows: int [b]; the devices divide b.
        mesh: of `create_mesh`.

    Returns:
        uint8 [b h w 3].
    """

    def read(index: Any) -> np.ndarray:
        return images[rows[index[0]]]

    return jax.make_array_from_callback((len(rows), *images.shape[1:]), batch_sharding(mesh), read)


def shard_local_batch(part: np.ndarray, mesh: Mesh) -> jax.Array:
    """Puts this process's equal part [b/p …] of a batch [b …] on the mesh, split over all devices."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), part)


def device_memory(device: jax.Device) -> tuple[int, str]:
    """(bytes that one device may use, whose figure that is); simulated devices of a CPU share its memory."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit, "the device's own figure"
    return resources.total_memory() // jax.local_device_count(), "the machine's memory"


def pad_to_devices(batch_size: int, num_images: int, mesh: Mesh) -> int:
    """The smallest batch that the devices divide and that holds `batch_size` pictures, or all if there are fewer."""
    return -(-min(batch_size, num_images) // mesh.size) * mesh.size


def _for_each(tree: Any, shardings: Any) -> Any:
    """A single sharding repeated for every leaf."""
    return jax.tree.map(lambda _: shardings, tree) if isinstance(shardings, NamedSharding) else shardings
