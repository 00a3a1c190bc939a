"""The device mesh, and the shardings of batches and parameters."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree, Shaped, UInt8

from vit_jax.runtime import resources
from vit_jax.runtime.errors import UsageError
from vit_jax.types import ImageSource

_Tree = TypeVar("_Tree")

_MIN_SHARDED_SIZE = 4096  # smaller arrays are replicated, as gathering them costs more than it saves


def create_mesh(devices: Sequence[jax.Device] | None = None, *, data: int = 0, fsdp: int = 1) -> Mesh:
    """Creates a mesh with the axes "data" and "fsdp": batches are sharded over both, parameters over "fsdp".

    Args:
        devices: available devices; by default, all devices of all processes.
        data: number of copies of the parameters; 0: number of devices / `fsdp`.
        fsdp: number of devices that shard one copy.

    Raises:
        UsageError: the mesh needs more devices than available, or leaves some unused with several processes.
    """
    devices = jax.devices() if devices is None else list(devices)
    size = data * fsdp or len(devices)
    if size % fsdp:
        raise UsageError(f"mesh.fsdp is {fsdp}; expected a divisor of the number of devices, {len(devices)}")
    if size > len(devices) or (size < len(devices) and jax.process_count() > 1):
        expected = f"{'all' if jax.process_count() > 1 else 'at most'} {len(devices)} devices"
        raise UsageError(f"mesh.data × mesh.fsdp is {data} × {fsdp} = {size}; expected {expected}")
    auto = (AxisType.Auto,) * 2  # under Explicit, JAX's default, Linen modules fail
    return jax.make_mesh((size // fsdp, fsdp), ("data", "fsdp"), axis_types=auto, devices=devices[:size])


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def param_shardings(tree: PyTree, mesh: Mesh) -> PyTree[NamedSharding]:
    """Returns the shardings of parameters, or of a tree with the same shapes, such as momentum.

    Arrays of at least 4,096 elements are sharded over `fsdp` along their longest axis that `fsdp` divides; others are
    replicated.
    """
    return jax.tree.map(lambda leaf: _param_sharding(leaf.shape, mesh), tree)


def _param_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    fsdp = mesh.shape["fsdp"]
    axes = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or not axes or math.prod(shape) < _MIN_SHARDED_SIZE:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))


def with_sharding(tree: _Tree, shardings: PyTree[NamedSharding]) -> _Tree:
    """Adds shardings to shapes and dtypes; takes one sharding for all leaves, or a tree of them."""
    shapes: _Tree = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )
    return shapes


def device_put(tree: Any, shardings: PyTree[NamedSharding]) -> Any:
    """Shards arrays that every process holds in full; takes one sharding for all leaves, or a tree of them."""

    def put(leaf: jax.typing.ArrayLike, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, jax.tree.broadcast(shardings, tree))


def shard_rows(images: ImageSource, rows: Int[np.ndarray, " b"], mesh: Mesh) -> UInt8[Array, "b h w 3"]:
    """Shards the images of the given rows over all devices; each process reads only its own."""

    def read(index: Any) -> np.ndarray:
        return images[rows[index[0]]]

    return jax.make_array_from_callback((len(rows), *images.shape[1:]), batch_sharding(mesh), read)


def shard_local_batch(local: Shaped[np.ndarray, "..."], mesh: Mesh) -> Shaped[Array, "..."]:
    """Shards a batch [b …] over all devices; each process provides an equal part [b/p …]."""
    batch: jax.Array = jax.make_array_from_process_local_data(batch_sharding(mesh), local)
    return batch


def device_memory(device: jax.Device) -> tuple[int, str]:
    """Returns the memory of one device in bytes, and where the number is from; CPU devices share memory."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit, "reported by the device"
    return resources.total_memory() // jax.local_device_count(), "the machine's memory"


def pad_to_devices(batch_size: int, num_images: int, mesh: Mesh) -> int:
    """Returns the batch size, at most `num_images`, rounded up to a multiple of the number of devices."""
    return -(-min(batch_size, num_images) // mesh.size) * mesh.size
