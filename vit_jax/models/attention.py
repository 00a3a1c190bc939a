"""Attention by cuDNN's fused kernels for GPUs, which do not store the attention weights, and by XLA."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def weigh_values(subscripts: str, weights: Array, value: Array) -> Array:
    """Sums values in their own dtype: float32 weights would double the time and memory of this product."""
    return jnp.einsum(subscripts, weights.astype(value.dtype), value)


def xla_attention(
    query: Float[Array, "b n k c"], key: Float[Array, "b n k c"], value: Float[Array, "b n k c"]
) -> Float[Array, "b n k c"]:
    """Applies attention with the arithmetic of the models in bfloat16."""
    output: Array = nn.dot_product_attention(
        query,
        key,
        value,
        force_fp32_for_softmax=True,
        qk_attn_weights_einsum=jnp.einsum,
        attn_weights_value_einsum=weigh_values,
    )
    return output


@functools.wraps(nn.dot_product_attention)  # Linen passes only the arguments in the signature
def cudnn_attention(query: Array, key: Array, value: Array, **options: Any) -> Array:
    """Applies cuDNN's attention, as an `attention_fn` of Linen, or XLA's where cuDNN's cannot be used.

    That is in float32, with a mask, with dropout of the attention weights, if they are to be stored, and if the number
    of queries is not that of keys.
    """
    module, dropout = options.get("module"), options["dropout_rate"] > 0 and not options["deterministic"]
    stored = module is not None and module.is_mutable_collection("intermediates")
    if query.dtype.itemsize > 2 or query.shape != key.shape or options["mask"] is not None or dropout or stored:
        output: Array = nn.dot_product_attention(query, key, value, **options)
        return output
    return padded_attention(query, key, value, implementation="cudnn")


def padded_attention(
    query: Float[Array, "b n k c"],
    key: Float[Array, "b n k c"],
    value: Float[Array, "b n k c"],
    *,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "b n k c"]:
    """Applies attention after padding an odd number of tokens to an even one, as cuDNN's backward pass requires."""
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    num_tokens = query.shape[1]
    if num_tokens % 2 == 0:
        return attend(query, key, value)
    query, key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
    # Computed from an input, since the batching rule of cuDNN's attention, for `jax.vmap`, expects mapped lengths.
    lengths = query[:, 0, 0, 0].astype(jnp.int32) * 0 + num_tokens  # [b]
    return attend(query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths)[:, :num_tokens]
