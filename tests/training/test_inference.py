import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax import data
from vit_jax.data import preprocess
from vit_jax.models import VisionTransformer
from vit_jax.runtime import sharding
from vit_jax.training import metrics
from vit_jax.training.inference import FeatureForward, ImageForward, Inference

MODEL = VisionTransformer(10, patch_size=4, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32)


@pytest.fixture(scope="module")
def digits():
    """Real images of 8 × 8 pixels."""
    split = data.load_dataset("digits", image_size=8).train
    return type(split)(split.images[:20], split.labels[:20])


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


def inference_of(forward, *, num_devices=1, batch_size=8):
    return Inference(forward, sharding.create_mesh(jax.devices()[:num_devices]), batch_size=batch_size)


@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 1), (1, 7), (1, 20), (1, 64), (8, 8), (8, 24), (8, 64)])
def test_sum_metrics_counts_every_image_once_for_any_batch_size(digits, params, num_devices, batch_size):
    inference = inference_of(ImageForward(MODEL, image_size=8), num_devices=num_devices, batch_size=batch_size)
    replicated = sharding.replicated(inference.mesh)
    arrays = sharding.device_put((params, digits.images, digits.labels), replicated)
    sums = inference.sum_metrics(*arrays)
    logits = MODEL.apply({"params": params}, preprocess.normalize(digits.images))
    expected = metrics.masked_sums(logits, jnp.asarray(digits.labels), jnp.ones(20, bool))
    assert int(sums["count"]) == 20
    assert int(sums["correct"]) == int(expected["correct"])
    assert int(sums["correct_top5"]) == int(expected["correct_top5"])
    assert float(sums["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)


def test_logits_and_sums_equals_outputs_and_sum_metrics(digits, params):
    inference = inference_of(ImageForward(MODEL, image_size=8), num_devices=8, batch_size=16)
    placed = sharding.device_put(params, sharding.replicated(inference.mesh))
    logits, sums = inference.logits_and_sums(placed, digits.images, digits.labels)
    np.testing.assert_array_equal(logits, inference.outputs(placed, digits.images))
    assert sums == inference.sum_metrics(placed, digits.images, digits.labels)


def test_sum_metrics_samples_same_test_crops_for_any_batch_size(digits, params):
    def loss(test_augment, batch_size):
        forward = ImageForward(MODEL, image_size=8, test_augment=test_augment)
        return float(
            inference_of(forward, batch_size=batch_size).sum_metrics(params, digits.images, digits.labels)["loss"]
        )

    assert loss("square_crop", 20) == pytest.approx(loss("square_crop", 8), rel=1e-6)
    assert loss("square_crop", 20) != pytest.approx(loss("none", 20), rel=1e-4)


def test_outputs_returns_logits_of_every_image(digits, params):
    expected = MODEL.apply({"params": params}, preprocess.normalize(digits.images))
    for num_devices, batch_size in ((1, 7), (8, 16)):
        inference = inference_of(ImageForward(MODEL, image_size=8), num_devices=num_devices, batch_size=batch_size)
        on_mesh = sharding.device_put(params, sharding.replicated(inference.mesh))
        np.testing.assert_allclose(inference.outputs(on_mesh, digits.images), expected, atol=1e-5)


def test_outputs_augments_each_view_of_each_image_differently(params):
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)

    def compute(images, **options):
        forward = ImageForward(MODEL, image_size=8, test_augment="flip" if options else "none")
        return np.asarray(inference_of(forward).outputs(params, images, **options))

    plain, flipped = compute(images), compute(images[:, :, ::-1])
    views = compute(images, num_views=4, seed=1)
    assert views.shape == (40, 10)
    is_plain = np.isclose(views, np.tile(plain, (4, 1)), atol=1e-4).all(axis=1)
    is_flipped = np.isclose(views, np.tile(flipped, (4, 1)), atol=1e-4).all(axis=1)
    assert (is_plain ^ is_flipped).all() and 8 < is_plain.sum() < 32
    by_view = is_plain.reshape(4, 10)
    assert any((by_view[0] != by_view[view]).any() for view in (1, 2, 3))


def test_feature_forward_applies_head_only(digits, params):
    inputs = preprocess.normalize(digits.images)
    features = MODEL.clone(num_classes=None).apply({"params": params}, inputs)
    logits = FeatureForward(MODEL).logits(params, features)
    np.testing.assert_allclose(logits, MODEL.apply({"params": params}, inputs), atol=1e-5)
