import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from vit_jax.training import metrics


def test_masked_sums_excludes_masked_images():
    logits = jnp.array([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    sums = metrics.masked_sums(logits, jnp.array([0, 0, 1]), jnp.array([True, True, False]))
    assert int(sums["count"]) == 2
    assert int(sums["correct"]) == 1
    # -log of softmax: log(1 + e^-2) for the correct prediction, log(1 + e^2) for the wrong one
    assert float(sums["loss"]) == pytest.approx(np.log1p(np.exp(-2)) + np.log1p(np.exp(2)), rel=1e-6)


def test_masked_sums_counts_top5_predictions():
    logits = jnp.arange(7.0)[None].repeat(7, axis=0)  # class 6 is best, 0 worst
    sums = metrics.masked_sums(logits, jnp.arange(7), jnp.ones(7, bool))
    assert int(sums["correct"]) == 1
    assert int(sums["correct_top5"]) == 5


def test_masked_sums_returns_chance_accuracy_for_zero_logits():
    sums = metrics.masked_sums(jnp.zeros((10, 10)), jnp.arange(10), jnp.ones(10, bool))
    assert int(sums["correct"]) == 1
    assert int(sums["correct_top5"]) == 5


def test_means_divides_by_count():
    results = metrics.means({"loss": 3.0, "correct": 1, "correct_top5": 2, "count": 4, "next_row": 8})
    assert results == {"test/loss": 0.75, "test/accuracy": 0.25, "test/accuracy_top5": 0.5}


def test_cross_entropy_smooths_labels():
    logits, labels = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([0])
    log_probabilities = np.log(np.exp(logits) / np.exp(logits).sum())
    target = np.array([[0.9 + 0.1 / 3, 0.1 / 3, 0.1 / 3]])
    loss = metrics.cross_entropy(logits, labels, label_smoothing=0.1)
    np.testing.assert_allclose(loss, -(target * log_probabilities).sum(axis=1), rtol=1e-6)


def test_cross_entropy_rejects_shapes_that_differ_from_annotations():
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'labels'"):
        metrics.cross_entropy(jnp.zeros((2, 10)), jnp.zeros(3, jnp.int32))
