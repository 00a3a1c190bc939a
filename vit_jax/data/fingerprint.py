"""Fingerprint of a dataset: tells whether two processes, or a run and its resumption, read the same images."""

import hashlib
import json
from typing import Any

import numpy as np

from vit_jax.types import Dataset


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Returns class names, number of images and a digest of a dataset, ready for JSON.

    The digest covers class names and, for both splits, the labels in their order and which images these are: file names
    relative to the split's directory for `folder:DIR`, record numbers for `tfds:NAME`, otherwise the image shape. It
    does not cover pixels, the root directory, or whether images are in memory or streamed.

    Returns:
        {"class_names": list of strings, "num_train": int, "num_test": int, "digest": hexadecimal SHA-256}.
    """
    digest = hashlib.sha256(json.dumps(dataset.class_names).encode())
    for split in (dataset.train, dataset.test):
        shape = [len(split)] if split.ids is not None else split.images.shape
        digest.update(json.dumps(shape).encode())
        digest.update(np.asarray(split.labels, "<i4").tobytes())
        if split.ids is not None:
            digest.update(np.asarray(split.ids, "<u8").tobytes())
    return {
        "class_names": list(dataset.class_names),
        "num_train": len(dataset.train),
        "num_test": len(dataset.test),
        "digest": digest.hexdigest(),
    }
