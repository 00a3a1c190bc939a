import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from vit_jax.training import calibration


def binary(confidences):
    """Returns probabilities of two classes that predict class 0 with the given confidences."""
    confidences = np.asarray(confidences)
    return np.stack([confidences, 1 - confidences], axis=1)


def test_reliability_averages_bins_of_equal_mass():
    """Bins (0.6, 0.7), (0.8, 0.9): |0.65 - 0.5| and |0.85 - 1| with half the images each."""
    bins = calibration.reliability(binary([0.9, 0.6, 0.8, 0.7]), np.array([0, 0, 0, 1]), num_bins=2)
    np.testing.assert_allclose((bins.counts, bins.confidences, bins.accuracies), [[2, 2], [0.65, 0.85], [0.5, 1]])
    assert bins.error == pytest.approx(0.15)


def test_reliability_keeps_equal_confidences_in_one_bin():
    """Of six images, 0.9 five times: no bin splits them, whatever their order."""
    labels = np.array([0, 0, 0, 1, 1, 0])
    for order in (np.arange(6), np.arange(6)[::-1]):
        bins = calibration.reliability(binary([0.6, *[0.9] * 5])[order], labels[order], num_bins=3)
        np.testing.assert_allclose((bins.counts, bins.accuracies), [[6], [4 / 6]])
        assert bins.error == pytest.approx((0.6 + 4.5) / 6 - 4 / 6)


def test_reliability_equals_calibration_curve_of_scikit_learn():
    rng = np.random.default_rng(0)
    confidences = rng.uniform(0.5, 1, 150)
    labels = (rng.random(150) > confidences**2).astype(np.int64)
    bins = calibration.reliability(binary(confidences), labels)
    accuracies, means = calibration_curve(labels == 0, confidences, n_bins=15, strategy="quantile")
    assert bins.counts.tolist() == [10] * 15
    np.testing.assert_allclose(bins.accuracies, accuracies)
    np.testing.assert_allclose(bins.confidences, means)


def test_fit_temperature_matches_confidence_to_accuracy():
    """Three of four images are right with logits (2, 0): sigmoid(2 / T) = 3/4 for T = 2 / log 3."""
    logits, labels = np.tile(np.float32([2, 0]), (4, 1)), np.array([0, 0, 0, 1])
    temperature = calibration.fit_temperature(logits, labels)
    assert temperature == pytest.approx(2 / np.log(3), rel=1e-4)
    loss = calibration.cross_entropy(logits, labels, temperature=temperature)
    assert loss == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))


def test_fit_temperature_is_bounded_if_all_predictions_are_right_or_wrong():
    logits = np.tile(np.float32([1, 0]), (3, 1))
    assert np.exp(-4) <= calibration.fit_temperature(logits, np.zeros(3, int)) < 0.05  # the loss is 0 in float64
    assert calibration.fit_temperature(logits, np.ones(3, int)) == pytest.approx(np.exp(4), rel=1e-3)
