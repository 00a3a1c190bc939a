import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import VisionTransformer, attention

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


def sample(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.PRNGKey(sum(shape)), (3, *shape), dtype)


def attend_and_differentiate(attend, inputs):
    output, vjp = jax.vjp(attend, *inputs)
    return output, *vjp(jnp.cos(output))


@pytest.mark.parametrize("num_tokens", [16, 17])
def test_padded_attention_equals_xla_attention(num_tokens):
    """The keys have negative scores, so that a padded key, whose score is 0, would dominate."""
    query, key, value = sample(2, num_tokens, 3, 8)
    inputs = abs(query), -abs(key), value
    padded = functools.partial(attention.padded_attention, implementation="xla")
    expected = attend_and_differentiate(attention.xla_attention, inputs)
    for actual, wanted in zip(attend_and_differentiate(padded, inputs), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=2e-6)


def test_padded_attention_maps_over_images():
    query, key, value = sample(4, 1, 5, 2, 8)
    padded = functools.partial(attention.padded_attention, implementation="xla")
    expected = padded(query[:, 0], key[:, 0], value[:, 0])
    np.testing.assert_allclose(jax.vmap(padded)(query, key, value)[:, 0], expected, atol=1e-6)


@pytest.fixture
def calls(monkeypatch):
    """Replaces cuDNN by XLA; returns the shapes of the queries."""
    shapes, padded = [], attention.padded_attention

    def attend(query, key, value, *, implementation):
        assert implementation == "cudnn"
        shapes.append(query.shape)
        return padded(query, key, value, implementation="xla")

    monkeypatch.setattr(attention, "padded_attention", attend)
    return shapes


@pytest.mark.parametrize(
    ("changes", "options", "num_calls"),
    [
        ({}, {}, 2),
        ({"pool": "map"}, {}, 2),  # the probe is one query
        ({"dtype": jnp.float32}, {}, 0),
        ({"attention": "xla"}, {}, 0),
        ({"attention_dropout_rate": 0.1}, {}, 2),
        ({"attention_dropout_rate": 0.1}, {"train": True, "rngs": {"dropout": jax.random.PRNGKey(0)}}, 0),
        ({"dropout_rate": 0.1}, {"train": True, "rngs": {"dropout": jax.random.PRNGKey(0)}}, 2),
        ({}, {"mutable": ["intermediates"]}, 0),
    ],
)
def test_cudnn_attention_falls_back_to_xla(calls, changes, options, num_calls):
    model = VisionTransformer(5, **SIZES, **{"dtype": jnp.bfloat16, "attention": "cudnn", **changes})
    images = sample(16, 16, 3)
    params = jax.eval_shape(model.init, jax.random.PRNGKey(0), images)
    calls.clear()
    jax.eval_shape(functools.partial(model.apply, **options), params, images)
    assert calls == [(3, 16 + (model.pool == "cls"), 3, 8)] * num_calls


def test_cudnn_attention_gives_logits_and_attention_maps_of_xla(calls):
    xla = VisionTransformer(5, **SIZES, dtype=jnp.bfloat16, head_init="xavier")
    cudnn, images = xla.clone(attention="cudnn"), sample(16, 16, 3)
    params = jax.jit(xla.init)(jax.random.PRNGKey(0), images)
    np.testing.assert_allclose(cudnn.apply(params, images), xla.apply(params, images), atol=0.02)
    assert len(calls) == 2
    maps = [model.apply(params, images, mutable=["intermediates"])[1] for model in (xla, cudnn)]
    jax.tree.map(np.testing.assert_array_equal, *maps)
