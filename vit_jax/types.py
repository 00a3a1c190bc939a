"""The few types that rooms hand to each other."""

import dataclasses
from typing import Any

import numpy as np

Params = dict[str, Any]
"""Nested dictionary of arrays; its keys joined by "/" are the keys of a released file."""

FlatParams = dict[str, Any]
"""The same parameters as one dictionary: joined key -> array."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Pictures of one split.

    Attributes:
        images: uint8 [n h w 3], RGB, in host memory; or what reads like it and decodes files (`data.EncodedImages`).
        labels: int32 [n], indices into the dataset's class names.
        ids: uint64 [n], the same in memory and streamed: hashes of the file names relative to the split's directory, or
            the record numbers of TFDS; None for a dataset that is always read whole.
    """

    images: Any
    labels: np.ndarray
    ids: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether every picture is decoded."""
        return isinstance(self.images, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What a run trains and is tested on; `class_names[label]` names a label."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
