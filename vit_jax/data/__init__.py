"""Datasets as uint8 images and int labels, in host memory or streamed; preprocessing on the device."""

from vit_jax.data.datasets import (
    READERS,
    DatasetInfo,
    check_dataset,
    check_split,
    dataset_info,
    default_resize,
    load_dataset,
    load_split,
)
from vit_jax.data.fingerprint import DatasetFingerprint, fingerprint
from vit_jax.data.images import IMAGE_SUFFIXES, EncodedImages, decode_image

__all__ = [
    "IMAGE_SUFFIXES",
    "READERS",
    "DatasetFingerprint",
    "DatasetInfo",
    "EncodedImages",
    "check_dataset",
    "check_split",
    "dataset_info",
    "decode_image",
    "default_resize",
    "fingerprint",
    "load_dataset",
    "load_split",
]
