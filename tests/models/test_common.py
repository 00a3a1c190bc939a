import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import common
from vit_jax.runtime import sharding


@pytest.mark.parametrize(("units", "pixels"), [(None, 1), ((), 4), ((3,), 4), ((3, 4), 8), ((3, 4, 6, 3), 32)])
def test_reduction_returns_pixels_per_output_position(units, pixels):
    assert common.reduction(units) == pixels


@pytest.mark.parametrize(
    ("path", "num_axes", "inputs"),
    [
        ("block/attention/query/kernel", 3, 1),  # [d heads d/heads]
        ("block/attention/out/kernel", 3, 2),  # [heads d/heads d]
        ("block/MlpBlock_3/Dense_0/kernel", 2, 1),
        ("embedding/kernel", 4, 3),
    ],
)
def test_num_input_axes_counts_query_key_and_value_heads_as_outputs(path, num_axes, inputs):
    assert common.num_input_axes(path, num_axes) == inputs


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_float32_or_wider_promotes_dtype(dtype, expected):
    assert common.float32_or_wider(dtype) == jnp.dtype(expected)


def test_remat_module_returns_module_unchanged_for_none():
    assert common.remat_module(nn.Dense, "none") is nn.Dense


@pytest.mark.parametrize(("remat", "num_products"), [("none", 3), ("dots", 3), ("full", 4)])
def test_remat_module_recomputes_activations_by_policy(remat, num_products):
    """There is one matrix product in the forward pass and two in the backward pass; "full" recomputes the first."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sin(nn.Dense(4)(jnp.sin(x)))

    block, x = common.remat_module(Block, remat)(), jnp.ones((2, 3))
    variables = block.init(jax.random.key(0), x)
    gradient = jax.grad(lambda variables, x: block.apply(variables, x).sum(), argnums=(0, 1))
    assert str(jax.make_jaxpr(gradient)(variables, x)).count("dot_general[") == num_products


def test_shard_batch_shards_batch_over_all_mesh_axes():
    x = jnp.zeros((16, 2))
    assert common.shard_batch(x) is x  # without a mesh
    mesh = sharding.create_mesh()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        sharded = jax.jit(common.shard_batch)(jax.device_put(x, sharding.replicated(mesh)))
    assert sharded.sharding.shard_shape(x.shape) == (2, 2)  # eight devices


@pytest.mark.parametrize(("head_init", "is_zero"), [("zeros", True), ("xavier", False)])
def test_create_head_returns_float32_dense_layer(head_init, is_zero):
    class Model(common.HeadMixin):
        dtype = "bfloat16"

    Model.head_init = head_init
    logits, variables = Model().create_head(3).init_with_output(jax.random.key(0), jnp.ones((2, 4), jnp.bfloat16))
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
    assert np.any(variables["params"]["kernel"]) != is_zero
