import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vit_jax.runtime import sharding
from vit_jax.training import plan


def test_bytes_per_device_counts_shards():
    mesh = sharding.create_mesh(jax.devices()[:8], fsdp=4)
    shapes = {"split": jax.ShapeDtypeStruct((8, 3), jnp.float32), "whole": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
    split = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
    tree = sharding.with_sharding(shapes, {"split": split, "whole": sharding.replicated(mesh)})
    assert plan.bytes_per_device(tree) == 2 * 3 * 4 + 5 * 2


def test_memory_of_excludes_donated_arguments():
    add = jax.jit(lambda x, y: x + y, donate_argnums=0)
    x = jax.ShapeDtypeStruct((1000,), jnp.float32)
    arguments, temporaries = plan.memory_of(add.lower(x, x).compile())
    assert arguments == 8000
    assert temporaries < 4000
