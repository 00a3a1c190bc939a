import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import models
from vit_jax.models import hybrid
from vit_jax.runtime.errors import UsageError

SIZES = {"patch_size": 1, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40, "stem_width": 32}


def create_params(*, num_tokens=16, **sizes):
    """Returns random parameters by joined key."""
    shapes = reference.released_shapes(**SIZES | sizes, representation_size=None, num_classes=7, num_tokens=num_tokens)
    rng = np.random.default_rng(0)
    return {key: rng.normal(scale=0.3, size=shape).astype(np.float32) for key, shape in shapes.items()}


@pytest.mark.parametrize(("units", "shape"), [((), (2, 8, 6, 32)), ((1,), (2, 8, 6, 128)), ((1, 2), (2, 4, 3, 256))])
def test_apply_stem_downsamples_by_four_and_by_two_per_further_block(units, shape):
    class Stem(hybrid.nn.Module):
        @hybrid.nn.compact
        def __call__(self, images):
            return hybrid.apply_stem(images, units=units, width=32, remat="none", dtype="float32")

    outputs, variables = jax.eval_shape(Stem().init_with_output, jax.random.key(0), jnp.zeros((2, 32, 24, 3)))
    assert outputs.shape == shape
    expected = {"conv_root", "gn_root", *(f"block{i + 1}" for i in range(len(units)))}
    assert variables["params"].keys() == expected


def test_unit_equals_shortcut_at_initialization():
    """The scale of the last norm is zero, so that a unit without projection returns relu(x)."""
    x = jax.random.normal(jax.random.key(0), (1, 3, 3, 128))
    unit = hybrid.Unit(width=32, stride=1, projects=False, dtype="float32")
    np.testing.assert_array_equal(unit.init_with_output(jax.random.key(1), x)[0], np.maximum(x, 0))


def test_create_conv_standardizes_kernels():
    """Scaling and shifting a kernel does not change the output, up to epsilon."""
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    conv = hybrid.create_conv(4, 3, 1, "float32")
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 8, 4))
    actual, scaled = (conv.apply({"params": {"kernel": leaf}}, x) for leaf in (kernel, 5 * kernel + 2))
    np.testing.assert_allclose(actual, scaled, atol=1e-3)


def test_vision_transformer_with_stem_matches_reference_logits():
    flat = create_params(stem_units=(1, 2), num_tokens=1 + 4)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    model = models.VisionTransformer(7, **SIZES, stem_units=(1, 2))
    logits = jax.jit(model.apply)({"params": unflatten_dict(flat, sep="/")}, images)
    np.testing.assert_allclose(logits, reference.forward(unflatten_dict(flat, sep="/"), images), atol=2e-4)


def test_vision_transformer_with_stem_has_gradients_for_all_parameters():
    sizes = SIZES | {"stem_units": (2,), "pool": "map"}
    model = models.VisionTransformer(7, **sizes, remat="full", head_init="xavier")
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    params = unflatten_dict(create_params(**sizes), sep="/")
    gradients = jax.jit(jax.grad(lambda p: model.apply({"params": p}, images).std()))(params)
    for key, leaf in flatten_dict(gradients, sep="/").items():
        assert np.all(np.isfinite(leaf)), key
        # The bias of a key adds a constant to all scores of a query, to which the softmax is invariant.
        assert np.any(leaf != 0) or key.endswith("/key/bias"), key


def test_vision_transformer_computes_stem_and_pooling_in_bfloat16():
    sizes = SIZES | {"stem_units": (), "pool": "map"}
    flat = create_params(**sizes)
    inputs = np.random.default_rng(1).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    model = models.VisionTransformer(None, **sizes, dtype=jnp.bfloat16)
    features = jax.jit(model.apply)({"params": unflatten_dict(flat, sep="/")}, inputs)
    assert features.dtype == jnp.bfloat16
    flat |= {"head/kernel": np.eye(24), "head/bias": np.zeros(24)}
    expected = reference.forward(unflatten_dict(flat, sep="/"), inputs)
    assert np.linalg.norm(np.asarray(features, np.float64) - expected) < 0.03 * np.linalg.norm(expected)


def test_validate_rejects_indivisible_image_size_and_stem_width():
    model = models.VisionTransformer(7, **SIZES, stem_units=(1, 2))
    assert model.pixels_per_patch == 8
    with pytest.raises(UsageError, match="image_size is 36; expected a multiple of the patch, 8"):
        model.validate(36)
    with pytest.raises(UsageError, match="stem_width is 48; expected a multiple of 32"):
        model.clone(stem_width=48).validate(32)
