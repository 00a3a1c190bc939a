import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference import MICRO, flat_params, nest
from sklearn.linear_model import LogisticRegression

import vit_jax
from vit_jax import data, models, pretrained
from vit_jax.classifier import Classifier, load_classifier
from vit_jax.data import preprocess
from vit_jax.pretrained import ModelMetadata
from vit_jax.run import load_run
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UserError
from vit_jax.training import calibration
from vit_jax.types import Split


def create_classifier(model, params, *, image_size):
    names = tuple(map(str, range(model.num_classes)))
    metadata = ModelMetadata.from_model(model, image_size=image_size, class_names=names)
    mesh = sharding.create_mesh(jax.local_devices()[:1])
    return Classifier(model=model, params=params, metadata=metadata, mesh=mesh)


@pytest.fixture(scope="module")
def classifier():
    """A micro ViT of 8-pixel images with 5 classes and random parameters."""
    return create_classifier(models.VisionTransformer(5, **MICRO), nest(flat_params()), image_size=8)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3)).astype(np.uint8)


def test_predict_returns_softmax_of_logits(classifier, images):
    logits = classifier.logits(images)
    assert (logits.shape, logits.dtype) == ((7, 5), np.float32)
    exponentials = np.exp(logits)
    expected = exponentials / exponentials.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(classifier.predict(images), expected, atol=1e-6)


def test_predict_does_not_depend_on_batch_size(classifier, images):
    expected = classifier.predict(images)
    np.testing.assert_allclose(classifier.predict(images, batch_size=3), expected, atol=1e-6)
    np.testing.assert_allclose(classifier.predict(images[2]), expected[2], atol=1e-6)
    assert classifier.predict(images[:0]).shape == (0, 5)


def test_measure_equals_evaluate_and_fits_temperature_on_validation_images(classifier, images):
    split = Split(images, np.array([0, 1, 2, 3, 4, 0, 1]))
    evaluation = classifier.measure(split, validation=Split(images[:3], np.array([0, 0, 1])), batch_size=4)
    assert evaluation.means == classifier.evaluate(split, batch_size=4)
    np.testing.assert_array_equal(evaluation.probabilities, classifier.predict(images, batch_size=4))
    assert evaluation.temperature == calibration.fit_temperature(evaluation.logits[:3], np.array([0, 0, 1]))
    assert classifier.measure(split).temperature is None


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 8, 8, 3), np.float32), ((8, 8), np.uint8), ((2, 8, 8, 1), np.uint8), ((1, 2, 8, 8, 3), np.uint8)],
)
def test_predict_rejects_invalid_images(classifier, shape, dtype):
    with pytest.raises(ValueError) as caught:
        classifier.predict(np.zeros(shape, dtype))
    assert str(caught.value) == f"got images {np.dtype(dtype)} {list(shape)}; expected uint8 [n h w 3] or [h w 3]"


def test_logits_resizes_and_normalizes_images(classifier):
    """White images of any size are preprocessed to ones."""
    white = classifier.model.apply({"params": classifier.params}, np.ones((1, 8, 8, 3), np.float32))
    np.testing.assert_allclose(classifier.logits(np.full((1, 30, 20, 3), 255, np.uint8)), white, atol=1e-5)
    np.testing.assert_array_equal(classifier.preprocess(np.full((1, 30, 20, 3), 255, np.uint8)), np.ones((1, 8, 8, 3)))


def test_forward_matches_logits_when_jitted(classifier, images):
    logits = jax.jit(classifier.forward)(classifier.params, images)
    np.testing.assert_allclose(logits, classifier.logits(images), atol=1e-5)


def test_features_returns_inputs_of_vit_head(classifier, images):
    features = classifier.features(images, batch_size=3)
    assert features.shape == (7, 6) and features.dtype == np.float32
    inputs = preprocess.prepare(None, images, image_size=8)
    _, state = classifier.model.apply({"params": classifier.params}, inputs, capture_intermediates=True)
    tokens = state["intermediates"]["Transformer"]["encoder_norm"]["__call__"][0]
    np.testing.assert_allclose(features, tokens[:, 0], atol=1e-5)


def test_features_returns_inputs_of_resnet_head(images):
    model = models.ResNet(5, (1,), 32)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))["params"]
    params["head"]["kernel"] = np.random.default_rng(1).normal(size=(128, 5)).astype(np.float32)
    classifier = create_classifier(model, params, image_size=8)
    features = classifier.features(images)
    assert features.shape == (7, 128)
    np.testing.assert_allclose(features @ params["head"]["kernel"], classifier.logits(images), atol=1e-3)


def test_features_support_linear_probe():
    classifier, dataset = vit_jax.load("micro"), data.load_dataset("digits", image_size=32)
    train, test = (classifier.features(split.images[:320]) for split in (dataset.train, dataset.test))
    probe = LogisticRegression(max_iter=1000).fit(train, dataset.train.labels[:320])
    assert probe.score(test, dataset.test.labels[:320]) > 0.85


def test_evaluate_counts_every_image_once(classifier, images):
    """The labels equal the predicted classes, except for two of seven images."""
    predictions = classifier.logits(images).argmax(axis=-1)
    labels = predictions.copy()
    labels[[1, 4]] = (labels[[1, 4]] + 1) % 5
    results = classifier.evaluate(Split(images, labels), batch_size=3, prefix="mine")
    assert results["mine/accuracy"] == 5 / 7 and results["mine/accuracy_top5"] == 1
    losses = -np.log(classifier.predict(images)[np.arange(7), labels])
    assert results["mine/loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_predict_matches_test_accuracy_of_run(finished_run):
    run = load_run(finished_run)
    test = run.load_test_split()
    probabilities = run.predict(test.images)
    assert probabilities.shape == (360, 10)
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-5)
    assert np.mean(probabilities.argmax(axis=-1) == test.labels) == run.evaluate()["test/accuracy"]


def test_repr_omits_parameters(classifier):
    assert repr(classifier) == "Classifier(VisionTransformer, 8 px, 5 classes: 0, 1, 2, …)"


def test_require_trained_head_rejects_zeros(classifier):
    classifier.require_trained_head("mine")
    params = {**classifier.params, "head": jax.tree.map(np.zeros_like, classifier.params["head"])}
    with pytest.raises(UserError, match="^mine has an untrained \\(all-zero\\) head; fine-tune it first$"):
        create_classifier(classifier.model, params, image_size=8).require_trained_head("mine")


def test_load_classifier_requires_head(tmp_path):
    flat = {key: leaf for key, leaf in flat_params().items() if not key.startswith("head/")}
    pretrained.save_npz(tmp_path / "file.npz", nest(flat))
    with pytest.raises(UserError, match="file.npz: it has no trained classification head; fine-tune it first"):
        load_classifier(str(tmp_path / "file.npz"))


def test_load_classifier_infers_sizes_from_parameters(tmp_path):
    pretrained.save_npz(tmp_path / "file.npz", nest(flat_params(num_tokens=10)))
    loaded = load_classifier(str(tmp_path / "file.npz"))
    assert (loaded.image_size, loaded.class_names) == (12, ("0", "1", "2", "3", "4"))
    assert flatten_dict(loaded.params, sep="/").keys() == flat_params().keys()
