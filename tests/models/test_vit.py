import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import models as variants
from vit_jax import pretrained
from vit_jax.config import STEM_UNITS, VARIANTS
from vit_jax.models import VisionTransformer, vit

MICRO = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


def init_shapes(model, image_size):
    """Returns the shape and dtype of each parameter by joined key, without computing values."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images)["params"], sep="/")


def count_parameters(model, image_size):
    return sum(leaf.size for leaf in init_shapes(model, image_size).values())


def create_variant(name, num_classes=1000, **options):
    return VisionTransformer(num_classes, **variants.get_config(name).to_dict(), **options)


def random_params(*, grid, num_classes=5, representation_size=None, seed=0):
    """Returns parameters far from their initial values, so that leaving out any of them changes the logits."""
    shapes = reference.released_shapes(
        **MICRO,
        representation_size=representation_size,
        num_classes=num_classes,
        num_tokens=1 + grid[0] * grid[1],
    )
    rng = np.random.default_rng(seed)
    flat = {key: rng.normal(0, 0.3, shape).astype(np.float32) for key, shape in shapes.items()}
    return unflatten_dict(flat, sep="/")


def random_images(height, width, num=2):
    return np.random.default_rng(1).uniform(-1, 1, (num, height, width, 3)).astype(np.float32)


def apply_plain(model, variables, images, **kwargs):
    return jax.jit(functools.partial(model.apply, **kwargs))(variables, images)


def assert_matches_reference(params, images, **kwargs):
    model = VisionTransformer(5, **MICRO, **kwargs)
    expected = reference.forward(params, images)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(model.apply)({"params": params}, images)
    error = np.linalg.norm(np.asarray(logits) - expected) / np.linalg.norm(expected)
    assert logits.shape == (len(images), 5)
    assert error < 1e-5


# ---- parameters


def test_vision_transformer_parameters_match_checkpoint():
    model = VisionTransformer(21843, representation_size=768)
    leaves = init_shapes(model, 224)
    expected = reference.released_shapes(
        **reference.B_16, representation_size=768, num_classes=21843, num_tokens=1 + 14 * 14
    )
    assert {key: leaf.shape for key, leaf in leaves.items()} == expected
    assert len(leaves) == 202
    assert sum(leaf.size for leaf in leaves.values()) == 103_186_515
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}


def test_vision_transformer_without_pre_logits_has_200_arrays():
    leaves = init_shapes(VisionTransformer(1000), 384)
    assert len(leaves) == 200
    assert leaves["Transformer/posembed_input/pos_embedding"].shape == (1, 577, 768)


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        ("Ti_16", 5_717_416),
        pytest.param("S_16", 22_050_664, marks=pytest.mark.slow),
        pytest.param("S_32", 22_878_952, marks=pytest.mark.slow),
        pytest.param("B_8", 86_576_872, marks=pytest.mark.slow),
        ("B_16", 86_567_656),
        pytest.param("B_32", 88_224_232, marks=pytest.mark.slow),
        pytest.param("L_16", 304_326_632, marks=pytest.mark.slow),
        pytest.param("L_32", 306_535_400, marks=pytest.mark.slow),
        ("H_14", 632_045_800),
        pytest.param("R_Ti_16", 6_337_704, marks=pytest.mark.slow),
        pytest.param("R26_S_32", 36_431_912, marks=pytest.mark.slow),
        pytest.param("R26_B_32", 101_383_976, marks=pytest.mark.slow),
        ("R50_B_16", 98_659_112),
        pytest.param("R50_L_32", 328_994_856, marks=pytest.mark.slow),
    ],
)
def test_vision_transformer_has_published_parameter_count(variant, count):
    assert count_parameters(create_variant(variant), 224) == count


def test_vision_transformer_with_mean_pooling_has_published_parameter_count():
    assert count_parameters(create_variant("B_16", pool="mean"), 224) == 86_566_120


def test_vision_transformer_variants_differ_only_in_patch_size():
    def shapes(name):
        return {key: leaf.shape for key, leaf in init_shapes(create_variant(name), 224).items()}

    shapes_16, shapes_32 = shapes("L_16"), shapes("L_32")
    different = {key for key in shapes_16 if shapes_16[key] != shapes_32[key]}
    assert different == {"embedding/kernel", "Transformer/posembed_input/pos_embedding"}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=() if name in ("micro_4", "B_16", "R50_B_16") else pytest.mark.slow)
        for name in VARIANTS
    ],
)
def test_infer_sizes_recovers_arguments_from_shapes(variant):
    arguments = variants.get_config(variant).to_dict()
    model = create_variant(variant, num_classes=10)
    tree = unflatten_dict(init_shapes(model, 7 * model.pixels_per_patch), sep="/")
    del arguments["dropout_rate"]
    arguments |= {"stem_width": 64} if variant in STEM_UNITS else {"stem_units": None}
    expected = {**arguments, "representation_size": None, "num_classes": 10, "pool": "cls"}
    assert pretrained.infer_sizes(tree) == ("vit", expected)


def test_vision_transformer_initializes_head_and_class_token_to_zero():
    model = VisionTransformer(5, **MICRO)

    def init(key):
        params = model.init(key, random_images(8, 8))["params"]
        return {"head": params["head"], "cls": params["cls"]}  # XLA does not compute the rest

    for leaf in jax.tree.leaves(jax.jit(init)(jax.random.key(0))):
        assert not np.any(leaf)


# ---- logits


@pytest.mark.parametrize("representation_size", [None, 16])
def test_vision_transformer_matches_reference_logits(representation_size):
    params = random_params(grid=(4, 4), representation_size=representation_size)
    assert_matches_reference(params, random_images(16, 16), representation_size=representation_size)


def test_vision_transformer_matches_reference_logits_on_non_square_images():
    assert_matches_reference(random_params(grid=(2, 4)), random_images(8, 16))


@pytest.mark.parametrize(("grid", "new_grid"), [((4, 4), (6, 6)), ((4, 4), (3, 5)), ((2, 6), (4, 4))])
def test_vision_transformer_matches_reference_logits_after_adapt_params(grid, new_grid):
    source = random_params(grid=grid, representation_size=16, num_classes=7)
    height, width = (4 * size for size in new_grid)
    target = random_params(grid=new_grid, seed=2)
    params, _ = pretrained.adapt_params(source, target, grid=new_grid, pretrained_grid=grid)
    assert_matches_reference(params, random_images(height, width))


def test_vision_transformer_matches_reference_in_float64():
    """Float64 agreement also detects a different epsilon or form of GELU, which float32 hides."""
    params, images = random_params(grid=(4, 4), representation_size=16), random_images(16, 16)
    with jax.enable_x64(True):
        params64 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        model = VisionTransformer(5, **MICRO, representation_size=16, dtype=jnp.float64)
        logits = jax.jit(model.apply)({"params": params64}, jnp.asarray(images, jnp.float64))
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, reference.forward(params, images), rtol=1e-11, atol=1e-11)


# ---- dtypes, dropout, remat, errors


def test_vision_transformer_computes_all_submodules_in_bfloat16():
    model = VisionTransformer(5, **MICRO, representation_size=16, dtype=jnp.bfloat16)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)

    def apply(images):
        variables = model.init(jax.random.key(0), images)
        return variables, model.apply(variables, images, capture_intermediates=True, mutable=["intermediates"])

    variables, (logits, state) = jax.eval_shape(apply, images)
    outputs = flatten_dict(state["intermediates"], sep="/")
    float32_outputs = ("__call__", "head/__call__", "attention_weights")  # logits and attention weights are float32
    assert logits.dtype == jnp.float32
    assert len(outputs) > 2 * 10
    assert {key: leaf[0].dtype for key, leaf in outputs.items()} == {
        key: jnp.dtype(jnp.float32 if key.endswith(float32_outputs[2]) or key in float32_outputs else jnp.bfloat16)
        for key in outputs
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.float32)}


def test_vision_transformer_computes_softmax_and_norms_in_float32():
    model = VisionTransformer(5, **MICRO, dtype=jnp.bfloat16)
    images = jnp.zeros((2, 16, 16, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    program = str(jax.make_jaxpr(model.apply)(variables, images))
    reductions = re.findall(r":(\w+)\[[^]]*\] = (exp|rsqrt|reduce_sum|reduce_max)\b", program)
    # Two blocks with one softmax each, and five norms with two sums each.
    counts = {"exp": 2, "reduce_max": 2, "rsqrt": 5, "reduce_sum": 2 + 5 * 2}
    assert collections.Counter(reductions) == {("f32", name): count for name, count in counts.items()}
    assert ":bf16[" in program


def test_vision_transformer_approximates_reference_in_bfloat16():
    params, images = random_params(grid=(4, 4)), random_images(16, 16)
    logits = jax.jit(VisionTransformer(5, **MICRO, dtype=jnp.bfloat16).apply)({"params": params}, images)
    expected = reference.forward(params, images)
    assert np.linalg.norm(logits - expected) / np.linalg.norm(expected) < 0.05


@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate"])
def test_vision_transformer_applies_dropout_only_in_training(rate):
    small = {**MICRO, "num_layers": 1}
    model = VisionTransformer(5, **small, **{rate: 0.5})
    variables, images = {"params": random_params(grid=(4, 4))}, random_images(16, 16)
    train = jax.jit(lambda key: model.apply(variables, images, train=True, rngs={"dropout": key}))
    plain = apply_plain(VisionTransformer(5, **small), variables, images)
    first, second, again = (train(jax.random.key(seed)) for seed in (1, 2, 1))
    np.testing.assert_array_equal(apply_plain(model, variables, images), plain)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


def test_vision_transformer_without_dropout_needs_no_rng_in_training():
    variables, images = {"params": random_params(grid=(4, 4))}, random_images(16, 16)
    model = VisionTransformer(5, **MICRO)
    trained = apply_plain(model, variables, images, train=True)
    np.testing.assert_array_equal(trained, apply_plain(model, variables, images))


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 18)])
def test_vision_transformer_rejects_image_size_indivisible_by_patch_size(height, width):
    model = VisionTransformer(5, **MICRO)
    with pytest.raises(ValueError, match=f"{height} × {width} pixels; expected multiples of the patch size, 4"):
        jax.eval_shape(model.init, jax.random.key(0), random_images(height, width))


def test_vision_transformer_without_num_classes_returns_head_inputs():
    model = VisionTransformer(5, **MICRO, representation_size=7)
    params = random_params(grid=(2, 2), representation_size=7)
    images = random_images(8, 8)
    features = apply_plain(model.clone(num_classes=None), {"params": params}, images)
    assert features.shape == (2, 7)
    logits = model.create_head(5).apply({"params": params["head"]}, features)
    np.testing.assert_allclose(logits, apply_plain(model, {"params": params}, images), atol=1e-5)


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_vision_transformer_parameters_and_gradients_match_with_remat(remat):
    plain = VisionTransformer(5, **MICRO, dropout_rate=0.1)
    with_remat = plain.clone(remat=remat)
    assert init_shapes(with_remat, 8) == init_shapes(plain, 8)
    params, images = random_params(grid=(2, 2)), random_images(8, 8)

    def grads(model):
        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            return (model.apply({"params": params}, images, train=True, rngs=rngs) ** 2).sum()

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), grads(plain), grads(with_remat))


def test_encoder_skips_last_block_at_stochastic_depth_rate_near_one():
    """The rate increases linearly with depth: near one for the last block, zero for the first."""
    model = VisionTransformer(None, **MICRO, stochastic_depth_rate=0.999999)
    params, images = random_params(grid=(2, 2)), random_images(8, 8)
    out, state = model.apply(
        {"params": params},
        images,
        train=True,
        rngs={"dropout": jax.random.key(0)},
        capture_intermediates=lambda module, _: isinstance(module, vit.EncoderBlock),
    )
    blocks = state["intermediates"]["Transformer"]
    first, last = (blocks[f"encoderblock_{i}"]["__call__"][0] for i in (0, 1))
    np.testing.assert_array_equal(first, last)
    evaluated = model.apply({"params": params}, images)
    assert not np.allclose(out, evaluated, atol=1e-2)


def test_encoder_uses_full_stochastic_depth_rate_for_single_block():
    """A skipped block returns its input, the embedded tokens."""
    model = VisionTransformer(None, **{**MICRO, "num_layers": 1}, stochastic_depth_rate=0.999999)
    images = random_images(8, 8)
    variables = model.init(jax.random.key(0), images)
    states = [
        model.apply(variables, images, train=train, rngs={"dropout": jax.random.key(0)}, capture_intermediates=True)[1]
        for train in (True, False)
    ]
    encoders = [state["intermediates"]["Transformer"] for state in states]
    tokens, trained, evaluated = (
        encoders[0]["posembed_input"]["__call__"][0],
        *(encoder["encoderblock_0"]["__call__"][0] for encoder in encoders),
    )
    np.testing.assert_array_equal(trained, tokens)
    assert not np.allclose(evaluated, tokens, atol=1e-2)


def test_encoder_block_rescales_kept_residual_branches():
    """At rate 1/2 a kept branch is scaled by two: outputs of a single branch are x or x + 2 · branch."""
    params = random_params(grid=(2, 2))["Transformer"]["encoderblock_1"]
    params["MlpBlock_3"] = jax.tree.map(jnp.zeros_like, params["MlpBlock_3"])  # keeps only the attention branch
    x = jnp.asarray(random_images(5, 24, num=1)[..., 0])  # [1 n d]
    block = functools.partial(vit.EncoderBlock, vit.BlockConfig(num_heads=3, mlp_dim=40))
    branch = block(0.0).apply({"params": params}, x, True) - x
    many = block(0.5).apply({"params": params}, jnp.tile(x, (64, 1, 1)), False, rngs={"dropout": jax.random.key(0)})
    kept = np.isclose(many, x + 2 * branch, atol=1e-4).all(axis=(1, 2))
    skipped = np.isclose(many, x, atol=1e-4).all(axis=(1, 2))
    assert (kept ^ skipped).all()
    assert 16 < kept.sum() < 48


@pytest.mark.parametrize("approximate", [True, False])
def test_mlp_block_uses_tanh_or_exact_gelu(approximate):
    identity = {"kernel": np.eye(5), "bias": np.zeros(5)}
    x = np.array([[[-3.0, -1.0, 0.5, 1.0, 3.0]]])
    block = vit.MlpBlock(vit.BlockConfig(num_heads=1, mlp_dim=5, gelu_approximate=approximate))
    params = {"Dense_0": identity, "Dense_1": identity}
    actual = block.apply({"params": params}, jnp.asarray(x), deterministic=True)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    exact = 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    np.testing.assert_allclose(actual, tanh if approximate else exact, atol=1e-6)
    assert np.abs(tanh - exact).max() > 1e-4


@pytest.mark.parametrize(("head_init", "bound"), [("zeros", 0.0), ("xavier", np.sqrt(6 / (24 + 7)))])
def test_vision_transformer_initializes_head_by_head_init(head_init, bound):
    model = VisionTransformer(
        7, patch_size=4, hidden_size=24, num_layers=1, num_heads=3, mlp_dim=40, head_init=head_init
    )
    head = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]["head"]
    assert 0.9 * bound <= np.abs(head["kernel"]).max() <= bound
    assert not np.any(head["bias"])
