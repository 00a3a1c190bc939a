"""`python -m vit_jax.probe --model NAME --dataset folder:DIR`: how good are the features of a model for a dataset?"""

from vit_jax.runtime.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before JAX is imported

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int
from ml_collections import ConfigDict

import vit_jax
from vit_jax import data, pretrained
from vit_jax.classifier import Classifier
from vit_jax.config import add_dataset_arguments, parse_dataset
from vit_jax.data import findings
from vit_jax.data.fingerprint import count_images
from vit_jax.run import Run
from vit_jax.runtime.arguments import add_model_arguments, create_parser, parse_known_arguments
from vit_jax.runtime.errors import UsageError, UserError, run_command
from vit_jax.runtime.progress import progress_bar
from vit_jax.training import experiment
from vit_jax.training.significance import wilson_interval
from vit_jax.types import Dataset, Json

VALIDATION_FRACTION = 0.1
"""Fraction of the training images that C and k are chosen on if the dataset has no validation split."""

INVERSE_REGULARIZATIONS = tuple(10.0**exponent for exponent in range(-5, 3))
"""Values of C to choose from, scikit-learn's inverse strength of the L2 penalty."""

NEIGHBORS = (1, 2, 5, 10, 20, 50, 100)
"""Values of k to choose from."""

_PATIENCE = 2  # values of C after the best one; larger values converge slowly and overfit
_MAX_ITERATIONS = 1000  # of L-BFGS
_MIN_SIZE_FOR_THREADS = 2**22  # numbers; below it, waiting for threads can take longer than the work of one


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the images of a split, and their labels."""

    inputs: Float32[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def take(self, rows: Int[np.ndarray, " m"]) -> "Features":
        """Selects images."""
        return Features(self.inputs[rows], self.labels[rows])


@dataclasses.dataclass(frozen=True)
class Result:
    """Accuracy of a classifier of features.

    Attributes:
        name: "logistic regression" or "k-nearest neighbors".
        parameter: "C" or "k".
        value: the value of the parameter with the best validation accuracy.
        validation_accuracy: of the classifier with this value, before it was fitted to all training images.
        num_correct: correctly classified test images.
        num_images: test images.
    """

    name: str
    parameter: str
    value: float
    validation_accuracy: float
    num_correct: int
    num_images: int

    @property
    def accuracy(self) -> float:
        """Test accuracy."""
        return self.num_correct / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the test accuracy (Wilson 1927)."""
        return wilson_interval(self.num_correct, self.num_images)

    def to_json(self) -> dict[str, Json]:
        """Returns the accuracies and the chosen parameter as JSON values."""
        return {
            "name": self.name,
            self.parameter: self.value,
            "validation/accuracy": self.validation_accuracy,
            "test/accuracy": self.accuracy,
            "test/accuracy_interval": list(self.interval),
        }


Predict = Callable[[Features, Float32[np.ndarray, "n d"], Sequence[float]], Iterator[Int[np.ndarray, " n"]]]
"""(training features, other features, values of a parameter) -> for each value, the labels of the others."""


def main(argv: list[str] | None = None) -> int:
    """Prints the accuracies of the classifiers."""
    started = time.perf_counter()
    parser = create_parser(
        "python -m vit_jax.probe",
        "Test how well the features of a model separate the classes of a dataset: logistic regression and k-nearest\n"
        "neighbors, without training the model. A slice of a large dataset saves time, such as\n"
        "--config.dataset.train_split=train[:20%].",
        "--model augreg/B_16 --dataset folder:DIR",
        "--model micro --dataset cifar10 --data_dir cifar-10-binary.tar.gz",
        "--workdir runs/digits --json",
    )
    add_model_arguments(parser)
    add_dataset_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=256, help="images per batch (default: 256)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments, overrides = parse_known_arguments(parser, argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch_size is {arguments.batch_size}; expected a positive integer")
    config = None
    if arguments.config or arguments.dataset or overrides:
        config = parse_dataset(parser, arguments, overrides)
    elif pretrained.is_name(arguments.model) or Path(arguments.model).is_file():
        parser.error(f"{arguments.model} is a checkpoint, not a run; give --dataset or --config as well")
    classifier = vit_jax.load(arguments.model, step=arguments.step)
    if config is None:
        config = config_of_run(classifier, arguments)
    dataset = load_dataset(config, classifier)
    features = {
        name: Features(classifier.features(split.images, batch_size=arguments.batch_size), split.labels)
        for name, split in dataset.splits.items()
    }
    features_seconds = time.perf_counter() - started
    results = probe(**features, seed=config.seed)
    most_frequent = np.bincount(features["train"].labels).argmax()
    facts: dict[str, Any] = {
        "model": arguments.model,
        "dataset": config.dataset.name,
        "features": features["train"].inputs.shape[1],
        "classes": len(dataset.class_names),
        **{f"{name}_images": len(split) for name, split in features.items()},
        "results": [result.to_json() for result in results],
        "most_frequent_class_accuracy": float(np.mean(features["test"].labels == most_frequent)),
        "features_seconds": features_seconds,
        "seconds": time.perf_counter() - started,
    }
    print(json.dumps(facts) if arguments.json else format_facts(facts, results))
    return 0


def config_of_run(classifier: Classifier, arguments: argparse.Namespace) -> ConfigDict:
    """Returns the config of a run, for its dataset; raises UsageError if it names none."""
    if not isinstance(classifier, Run) or classifier.dataset_given:
        found = "was trained on a dataset given from Python" if isinstance(classifier, Run) else "is not a run"
        raise UsageError(f"{arguments.model} {found}; give --dataset or --config as well")
    config = classifier.config.copy_and_resolve_references()
    if arguments.data_dir is not None:
        config.dataset.data_dir = arguments.data_dir
    return config


def load_dataset(config: ConfigDict, classifier: Classifier) -> Dataset:
    """Loads the config's dataset for the classifier's preprocessing; prints warnings on stderr, as training does."""
    config.update(image_size=classifier.image_size, augment="none")
    config.dataset.test_resize = classifier.metadata.test_resize
    config.ablation.test_augment = classifier.test_augment
    dataset = data.load_dataset(config.dataset.name, **experiment.dataset_options(config))
    if dataset.train.paths is not None:
        for line in findings.describe_warnings(dataset):
            print(f"warning: {line}", file=sys.stderr)
    return dataset


def probe(train: Features, test: Features, validation: Features | None = None, *, seed: int = 0) -> list[Result]:
    """Returns the results of logistic regression and k-nearest neighbors on standardized features.

    C and k have the best accuracy on `validation`, or on a tenth of `train`, stratified and sampled with `seed`. Then
    the classifier is fitted to all of `train`.

    Raises:
        UserError: the training images are of one class, or there are none to choose C and k on.
    """
    from threadpoolctl import threadpool_limits

    if len(np.unique(train.labels)) < 2:
        raise UserError("the training images are of one class; expected at least two")
    fitted = train
    if validation is None:
        rows = hold_out(train.labels, fraction=VALIDATION_FRACTION, seed=seed)
        if not len(rows):
            raise UserError("no class has two training images, one of them for validation; give more images")
        fitted, validation = train.take(np.setdiff1d(np.arange(len(train)), rows)), train.take(rows)
    neighbors = tuple(k for k in NEIGHBORS if k <= len(fitted))
    methods: list[tuple[str, str, Predict, Sequence[float], int]] = [
        ("logistic regression", "C", predict_by_regression, INVERSE_REGULARIZATIONS, _PATIENCE),
        ("k-nearest neighbors", "k", predict_by_neighbors, neighbors, len(neighbors)),
    ]
    results = []
    for name, parameter, predict, values, patience in methods:
        with threadpool_limits(1 if train.inputs.size < _MIN_SIZE_FOR_THREADS else None):
            predictions = progress_bar(predict(fitted, validation.inputs, values), total=len(values), desc=name)
            accuracies = (float(np.mean(predicted == validation.labels)) for predicted in predictions)
            index, accuracy = _first_best(accuracies, patience=patience)
            predictions.close()
            (predicted,) = predict(train, test.inputs, [values[index]])
        num_correct = int(np.sum(predicted == test.labels))
        results.append(Result(name, parameter, values[index], accuracy, num_correct, len(test)))
    return results


def _first_best(accuracies: Iterator[float], *, patience: int) -> tuple[int, float]:
    """Returns (index, accuracy) of the first maximum; reads at most `patience` values after it."""
    best = (0, -1.0)
    for index, accuracy in enumerate(accuracies):
        if accuracy > best[1]:
            best = (index, accuracy)
        elif index - best[0] == patience:
            break
    return best


def hold_out(labels: Int[np.ndarray, " n"], *, fraction: float, seed: int) -> Int[np.ndarray, " m"]:
    """Returns the rows of a random fraction of the images of each class, at least one, but none of a single image."""
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    rows = [of_class[: max(1, round(fraction * len(of_class)))] for of_class in classes if len(of_class) > 1]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *rows]))


def predict_by_regression(
    train: Features, inputs: Float32[np.ndarray, "n d"], values: Sequence[float]
) -> Iterator[Int[np.ndarray, " n"]]:
    """Yields the predictions of multinomial logistic regressions, for each C; each starts from the one before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.inputs)
    train_inputs, inputs = scaler.transform(train.inputs), scaler.transform(inputs)
    regression = LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)
    for value in values:
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # validation judges the result
            regression.set_params(C=value).fit(train_inputs, train.labels)
        yield regression.predict(inputs)


def predict_by_neighbors(
    train: Features, inputs: Float32[np.ndarray, "n d"], values: Sequence[float]
) -> Iterator[Int[np.ndarray, " n"]]:
    """Yields the most frequent label of the k training images with the largest cosine similarity, for each k."""
    from scipy.stats import mode
    from sklearn.neighbors import NearestNeighbors
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import Normalizer, StandardScaler

    scale = make_pipeline(StandardScaler(), Normalizer()).fit(train.inputs)  # the distance is 2 - 2 · cosine
    search = NearestNeighbors(algorithm="brute").fit(scale.transform(train.inputs))
    rows = search.kneighbors(scale.transform(inputs), n_neighbors=int(max(values)), return_distance=False)
    nearest = train.labels[rows]  # [n k], nearest first
    for value in values:
        yield mode(nearest[:, : int(value)], axis=1).mode


def format_facts(facts: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Formats the facts that --json prints, with the results as a table."""
    counts = [facts.get(f"{name}_images", 0) for name in ("train", "validation", "test")]
    lines = [
        "{model} on {dataset}: {features} features, {num_images} images, {classes} classes".format(
            num_images=count_images(*counts), **facts
        ),
        "",
        f"{'':<20} {'chosen':<10}{'validation':>10}{'test':>10}   95% interval",
    ]
    for result in results:
        low, high = result.interval
        lines.append(
            f"{result.name:<20} {f'{result.parameter} = {result.value:g}':<10}{result.validation_accuracy:>10.2%}"
            f"{result.accuracy:>10.2%}   {low:.2%} to {high:.2%}"
        )
    lines += [
        f"{'most frequent class':<41}{facts['most_frequent_class_accuracy']:>10.2%}",
        "",
        "time: {seconds:.0f} s, of which features {features_seconds:.0f} s".format(**facts),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
