import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.models import VisionTransformer
from vit_jax.runtime.errors import UsageError
from vit_jax.training import lora, optim

PARAMS = {"head": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}, "cls": np.ones((1, 1, 2))}


def test_split_params_matches_full_paths():
    trainable, frozen = optim.split_params(PARAMS, (r"head/.*",))
    assert set(trainable) == {"head"} and set(frozen) == {"cls"}
    assert optim.merge_params(trainable, frozen).keys() == PARAMS.keys()


def test_split_params_rejects_pattern_that_matches_nothing():
    with pytest.raises(UsageError, match="'head' matches no parameter"):
        optim.split_params(PARAMS, ("head",))


def test_trainable_patterns_accepts_mode_or_patterns():
    assert optim.trainable_patterns("head") == ("head/.*",)
    assert optim.trainable_patterns(["cls"]) == ("cls",)


def test_describe_trainable_counts_arrays_and_parameters():
    table = optim.describe_trainable(PARAMS, (r"head/.*",))
    assert table.splitlines()[-1].split() == ["total", "2", "9", "of", "11"]


@pytest.mark.parametrize(("count", "expected"), [(0, 0.0), (5, 0.1), (10, 0.2), (60, 0.1), (110, 0.0), (200, 0.0)])
def test_make_schedule_cosine_warms_up_from_zero_and_ends_at_zero(count, expected):
    schedule = optim.make_schedule("cosine", learning_rate=0.2, warmup_steps=10, num_steps=110)
    assert float(schedule(count)) == pytest.approx(expected, abs=1e-7)


def test_make_schedule_without_warmup_starts_at_peak():
    for name, middle in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        schedule = optim.make_schedule(name, learning_rate=1.0, warmup_steps=0, num_steps=10)
        assert float(schedule(0)) == 1.0
        assert float(schedule(5)) == pytest.approx(middle)


def test_create_optimizer_sgd_clips_then_adds_l2_then_momentum():
    tx = optim.create_optimizer("sgd", schedule=lambda count: 0.1, momentum=0.5, weight_decay=0.01, clip_norm=1.0)
    params = {"w": jnp.array([10.0, 0.0])}
    state = tx.init(params)
    grads = {"w": jnp.array([3.0, 4.0])}  # norm 5: clipped to (0.6, 0.8)
    updates, state = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["w"], [-0.1 * (0.6 + 0.1), -0.1 * 0.8], rtol=1e-6)
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["w"], [-0.1 * 1.5 * 0.7, -0.1 * 1.5 * 0.8], rtol=1e-6)


def test_create_optimizer_sgd_stores_momentum_in_bfloat16():
    tx = optim.create_optimizer("sgd", schedule=lambda count: 0.1, momentum_dtype="bfloat16")
    state = tx.init({"w": jnp.zeros(2)})
    trace = optax.tree_utils.tree_get(state, "trace")
    assert trace["w"].dtype == jnp.bfloat16


def test_create_optimizer_adamw_decouples_weight_decay():
    tx = optim.create_optimizer("adamw", schedule=lambda count: 0.1, weight_decay=0.5)
    params = {"w": jnp.array([2.0])}
    updates, _ = tx.update({"w": jnp.array([0.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1 * 0.5 * 2.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_create_optimizer_adds_l2_to_gradient(name):
    tx = optim.create_optimizer(name, schedule=lambda count: 0.1, momentum=0.0, weight_decay=0.5)
    plain = optim.create_optimizer(name, schedule=lambda count: 0.1, momentum=0.0)
    params = {"w": jnp.array([2.0, -4.0])}
    updates, _ = tx.update({"w": jnp.array([1.0, 0.5])}, tx.init(params), params)
    expected, _ = plain.update({"w": jnp.array([2.0, -1.5])}, plain.init(params), params)  # g + 0.5 · w
    np.testing.assert_array_equal(updates["w"], expected["w"])


def test_create_optimizer_adam_starts_with_update_of_learning_rate():
    tx = optim.create_optimizer("adam", schedule=lambda count: 0.1)
    params = {"w": jnp.array([1.0, 1.0])}
    updates, _ = tx.update({"w": jnp.array([3.0, -0.2])}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_create_optimizer_decays_kernels_only(name):
    tx = optim.create_optimizer(
        name, schedule=lambda count: 0.1, momentum=0.0, weight_decay=0.5, decayed="kernels", layer_decay=1.0
    )
    params = {
        "cls": jnp.ones(1),
        "Transformer": {
            "posembed_input": {"pos_embedding": jnp.ones(1)},
            "encoder_norm": {"scale": jnp.ones(1), "bias": jnp.ones(1)},
        },
        "head": {"kernel": jnp.ones(1), "bias": jnp.ones(1)},
        "lora": {"head": {"kernel": {"a": jnp.ones(1), "b": jnp.ones(1)}}},
    }
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = {path for path, leaf in flatten_dict(updates, sep="/").items() if leaf[0] != 0}
    assert moved == {"head/kernel", "lora/head/kernel/a", "lora/head/kernel/b"}


def test_create_optimizer_scales_updates_by_layer_decay():
    tx = optim.create_optimizer(
        "sgd", schedule=lambda count: 1.0, momentum=0.0, layer_decay=0.5, model=VisionTransformer(3, num_layers=2)
    )
    scales = {
        "cls": 0.125,
        "embedding/kernel": 0.125,
        "conv_root/kernel": 0.125,
        "block2/unit1/gn1/scale": 0.125,
        "Transformer/posembed_input/pos_embedding": 0.125,
        "Transformer/encoderblock_0/LayerNorm_0/scale": 0.25,
        "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel": 0.5,
        "Transformer/encoder_norm/scale": 1.0,
        "head/kernel": 1.0,
        "lora/Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel/a": 0.25,
    }
    params = unflatten_dict({path: jnp.zeros(()) for path in scales}, sep="/")
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert {path: -float(leaf) for path, leaf in flatten_dict(updates, sep="/").items()} == scales


@pytest.mark.parametrize(
    ("mode", "count"),
    [("head", 76_900), ("lora", 371_812), ("attention", 28_425_316), ("mlp", 56_746_084), ("full", 85_875_556)],
)
def test_split_params_matches_published_parameter_counts_of_b16(mode, count):
    model = VisionTransformer(100)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    if mode == "lora":
        add = functools.partial(lora.add_lora_weights, rank=8, targets=(r".*/query/kernel", r".*/value/kernel"))
        params = jax.eval_shape(add, jax.random.key(0), params)
    trainable, frozen = optim.split_params(params, optim.MODES[mode])
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == count
    assert f" {count:,} " in optim.describe_trainable(params, optim.MODES[mode]).splitlines()[-1]


def test_split_params_bias_mode_selects_biases_norms_and_head():
    model = VisionTransformer(3, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, mlp_dim=16)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    trainable, frozen = optim.split_params(params, optim.MODES["bias"])
    assert {path[-1] for path in flatten_dict(trainable) if path[0] != "head"} == {"bias", "scale"}
    assert {path[-1] for path in flatten_dict(frozen)} == {"kernel", "pos_embedding", "cls"}


def test_make_schedule_holds_rate_for_hold_steps():
    schedule = optim.make_schedule("linear", learning_rate=1.0, warmup_steps=0, num_steps=100, hold_steps=10)
    assert [float(schedule(count)) for count in (0, 9, 10, 19, 95)] == pytest.approx([1.0, 1.0, 0.9, 0.9, 0.1])


def test_make_schedule_holds_decay_but_not_warmup():
    schedule = optim.make_schedule("linear", learning_rate=1.0, warmup_steps=4, num_steps=24, hold_steps=10)
    rates = [float(schedule(count)) for count in range(24)]
    # The decay is a function of 0, 10 and 20 updates: 1, 1 - 6/20 and 1 - 16/20.
    assert rates == pytest.approx([0.0, 0.25, 0.5, 0.75, *[1.0] * 6, *[0.7] * 10, *[0.2] * 4])
