import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from vit_jax.models import VisionTransformer
from vit_jax.runtime.errors import UsageError
from vit_jax.training import lora

PARAMS = {
    "block": {
        "query": {"kernel": np.ones((6, 2, 3), np.float32), "bias": np.zeros((2, 3), np.float32)},
        "out": {"kernel": np.ones((2, 3, 6), np.float32)},
    },
    "head": {"kernel": np.ones((6, 4), np.float32)},
}
KERNELS = (r".*/query/kernel", r".*/out/kernel", r"head/kernel")


def add(params=PARAMS, *, rank=2, targets=KERNELS):
    return lora.add_lora_weights(jax.random.key(0), params, rank=rank, targets=targets)


def test_add_lora_weights_matches_kernel_shapes():
    shapes = {path: leaf.shape for path, leaf in flatten_dict(add()["lora"], sep="/").items()}
    assert shapes == {
        "block/query/kernel/a": (6, 2),
        "block/query/kernel/b": (2, 2, 3),
        "block/out/kernel/a": (2, 3, 2),
        "block/out/kernel/b": (2, 6),
        "head/kernel/a": (6, 2),
        "head/kernel/b": (2, 4),
    }


def test_add_lora_weights_samples_a_uniformly_with_variance_of_a_third_of_inputs():
    a = add({"head": {"kernel": np.ones((400, 5), np.float32)}}, rank=8, targets=("head/kernel",))["lora"]["head"]
    samples = np.asarray(a["kernel"]["a"])
    assert samples.var() == pytest.approx(1 / (3 * 400), rel=0.1)
    assert 0.98 / 20 < np.abs(samples).max() <= 1 / 20  # the bound of a uniform distribution of that variance


def test_merge_lora_weights_is_identity_at_initialization():
    merged = lora.merge_lora_weights(add(), alpha=16.0)
    jax.tree.map(np.testing.assert_array_equal, merged, PARAMS)


def test_merge_lora_weights_adds_scaled_product():
    tree = {
        "w": {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])},
        "lora": {"w": {"kernel": {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[10.0, 20.0]])}}},
    }
    merged = lora.merge_lora_weights(tree, alpha=0.5)  # rank 1: W + 0.5 · [[10, 20], [20, 40]]
    np.testing.assert_array_equal(merged["w"]["kernel"], [[6.0, 12.0], [13.0, 24.0]])
    assert set(merged) == {"w"}


def test_merge_lora_weights_divides_alpha_by_rank():
    tree = add(rank=4, targets=("head/kernel",))
    tree["lora"]["head"]["kernel"] = {"a": jnp.ones((6, 4)), "b": jnp.ones((4, 4))}
    merged = lora.merge_lora_weights(tree, alpha=8.0)  # 1 + 8 / 4 · (dot product of 4 ones)
    np.testing.assert_array_equal(merged["head"]["kernel"], np.full((6, 4), 9.0))


def test_merge_lora_weights_returns_params_without_lora_unchanged():
    assert lora.merge_lora_weights(PARAMS, alpha=1.0) is PARAMS


def test_add_lora_weights_rejects_target_that_matches_nothing():
    with pytest.raises(
        UsageError, match=r"'.\*/querry/kernel' matches no parameter; expected kernels only, such as block/query/kernel"
    ):
        add(targets=(r".*/querry/kernel",))


@pytest.mark.parametrize(
    ("target", "listed"),
    [
        (".*/query/.*", "block/query/bias"),
        ("pos_embedding", "pos_embedding"),
        ("norm/.*|pos_.*|block/.*", "block/query/bias, norm/bias, norm/scale"),
    ],
)
def test_add_lora_weights_rejects_targets_that_are_not_kernels(target, listed):
    norm = {"bias": np.zeros(6, np.float32), "scale": np.ones(6, np.float32)}
    params = {**PARAMS, "norm": norm, "pos_embedding": np.ones((1, 5, 6), np.float32)}
    with pytest.raises(UsageError, match=f"matches {listed}; expected kernels only"):
        add(params, targets=(target,))


def test_merge_lora_weights_matches_logits_of_low_rank_branch():
    """The logits are x·W + alpha / r · (x·a)·b with W = 0, as the head is initialized with zeros."""
    model = VisionTransformer(3, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, mlp_dim=16)
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    params = model.init(jax.random.key(2), images)["params"]
    tree = add(params, targets=("head/kernel",))
    tree["lora"]["head"]["kernel"]["b"] = jax.random.normal(jax.random.key(3), (2, 3))
    logits = model.apply({"params": lora.merge_lora_weights(tree, alpha=4.0)}, images)
    weights = tree["lora"]["head"]["kernel"]
    tokens = model.apply({"params": params}, images, capture_intermediates=True)[1]["intermediates"]
    cls = tokens["Transformer"]["encoder_norm"]["__call__"][0][:, 0]
    np.testing.assert_allclose(logits, 4.0 / 2 * (cls @ weights["a"]) @ weights["b"], atol=1e-5)
