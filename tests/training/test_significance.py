import numpy as np
import pytest

from vit_jax.training import significance


@pytest.mark.parametrize(
    ("num_correct", "num_images", "expected"),
    [
        # 90 of 100, with z = 1.959964: (0.9 + z²/200 ± z · sqrt(0.9 · 0.1 / 100 + z²/40000)) / (1 + z²/100)
        (90, 100, (0.825634, 0.944770)),
        (0, 10, (0.0, 0.277533)),  # z² / (10 + z²)
        (10, 10, (0.722467, 1.0)),
    ],
)
def test_wilson_interval_equals_formula(num_correct, num_images, expected):
    assert significance.wilson_interval(num_correct, num_images) == pytest.approx(expected, abs=1e-6)


def test_mean_interval_is_students():
    """A sample std of 0.1 of three accuracies: 4.302653 · 0.1 / √3 = 0.248414."""
    assert significance.mean_interval([0.5, 0.6, 0.7]) == pytest.approx((0.351586, 0.848414), abs=1e-6)
    assert significance.mean_interval([0.9, 0.99]) == pytest.approx((0.373221, 1.0), abs=1e-6)  # 12.7062 · 0.045
    assert significance.mean_interval([0.5]) is None


def correctness(both, only_first, only_second, neither):
    """Returns which images two models classify correctly, from the numbers of each kind of image."""
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    return first, np.repeat([True, False, True, False], [both, only_first, only_second, neither])


def test_mcnemar_p_value_is_exact():
    """Eight of ten: (1 + 10 + 45) · 2 / 2^10."""
    assert significance.mcnemar_p_value(*correctness(50, 8, 2, 40)) == pytest.approx(112 / 1024)
    assert significance.mcnemar_p_value(*correctness(50, 2, 8, 40)) == pytest.approx(112 / 1024)
    assert significance.mcnemar_p_value(*correctness(50, 0, 0, 50)) == 1.0


def test_compare_correctness_bootstraps_images():
    """The difference per image has a mean of 0.03 and a variance of 0.09 - 0.03²."""
    first, second = correctness(500, 60, 30, 410)
    result = significance.compare_correctness(first[None], second[None])
    margin = 1.96 * np.sqrt((0.09 - 0.03**2) / 1000)
    assert result.difference == pytest.approx(0.03)
    assert result.interval == pytest.approx((0.03 - margin, 0.03 + margin), abs=1.1e-3)  # steps of 1/1000
    assert not result.within_noise and result.p_value < 0.05
    assert str(result).startswith("+3.00 percentage points (95% interval +1.")
    assert str(result).endswith("larger than noise of the test images")


def test_compare_correctness_does_not_depend_on_order_of_images():
    first, second = correctness(50, 8, 2, 40)
    order = np.random.default_rng(1).permutation(100)
    result = significance.compare_correctness(first[None], second[None])
    assert significance.compare_correctness(first[order][None], second[order][None]) == result
    assert significance.compare_correctness(first[None], second[None], seed=1).interval != result.interval
    assert result.within_noise and str(result).endswith("McNemar p = 0.11): within noise of the test images")


def test_compare_correctness_adds_noise_between_seeds():
    """Accuracies 0.9, 0.8, 0.7 against 0.6 thrice: the noise of the seeds is t(2) · 0.1 / √3, the images add some."""
    group = np.stack([np.arange(1000) < 1000 * accuracy for accuracy in (0.9, 0.8, 0.7)])
    baseline = np.tile(np.arange(1000) < 600, (3, 1))
    result = significance.compare_correctness(group, baseline)
    assert result.difference == pytest.approx(0.2) and result.p_value is None
    seeds, images = 4.302653 * 0.1 / np.sqrt(3), 1.96 * np.sqrt(np.var(group.mean(axis=0) - baseline[0]) / 1000)
    half = (result.interval[1] - result.interval[0]) / 2
    assert seeds * 0.9 < half < (seeds + images) * 1.1
    assert result.within_noise and str(result).endswith("within noise")
    single = significance.compare_correctness(group[1:2], baseline[:1])
    assert not single.within_noise and single.one_seed  # the same difference without the noise of seeds


def test_compare_correctness_of_equal_runs_is_within_noise():
    correct = np.arange(10)[None] < 7
    result = significance.compare_correctness(correct, correct)
    assert (result.difference, result.interval, result.p_value, result.within_noise) == (0.0, (0.0, 0.0), 1.0, True)
