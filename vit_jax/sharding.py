"""The mesh of devices, and where arrays live on it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def create_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, `data`, over all devices of all processes, or over those given.

    The axis is of type Auto: under Explicit, which has become JAX's default, Linen modules fail.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def abstract(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes and dtypes -> shapes, dtypes and places."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts host arrays on the mesh.

    Args:
        tree: arrays that every process holds whole and equal.
        sharding: where each leaf goes.

    Returns:
        The tree of global arrays. `make_array_from_callback` serves one process and several alike.
    """

    def put(leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)
