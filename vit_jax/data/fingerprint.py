"""Dataset fingerprints: all processes, and a resumed run, must read the same images."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.types import Dataset, Json


@dataclasses.dataclass(frozen=True)
class DatasetFingerprint:
    """Class names, numbers of images of each class and a SHA-256; see `fingerprint`."""

    class_names: tuple[str, ...]
    train_counts: tuple[int, ...]
    test_counts: tuple[int, ...]
    digest: str
    validation_counts: tuple[int, ...] = ()  # empty without validation images

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return sum(self.train_counts)

    @property
    def num_test(self) -> int:
        """Number of test images."""
        return sum(self.test_counts)

    def __str__(self) -> str:
        """Returns the numbers of images as text."""
        validation = sum(self.validation_counts)
        return f"{count_images(self.num_train, validation, self.num_test)} images"

    def to_json(self) -> dict[str, Json]:
        """Returns the fields as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DatasetFingerprint":
        """Inverts `to_json`."""
        tuples: dict[str, Any] = {key: tuple(item) for key, item in value.items() if isinstance(item, list)}
        return cls(**{**value, **tuples})

    def difference(self, other: "DatasetFingerprint") -> str:
        """Describes how this dataset differs from the other; "" if they are equal."""
        if self.class_names != other.class_names:
            ours, theirs = set(self.class_names), set(other.class_names)
            new, missing = (", ".join(sorted(names)[:5]) or "none" for names in (ours - theirs, theirs - ours))
            return f"other classes (new: {new}; missing: {missing})"
        if str(self) != str(other):
            return f"{self} instead of {other}"
        return "" if self == other else "the same number of images, but other files or labels"


def fingerprint(dataset: Dataset) -> DatasetFingerprint:
    """Returns the fingerprint of class names, labels in order, and image ids, or the image shape without ids.

    It does not depend on pixels, on the root directory, or on the storage.
    """
    digest = hashlib.sha256(json.dumps(dataset.class_names).encode())
    for split in (dataset.train, dataset.test, *([dataset.validation] if dataset.validation else [])):
        shape = [len(split)] if split.ids is not None else split.images.shape
        digest.update(json.dumps(shape).encode())
        digest.update(np.asarray(split.labels, "<i4").tobytes())
        if split.ids is not None:
            digest.update(np.asarray(split.ids, "<u8").tobytes())
    counts = {
        f"{role}_counts": tuple(np.bincount(split.labels, minlength=len(dataset.class_names)).tolist())
        for role, split in dataset.splits.items()
    }
    return DatasetFingerprint(class_names=tuple(dataset.class_names), digest=digest.hexdigest(), **counts)


def count_images(train: int, validation: int, test: int) -> str:
    """Returns the numbers of images as text, such as "90 training, 10 validation and 20 test"."""
    return f"{train:,} training{f', {validation:,} validation' if validation else ''} and {test:,} test"
