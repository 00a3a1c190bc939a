"""Figures of a classifier on one split: accuracy, calibration, and scores of each class."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float32, Int

from vit_jax.training import calibration
from vit_jax.training.calibration import Reliability
from vit_jax.training.significance import Interval, wilson_interval

_MAX_CLASSES, _NUM_WORST = 20, 10  # of the classes that a table shows


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """Scores of one class; None where they are undefined.

    Attributes:
        name: name of the class.
        precision: fraction of the images predicted as this class that are of it.
        recall: fraction of the images of this class that are predicted as it.
        f1: harmonic mean of precision and recall.
        support: number of images of this class.
        errors: wrong predictions for images of this class -> number of images, the most frequent first.
    """

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    errors: dict[str, int]

    def cells(self) -> dict[str, str]:
        """Returns {column title: text}."""
        scores = {"precision": self.precision, "recall": self.recall, "F1": self.f1}
        name, count = next(iter(self.errors.items()), ("–", 0))
        return {
            "class": self.name,
            **{title: "–" if score is None else f"{score:.3f}" for title, score in scores.items()},
            "images": f"{self.support:,}",
            "most frequent error": f"{name} ({count:,})" if count else name,
        }


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """Logits for the images of a test split, and what follows from them.

    Attributes:
        class_names: names of the logits.
        labels: int32 [n], logit indices.
        logits: float32 [n classes].
        means: "test/loss", "test/accuracy" and "test/accuracy_top5".
        temperature: fitted on validation images; None without them.
        classes: logit indices of the dataset's classes, if it has only some of them; None for all.
    """

    class_names: tuple[str, ...]
    labels: Int[np.ndarray, " n"]
    logits: Float32[np.ndarray, "n classes"]
    means: dict[str, float]
    temperature: float | None = None
    classes: Sequence[int] | None = None

    @functools.cached_property
    def probabilities(self) -> Float32[np.ndarray, "n classes"]:
        """Class probabilities, without temperature; equal to those of `Classifier.predict`."""
        return np.asarray(jax.nn.softmax(self.logits))

    @functools.cached_property
    def predictions(self) -> Int[np.ndarray, " n"]:
        """Predicted classes, logit indices."""
        return np.asarray(self.logits.argmax(axis=1))

    @functools.cached_property
    def reliability(self) -> Reliability:
        """Confidence and accuracy in bins of equal mass."""
        return calibration.reliability(self.probabilities, self.labels)

    @functools.cached_property
    def calibrated_reliability(self) -> Reliability | None:
        """The same of the probabilities that are calibrated with the temperature; None without one."""
        if self.temperature is None:
            return None
        return calibration.reliability(np.asarray(jax.nn.softmax(self.logits / self.temperature)), self.labels)

    @property
    def accuracy_interval(self) -> Interval:
        """Wilson's 95% interval of the accuracy."""
        return wilson_interval(round(self.means["test/accuracy"] * len(self.labels)), len(self.labels))

    def summary(self) -> dict[str, float | list[float]]:
        """Returns the means and, as "test/…", the other figures: balanced accuracy, calibration, the interval."""
        recalls = [scores.recall for scores in self.class_scores if scores.recall is not None]
        summary: dict[str, float | list[float]] = {
            **self.means,
            "test/accuracy_interval": list(self.accuracy_interval),
            "test/balanced_accuracy": math.fsum(recalls) / len(recalls),
            "test/ece": self.reliability.error,
        }
        if self.temperature is not None and self.calibrated_reliability is not None:
            loss = calibration.cross_entropy(self.logits, self.labels, temperature=self.temperature)
            summary["test/temperature"] = self.temperature
            summary["test/ece_calibrated"] = self.calibrated_reliability.error
            summary["test/loss_calibrated"] = loss
        return summary

    @functools.cached_property
    def class_scores(self) -> list[ClassScores]:
        """Scores of each of the dataset's classes."""
        from sklearn.metrics import precision_recall_fscore_support  # takes long to import

        classes = range(len(self.class_names)) if self.classes is None else self.classes
        precision, recall, f1, support = precision_recall_fscore_support(
            self.labels, self.predictions, labels=list(classes), zero_division=np.nan
        )
        pairs = Counter(zip(self.labels.tolist(), self.predictions.tolist(), strict=True))
        errors: dict[int, dict[str, int]] = {}
        for (label, prediction), count in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
            if label != prediction:
                errors.setdefault(label, {})[self.class_names[prediction]] = count
        return [
            ClassScores(
                name=self.class_names[index],
                precision=_optional(precision[i]),
                recall=_optional(recall[i]),
                f1=_optional(f1[i]),
                support=int(support[i]),
                errors=errors.get(index, {}),
            )
            for i, index in enumerate(classes)
        ]


def _optional(score: float) -> float | None:
    return None if math.isnan(score) else float(score)


def select_classes(scores: Sequence[ClassScores]) -> list[ClassScores]:
    """Returns the classes that a table shows: up to 20, all of them; else the ten with the lowest F1, worst first."""
    if len(scores) <= _MAX_CLASSES:
        return list(scores)
    defined = [(row.f1, i) for i, row in enumerate(scores) if row.f1 is not None]
    return [scores[i] for _, i in sorted(defined)[:_NUM_WORST]]
