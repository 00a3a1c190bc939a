"""Classifiers of features, compared with scikit-learn's own on digits and on features that can be checked by hand."""

import json

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import vit_jax
from vit_jax import data
from vit_jax.probe import Features, hold_out, predict_by_neighbors, predict_by_regression, probe
from vit_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def digits():
    """Pixels of 600 digits as training features, and of 300 others."""
    inputs, labels = load_digits(return_X_y=True)
    inputs = inputs.astype(np.float32)
    return Features(inputs[:600], labels[:600]), Features(inputs[600:900], labels[600:900])


def test_hold_out_takes_fraction_of_each_class():
    labels = np.array([0] * 20 + [1] * 3 + [2])
    rows = hold_out(labels, fraction=0.1, seed=0)
    assert np.bincount(labels[rows], minlength=3).tolist() == [2, 1, 0]
    assert np.array_equal(rows, hold_out(labels, fraction=0.1, seed=0))
    assert any(not np.array_equal(rows, hold_out(labels, fraction=0.1, seed=seed)) for seed in range(1, 4))


def test_predict_by_neighbors_takes_most_frequent_label_of_nearest():
    """Features of mean 0 and std 1; by cosine similarity, (3, 1) is nearest to (1, 1), then (1, -1) twice."""
    train = Features(
        np.array([[1, 1], [1, -1], [1, -1], [-1, 1], [-1, 1], [-1, -1]], np.float32), np.array([0, 1, 1, 2, 2, 3])
    )
    one, three = predict_by_neighbors(train, np.array([[3, 1]], np.float32), [1, 3])
    assert (one.tolist(), three.tolist()) == ([0], [1])


def test_predict_by_neighbors_equals_scikit_learn(digits):
    train, test = digits
    ks = [1, 4, 15]
    for k, predicted in zip(ks, predict_by_neighbors(train, test.inputs, ks), strict=True):
        reference = make_pipeline(StandardScaler(), KNeighborsClassifier(k, metric="cosine"))
        assert np.array_equal(predicted, reference.fit(train.inputs, train.labels).predict(test.inputs))


def test_predict_by_regression_equals_regressions_without_warm_start(digits):
    train, test = digits
    values = [1e-4, 1e-2]
    for c, predicted in zip(values, predict_by_regression(train, test.inputs, values), strict=True):
        reference = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
        assert np.array_equal(predicted, reference.fit(train.inputs, train.labels).predict(test.inputs))


def test_probe_chooses_on_validation_and_fits_all_training_images(digits):
    train, test = digits
    regression, neighbors = probe(train, test, seed=3)
    assert (regression.parameter, neighbors.parameter) == ("C", "k")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=regression.value, max_iter=1000))
    assert regression.accuracy == model.fit(train.inputs, train.labels).score(test.inputs, test.labels)
    model = make_pipeline(StandardScaler(), KNeighborsClassifier(neighbors.value, metric="cosine"))
    assert neighbors.accuracy == model.fit(train.inputs, train.labels).score(test.inputs, test.labels)
    low, high = neighbors.interval
    assert low < neighbors.accuracy < high and neighbors.num_images == 300


def test_probe_uses_given_validation_split():
    """Of the values of k, only 1 is right for the validation image, and so it is used for the test image."""
    inputs = np.array([[0, 1], [0, -1], [0, -1], [4, 4], [-4, -4], [4, -4]], np.float32)
    train = Features(inputs, np.array([0, 1, 1, 1, 1, 1]))
    near_first = Features(np.array([[0, 2]], np.float32), np.array([0]))
    neighbors = probe(train, near_first, near_first)[1]
    assert (neighbors.value, neighbors.validation_accuracy, neighbors.num_correct) == (1, 1.0, 1)
    others = Features(near_first.inputs, np.array([1]))
    assert probe(train, near_first, others)[1].value > 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [([1, 1, 1], "the training images are of one class"), ([0, 1, 2], "no class has two training images")],
)
def test_probe_rejects_labels_without_choice(labels, message):
    features = Features(np.eye(3, dtype=np.float32), np.array(labels))
    with pytest.raises(UserError, match=message):
        probe(features, features)


def test_main_probes_features_of_run(finished_run, run_cli):
    splits = {"train_split": "train[:300]", "validation_split": "train[300:400]", "test_split": "test[:100]"}
    overrides = [f"--config.dataset.{key}={value}" for key, value in splits.items()]
    result = run_cli("vit_jax.probe", ["--workdir", finished_run, "--dataset", "digits", "--json", *overrides])
    assert result.code == 0, result.stderr
    values = json.loads(result.stdout)
    assert [values[f"{name}_images"] for name in ("train", "validation", "test")] == [300, 100, 100]
    classifier = vit_jax.load(finished_run)
    digits = data.load_dataset("digits", image_size=classifier.image_size, **splits)
    features = {
        name: Features(classifier.features(split.images), split.labels) for name, split in digits.splits.items()
    }
    assert values["results"] == [json.loads(json.dumps(result.to_json())) for result in probe(**features)]
    assert values["results"][0]["test/accuracy"] > 0.5 > values["most_frequent_class_accuracy"]


def test_main_uses_dataset_of_run(finished_run, run_cli):
    result = run_cli("vit_jax.probe", ["--workdir", finished_run])
    assert result.code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].endswith("on digits: 96 features, 1,437 training and 360 test images, 10 classes")
    assert lines[3].startswith("logistic regression  C = ") and lines[4].startswith("k-nearest neighbors  k = ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "micro"], "micro is a checkpoint, not a run; give --dataset or --config as well"),
        (["--model", "micro", "--dataset", "digits", "--batch_size", "0"], "--batch_size is 0; expected a positive"),
        (["--model", "micro", "--dataset", "digits", "--jsn"], "unknown flag --jsn; did you mean --json? (see"),
        (["--model", "micro", "--config.seed=1"], "no dataset; give --dataset, such as folder:DIR, or a --config"),
        (["--model", "micro", "--dataset", "flowers"], "unknown dataset 'flowers'; expected one of"),
    ],
)
def test_main_rejects_flags(run_cli, argv, message):
    result = run_cli("vit_jax.probe", argv)
    assert result.code == 2 and len(result.stderr.splitlines()) == 1
    assert message in result.stderr
