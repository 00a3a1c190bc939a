import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from vit_jax.training import evaluation, metrics
from vit_jax.training.evaluation import ClassScores, Evaluation


def means_of(logits, labels):
    return metrics.means(metrics.masked_sums(*map(jnp.asarray, (logits, labels, labels >= 0))))


def evaluate(labels, predictions, class_names="abcd", **options):
    """Returns the evaluation of predictions with a logit of 2, where the others are 0."""
    labels = np.array(labels, np.int32)
    logits = 2 * np.eye(len(class_names), dtype=np.float32)[predictions]
    means = means_of(logits, labels)
    return Evaluation(class_names=tuple(class_names), labels=labels, logits=logits, means=means, **options)


def test_class_scores_counts_images():
    """Class a: 2 of 3 images, 2 of 3 predictions; b: 1 of 2, 1 of 3; c: never predicted; d: no images."""
    scores = evaluate([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1]).class_scores
    a, b, c, d = scores
    assert a == ClassScores("a", pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3), 3, {"b": 1})
    assert (b.precision, b.recall, b.f1) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert (c.precision, c.recall, c.f1, c.support, c.errors) == (None, 0.0, 0.0, 1, {"b": 1})
    assert (d.precision, d.recall, d.f1, d.support) == (None, None, None, 0)
    assert d.cells() | {"class": "", "images": ""} == dict.fromkeys(d.cells(), "–") | {"class": "", "images": ""}


def test_class_scores_sorts_errors_by_number_of_images():
    (a, *_) = evaluate([0] * 6, [0, 1, 2, 2, 3, 3]).class_scores
    assert list(a.errors.items()) == [("c", 2), ("d", 2), ("b", 1)]
    assert a.cells()["most frequent error"] == "c (2)"


def test_summary_equals_scikit_learn():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 8, 90).astype(np.int32), rng.normal(size=(90, 8)).astype(np.float32)
    means = means_of(logits, labels)
    summary = Evaluation(class_names=tuple("abcdefgh"), labels=labels, logits=logits, means=means).summary()
    assert list(summary)[:3] == ["test/loss", "test/accuracy", "test/accuracy_top5"]
    assert summary["test/accuracy_top5"] == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    assert summary["test/balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, logits.argmax(axis=1)))


def test_summary_contains_interval_and_calibration():
    """Three of four images are right with a confidence of e² / (e² + 1); see test_fit_temperature."""
    result = evaluate([0, 0, 0, 1], [0, 0, 0, 0], "ab")
    summary, confidence = result.summary(), 1 / (1 + np.exp(-2))
    assert summary["test/ece"] == pytest.approx(confidence - 0.75)
    assert summary["test/accuracy_interval"] == pytest.approx([0.300642, 0.954413], abs=1e-6)
    assert summary["test/balanced_accuracy"] == 0.5 and "test/temperature" not in summary
    calibrated = dataclasses.replace(result, temperature=2 / np.log(3)).summary()
    assert calibrated["test/temperature"] == 2 / np.log(3)
    assert calibrated["test/ece_calibrated"] == pytest.approx(0, abs=1e-6)
    assert calibrated["test/loss_calibrated"] < calibrated["test/loss"]
    assert calibrated["test/ece"] == summary["test/ece"]


def test_summary_leaves_out_classes_that_the_dataset_lacks():
    result = evaluate([1, 3, 3], [1, 3, 0], classes=(3, 1))
    assert [row.name for row in result.class_scores] == ["d", "b"]
    assert result.summary()["test/balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)


@pytest.mark.parametrize(("num_classes", "shown"), [(20, 20), (21, 10)])
def test_select_classes_returns_ten_worst_of_many(num_classes, shown):
    scores = [ClassScores(str(i), 1.0, 1.0, 1 - i / 100, 1, {}) for i in range(num_classes)]
    scores[5] = dataclasses.replace(scores[5], f1=None)
    selected = evaluation.select_classes(scores)
    assert len(selected) == shown
    assert selected[0].name == ("0" if num_classes == 20 else "20")
