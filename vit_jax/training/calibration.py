"""Calibration of class probabilities: reliability, expected calibration error, temperature scaling."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

NUM_BINS = 15
_LOG_TEMPERATURES = (-4.0, 4.0)  # bounds: 0.02 to 55


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Images in bins of increasing confidence, the probability of the predicted class.

    Attributes:
        counts: number of images in each bin, positive.
        confidences: mean confidence.
        accuracies: fraction of correct predictions.
    """

    counts: Int[np.ndarray, " bins"]
    confidences: Float[np.ndarray, " bins"]
    accuracies: Float[np.ndarray, " bins"]

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over images of |confidence - accuracy| of their bins."""
        return float(np.average(np.abs(self.confidences - self.accuracies), weights=self.counts))


def reliability(
    probabilities: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], *, num_bins: int = NUM_BINS
) -> Reliability:
    """Sorts images by confidence into bins of equal numbers of images, up to one.

    Images of equal confidence are in one bin, so that the order of the images does not matter; bins that they leave
    empty are omitted.

    Source: Guo et al. 2017, Eq. 2 and 3; bins of equal mass as in Nguyen and O'Connor 2015.

    Examples:
        >>> import numpy as np
        >>> from vit_jax.training.calibration import reliability
        >>> probabilities = np.array([[0.6, 0.4], [0.3, 0.7], [0.9, 0.1], [0.9, 0.1]])
        >>> bins = reliability(probabilities, np.array([0, 0, 0, 0]), num_bins=2)
        >>> bins.confidences, bins.accuracies, round(bins.error, 6)
        (array([0.65, 0.9 ]), array([0.5, 1. ]), 0.125)
    """
    confidences = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    bins = np.searchsorted(np.sort(confidences), confidences) * num_bins // len(labels)
    counts = np.bincount(bins, minlength=num_bins)
    kept = counts > 0
    sums = [np.bincount(bins, weights=values, minlength=num_bins) for values in (confidences, correct)]
    return Reliability(counts[kept], *(values[kept] / counts[kept] for values in sums))


def cross_entropy(
    logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], *, temperature: float = 1.0
) -> float:
    """Returns the mean cross-entropy of softmax(logits / temperature) in nats, computed in float64."""
    from scipy.special import logsumexp  # takes long to import

    scaled = logits.astype(np.float64) / temperature
    return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))


def fit_temperature(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> float:
    """Returns the temperature T that minimizes the cross-entropy of softmax(logits / T), from 0.02 to 55.

    Fit it on images that are used neither for training nor for the test. Source: Guo et al. 2017, section 4.2.
    """
    from scipy.optimize import minimize_scalar  # takes long to import

    def loss(log_temperature: float) -> float:
        return cross_entropy(logits, labels, temperature=float(np.exp(log_temperature)))

    return float(np.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-6}).x))
