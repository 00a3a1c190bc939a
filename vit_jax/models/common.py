"""Constants and functions shared by the models."""

import re
from collections.abc import Sequence
from typing import TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

NUM_GROUPS = 32  # of every GroupNorm
HEAD_INITS = {"zeros": nn.initializers.zeros, "xavier": nn.initializers.xavier_uniform()}
REMAT_POLICIES = {  # intermediates of a block that are kept for the backward pass; others are recomputed
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def remat_module(module: type[ModuleType], remat: str, *, static_argnums: tuple[int, ...] = ()) -> type[ModuleType]:
    """Returns the module with rematerialization; `remat` is "none" or a key of `REMAT_POLICIES`."""
    if remat == "none":
        return module
    return nn.remat(module, policy=REMAT_POLICIES[remat], static_argnums=static_argnums)


def shard_batch(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Shards the batch axis of an activation over all axes of the mesh, if there is one.

    Without this constraint, the compiler may move activations to the shards of a parameter instead of the reverse.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    # A batch of one is an image under `jax.vmap(spmd_axis_name=…)`, which shards the mapped axis.
    partition = PartitionSpec(mesh.axis_names if x.shape[0] > 1 else None)
    return cast(Array, jax.lax.with_sharding_constraint(x, partition))


def float32_or_wider(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of sums and logits: float32, or float64 if `dtype` is float64."""
    return jnp.promote_types(dtype, jnp.float32)


class HeadMixin:
    """A model with a linear head."""

    dtype: DTypeLike
    head_init: str

    @nn.nowrap
    def create_head(self, num_classes: int, name: str | None = None) -> nn.Dense:
        """Creates the head, features [b d] -> logits in at least float32."""
        dtype, kernel_init = float32_or_wider(self.dtype), HEAD_INITS[self.head_init]
        return nn.Dense(num_classes, dtype=dtype, kernel_init=kernel_init, name=name)


def reduction(units: Sequence[int] | None) -> int:
    """Returns the downsampling factor of the root and blocks of a ResNet; 1 for None, no ResNet."""
    return 1 if units is None else 4 << max(0, len(units) - 1)


def num_input_axes(path: str, num_axes: int) -> int:
    """Returns the number of leading axes of a kernel that are inputs; heads of query, key and value are outputs."""
    return 1 if re.search(r"/(query|key|value)/kernel$", path) else num_axes - 1
