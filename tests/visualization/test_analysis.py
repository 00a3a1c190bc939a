import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import VisionTransformer
from vit_jax.visualization import analysis

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_attention_weights_sum_to_one_and_match_reference(remat):
    model = VisionTransformer(7, **SIZES, remat=remat)
    images = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 3)).astype(np.float32)
    params = model.init(jax.random.key(0), images)["params"]
    weights = analysis.attention_weights(model, params, images)
    assert weights.shape == (2, 5, 3, 5, 5) and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-6)

    # First layer, computed from queries and keys of the normalized tokens.
    tree = params["Transformer"]
    attention = tree["encoderblock_0"]["MultiHeadDotProductAttention_1"]
    embedding = params["embedding"]
    patches = images.reshape(5, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(5, 4, 48)
    tokens = patches @ np.reshape(embedding["kernel"], (48, 24)) + embedding["bias"]
    tokens = np.concatenate([np.zeros((5, 1, 24)), tokens], axis=1) + tree["posembed_input"]["pos_embedding"]
    normal = (tokens - tokens.mean(-1, keepdims=True)) / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
    query, key = (
        np.einsum("bnd,dkh->bknh", normal, attention[name]["kernel"]) + attention[name]["bias"][:, None]
        for name in ("query", "key")
    )
    scores = np.exp(np.einsum("bknh,bkmh->bknm", query, key) / np.sqrt(8))
    np.testing.assert_allclose(weights[0], scores / scores.sum(-1, keepdims=True), atol=1e-5)


def test_attention_weights_are_not_returned_by_init_and_apply():
    """Modules always sow them; only `attention_weights` makes the collection mutable."""
    model = VisionTransformer(7, **SIZES)
    images = np.zeros((2, 8, 8, 3), np.float32)
    params = model.init(jax.random.key(0), images)
    assert set(params) == {"params"}
    assert model.apply(params, images).shape == (2, 7)


def test_attention_rollout_averages_heads_and_adds_skip_connection():
    weights = np.zeros((1, 1, 2, 5, 5))
    weights[0, 0, 0] = np.eye(5)[[1, 1, 1, 1, 1]]  # first head: all tokens attend to the first patch
    weights[0, 0, 1] = np.eye(5)[[4, 4, 4, 4, 4]]  # second head: all tokens attend to the last patch
    rollout = analysis.attention_rollout(weights)
    np.testing.assert_allclose(rollout, [[[0.25, 0], [0, 0.25]]])


def test_attention_rollout_multiplies_later_layer_from_left():
    first, second = np.eye(5), np.eye(5)
    first[1] = np.eye(5)[2]
    second[0] = np.eye(5)[1]
    weights = np.stack([first, second])[:, None, None]
    # Layer 1: patch 1 is half itself, half patch 2. Layer 2: the class token is half itself, half patch 1.
    np.testing.assert_allclose(analysis.attention_rollout(weights), [[[0.25, 0.25], [0, 0]]])


def test_attention_rollout_without_class_token_averages_by_pooling_weights():
    """Every patch attends to the first of four; the skip connection contributes half."""
    weights = np.zeros((1, 1, 1, 4, 4))
    weights[..., 0] = 1
    mean = np.full((1, 4), 0.25)
    np.testing.assert_allclose(analysis.attention_rollout(weights, mean), [[[0.625, 0.125], [0.125, 0.125]]])
    last = np.array([[0.0, 0, 0, 1]])
    np.testing.assert_allclose(analysis.attention_rollout(weights, last), [[[0.5, 0], [0, 0.5]]])


def test_attention_maps_returns_class_token_row_or_mean_over_patches():
    weights = np.arange(25.0).reshape(1, 1, 1, 5, 5)
    np.testing.assert_array_equal(analysis.attention_maps(weights)[0, 0, 0], [[1, 2], [3, 4]])
    weights = np.arange(16.0).reshape(1, 1, 1, 4, 4)
    np.testing.assert_array_equal(analysis.attention_maps(weights, class_token=False)[0, 0, 0], [[6, 7], [8, 9]])


@pytest.mark.parametrize("pool", ["mean", "map"])
def test_pooling_weights_sum_to_one(pool):
    """Mean pooling has equal weights; a MAP head has equal weights only if its queries are zero."""
    model = VisionTransformer(3, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, mlp_dim=8, pool=pool)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    params = model.init(jax.random.PRNGKey(0), images)["params"]
    weights = analysis.pooling_weights(model, params, images)
    assert weights.shape == (2, 4)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    assert (np.ptp(weights, axis=-1) > 0.01).all() == (pool == "map")
    if pool == "map":
        query = params["MAPHead_0"]["MultiHeadDotProductAttention_0"]["query"]
        query["kernel"] = jnp.zeros_like(query["kernel"])
        np.testing.assert_allclose(analysis.pooling_weights(model, params, images), 0.25, rtol=1e-5)
    assert analysis.pooling_weights(model.clone(pool="cls"), params, images) is None


def test_position_similarity_returns_cosine_between_patches():
    embeddings = np.array([[[9.0, 9.0], [1.0, 0.0], [0.0, 5.0], [-2.0, 0.0], [3.0, 3.0]]])
    half = np.sqrt(0.5)
    expected = [[1, 0, -1, half], [0, 1, 0, half], [-1, 0, 1, -half], [half, half, -half, 1]]
    np.testing.assert_allclose(analysis.position_similarity(embeddings), expected, atol=1e-6)


def test_position_similarity_without_class_token_includes_every_row():
    embeddings = np.array([[[2.0, 0], [0, 1], [1, 1]]])
    similarity = analysis.position_similarity(embeddings, class_token=False)
    np.testing.assert_allclose(similarity[0], [1, 0, 0.5**0.5], atol=1e-6)


def test_filter_components_returns_principal_components():
    rng = np.random.default_rng(0)
    red, edge = np.zeros((2, 2, 3)), np.zeros((2, 2, 3))
    red[..., 0] = 0.5  # unit norm
    edge[0], edge[1] = np.sqrt(1 / 12), -np.sqrt(1 / 12)
    strong, weak = rng.permutation(np.repeat([-1.0, 1.0], 50)), rng.permutation(np.repeat([-1.0, 1.0], 50))
    weak -= strong * (weak @ strong) / (strong @ strong)
    kernel = 7 + np.einsum("hwc,d->hwcd", red, 3 * strong) + np.einsum("hwc,d->hwcd", edge, weak)
    components, explained = analysis.filter_components(kernel, count=3)
    np.testing.assert_allclose(components[0], red, atol=1e-5)
    np.testing.assert_allclose(np.abs(components[1]), np.abs(edge), atol=1e-5)
    assert explained[0] == pytest.approx(9 * 100 / (9 * 100 + weak @ weak), abs=1e-5)
    assert explained[2] == pytest.approx(0, abs=1e-6)


def test_confusion_matrix_counts_true_and_predicted_classes():
    labels, predictions = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 1, 1, 1, 0, 2])
    counts = analysis.confusion_matrix(labels, predictions, num_classes=4)
    np.testing.assert_array_equal(counts, [[1, 2, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    assert analysis.most_frequent_confusions(counts) == [(0, 1, 2), (2, 0, 1)]
    assert analysis.most_frequent_confusions(counts, count=1) == [(0, 1, 2)]


def test_most_confident_errors_returns_errors_by_descending_confidence():
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8], [0.45, 0.55]])
    labels = np.array([0, 0, 0, 0])
    np.testing.assert_array_equal(analysis.most_confident_errors(probabilities, labels), [2, 1, 3])
    np.testing.assert_array_equal(analysis.most_confident_errors(probabilities, labels, count=1), [2])
