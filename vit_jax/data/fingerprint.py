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
    """Class names, numbers of images and a SHA-256; see `fingerprint`."""

    class_names: tuple[str, ...]
    num_train: int
    num_test: int
    digest: str

    def __str__(self) -> str:
        """Returns the numbers of images as text."""
        return f"{self.num_train:,} training and {self.num_test:,} test images"

    def to_json(self) -> dict[str, Json]:
        """Returns the fields as JSON values."""
        return {**dataclasses.asdict(self), "class_names": list(self.class_names)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DatasetFingerprint":
        """Inverts `to_json`."""
        return cls(**{**value, "class_names": tuple(value["class_names"])})

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
    for split in (dataset.train, dataset.test):
        shape = [len(split)] if split.ids is not None else split.images.shape
        digest.update(json.dumps(shape).encode())
        digest.update(np.asarray(split.labels, "<i4").tobytes())
        if split.ids is not None:
            digest.update(np.asarray(split.ids, "<u8").tobytes())
    return DatasetFingerprint(tuple(dataset.class_names), len(dataset.train), len(dataset.test), digest.hexdigest())
