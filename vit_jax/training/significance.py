"""Confidence intervals of accuracies, and paired tests of models on the same images."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

Interval = tuple[float, float]
"""The lower and the upper end."""

_LEVEL = 0.95
_NUM_RESAMPLES = 10_000
_RESAMPLES_PER_CHUNK = 100  # bounds the memory


def wilson_interval(num_correct: int, num_images: int) -> Interval:
    """Returns the 95% interval of an accuracy over independent images; `num_images` is positive.

    Source: Wilson 1927, without continuity correction.

    Examples:
        >>> from vit_jax.training.significance import wilson_interval
        >>> [round(end, 4) for end in wilson_interval(90, 100)]
        [0.8256, 0.9448]
    """
    from scipy.stats import binomtest  # takes long to import

    interval = binomtest(num_correct, num_images).proportion_ci(_LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(accuracies: Sequence[float]) -> Interval | None:
    """Returns Student's 95% interval of the mean over seeds, within [0, 1]; None for less than two accuracies."""
    from scipy.stats import t

    if len(accuracies) < 2:
        return None
    mean, error = statistics.mean(accuracies), statistics.stdev(accuracies) / math.sqrt(len(accuracies))
    margin = float(t.ppf(0.5 + _LEVEL / 2, len(accuracies) - 1)) * error
    return max(mean - margin, 0.0), min(mean + margin, 1.0)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The difference between the mean accuracies of two groups of runs on the same images, as fractions."""

    difference: float
    interval: Interval  # 95%
    p_value: float | None  # of McNemar's exact test, for one run in each group
    one_seed: bool  # a group is one run: its noise from seed to seed is unknown

    @property
    def within_noise(self) -> bool:
        """True if the interval contains 0, or McNemar's test does not reject equal accuracies at 5%."""
        return self.interval[0] <= 0 <= self.interval[1] or (self.p_value is not None and self.p_value >= 1 - _LEVEL)

    def __str__(self) -> str:
        """Returns the difference, its interval and the conclusion on one line."""
        points, low, high = (f"{100 * value:+.2f}" for value in (self.difference, *self.interval))
        p_value = "" if self.p_value is None else f", McNemar p = {self.p_value:.2g}"
        conclusion = f"{'within' if self.within_noise else 'larger than'} noise{' of the test images' * self.one_seed}"
        return f"{points} percentage points (95% interval {low} to {high}{p_value}): {conclusion}"


def compare_correctness(
    correct: Bool[np.ndarray, "runs n"], baseline: Bool[np.ndarray, "others n"], *, seed: int = 0
) -> Comparison:
    """Compares two groups of runs, each of one config with different seeds, by which of the same n images are correct.

    The interval is the percentile interval of a paired bootstrap, which resamples the images, the same ones for all
    runs. The noise between the k > 1 seeds of a group is added as Student's t with k - 1 degrees of freedom. `seed` is
    of these random numbers.

    Source: Efron and Tibshirani 1993, chapter 13; for the seeds Fisher 1935 (Behrens and Fisher's distribution).
    """
    rng = np.random.default_rng(seed)
    samples = np.split(_resample_images(np.concatenate([correct, baseline]), rng), [len(correct)], axis=1)
    mean, other = (
        sample.mean(axis=1) + _sample_seed_noise(group.mean(axis=1), len(sample), rng)
        for sample, group in zip(samples, (correct, baseline), strict=True)
    )
    low, high = np.quantile(mean - other, [0.5 - _LEVEL / 2, 0.5 + _LEVEL / 2])
    single = len(correct) == len(baseline) == 1
    return Comparison(
        difference=float(correct.mean() - baseline.mean()),
        interval=(float(low), float(high)),
        p_value=mcnemar_p_value(correct[0], baseline[0]) if single else None,
        one_seed=min(len(correct), len(baseline)) == 1,
    )


def mcnemar_p_value(correct: Bool[np.ndarray, " n"], baseline: Bool[np.ndarray, " n"]) -> float:
    """Returns the p-value of McNemar's exact, two-sided test on the images that only one of two models classifies.

    Source: McNemar 1947; exact as a binomial test.
    """
    from scipy.stats import binomtest

    only_first, only_second = int(np.sum(correct & ~baseline)), int(np.sum(baseline & ~correct))
    return float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0


def _resample_images(correct: Bool[np.ndarray, "r n"], rng: np.random.Generator) -> Float[np.ndarray, "samples r"]:
    """Returns the accuracy of each run on resampled images; images that the same runs classify are interchangeable."""
    patterns, counts = np.unique(correct.T, axis=0, return_counts=True)  # [patterns r], [patterns]
    chunks = [
        rng.multinomial(counts.sum(), counts / counts.sum(), size=_RESAMPLES_PER_CHUNK) @ patterns / counts.sum()
        for _ in range(_NUM_RESAMPLES // _RESAMPLES_PER_CHUNK)
    ]
    return np.concatenate(chunks)


def _sample_seed_noise(accuracies: Float[np.ndarray, " k"], count: int, rng: np.random.Generator) -> np.ndarray:
    """Samples the error of the mean over k seeds, [count]; 0 for one seed, whose noise is unknown."""
    if len(accuracies) == 1:
        return np.zeros(count)
    error: float = accuracies.std(ddof=1) / math.sqrt(len(accuracies))
    return error * rng.standard_t(len(accuracies) - 1, count)
