"""What the models share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

HEAD_INITS = {"zeros": nn.initializers.zeros, "xavier": nn.initializers.xavier_uniform()}

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a block keeps for its backward pass beside its input: the products with its kernels, or nothing."""


def shard_batch(x: jax.Array) -> jax.Array:
    """Shards the batch axis of an activation over every axis of the mesh; does nothing without a mesh.

    Otherwise the compiler may move activations to the shards of a parameter instead of the reverse. An axis of one is
    left alone: under `jax.vmap` with `spmd_axis_name`, the mapped axis is sharded instead.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names if x.shape[0] > 1 else None))


def create_head(num_classes: int, *, dtype: Any, head_init: str, name: str | None) -> nn.Dense:
    """The layer [b d] -> [b num_classes]; logits are at least float32."""
    logits_dtype = jnp.promote_types(dtype, jnp.float32)
    return nn.Dense(num_classes, dtype=logits_dtype, kernel_init=HEAD_INITS[head_init], name=name)
