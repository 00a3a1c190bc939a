"""A dataset's name -> uint8 pictures, int labels and class names in host memory.

Known names are `digits`, `cifar10`, `cifar100`, `folder:DIR` and `tfds:NAME`. A split may be sliced as TFDS writes it
(`train[:90%]`). Batches are not made here: the device indexes the arrays.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vit_jax.data.cifar import CIFARS, cifar_shapes, load_cifar
from vit_jax.data.fingerprint import fingerprint
from vit_jax.data.images import IMAGE_SUFFIXES, EncodedImages, decode_image, decode_splits, list_folder
from vit_jax.data.splits import check_disjoint, nearest_first, parse_split, slice_split
from vit_jax.data.tfds import open_tfds
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.types import Dataset, Split

__all__ = [
    "KNOWN_DATASETS",
    "IMAGE_SUFFIXES",
    "EncodedImages",
    "decode_image",
    "fingerprint",
    "load_dataset",
    "load_split",
]

KNOWN_DATASETS = ("digits", "cifar10", "cifar100", "folder:DIR", "tfds:NAME")


def load_dataset(
    name: str,
    *,
    data_dir: str = "",
    train_split: str = "train",
    test_split: str = "test",
    image_size: int,
    classes: Sequence[str] = (),
    crops: bool = False,
    storage: str = "auto",
    device_bytes: int | None = None,
    shapes_only: bool = False,
) -> Dataset:
    """Reads a dataset into host memory, or opens it to be streamed.

    Args:
        name: "digits" | "cifar10" | "cifar100" | "folder:DIR" | "tfds:NAME".
        data_dir: an archive or folder already on disk (cifar10, cifar100), TFDS's own directory (tfds:NAME);
            "" downloads into the cache (cifar10, cifar100) or means TFDS's default.
        train_split: what to train on: a split's name, or a slice of it such as "train[:90%]".
        test_split: what to test on, in the same form; shares no image with `train_split`.
        image_size: pixels, square, that the model sees.
        classes: names of those to keep, in their new order; all unless given. Splits are sliced before. Images of
            other classes are not decoded.
        crops: whether images will be cropped, and so must keep their resolution.
        storage: see `decode_splits`.
        device_bytes: memory of a device; None sets no limit.
        shapes_only: CIFAR's images are neither fetched nor read; zeros that take no memory replace them.

    Returns:
        Both splits, uint8 [n h w 3], or `EncodedImages` of that shape, and int32 [n], and the class names.

    Raises:
        UsageError: an unknown name, split or class, a slice that cannot be read, or slices that overlap.
        UserError: files that are missing, damaged, empty, inconsistent or too large for the memory; an empty slice.
    """
    (train, test), class_names = _open_splits(name, data_dir, (train_split, test_split), shapes_only=shapes_only)
    dataset = Dataset(train=train, test=test, class_names=class_names)
    dataset = keep_classes(dataset, classes) if classes else dataset
    train, test = decode_splits(
        [dataset.train, dataset.test], image_size, crops=crops, storage=storage, device_bytes=device_bytes
    )
    return dataclasses.replace(dataset, train=train, test=test)


def load_split(
    name: str, *, split: str, data_dir: str = "", image_size: int, device_bytes: int | None = None
) -> tuple[Split, tuple[str, ...]]:
    """Reads one split of a dataset, and its class names; see `load_dataset`."""
    (opened,), class_names = _open_splits(name, data_dir, (split,))
    (decoded,) = decode_splits([opened], image_size, device_bytes=device_bytes)
    return decoded, class_names


def _open_splits(
    name: str, data_dir: str, texts: Sequence[str], *, shapes_only: bool = False
) -> tuple[list[Split], tuple[str, ...]]:
    """Opens splits and decodes nothing of folders and TFDS; arguments as in `load_dataset`."""
    kind, _, argument = name.partition(":")
    if kind == "tfds" and argument:
        return open_tfds(argument, data_dir, [parse_split(text) for text in texts])
    if kind == "folder" and argument:
        _refuse_data_dir(name, data_dir)
        return list_folder(Path(argument).expanduser(), [parse_split(text) for text in texts])
    if name not in ("digits", *CIFARS):
        raise UsageError(f"unknown dataset {name!r}; known are {', '.join(nearest_first(name, KNOWN_DATASETS))}")
    splits = [parse_split(text, known=("train", "test")) for text in texts]
    if name == "digits":
        _refuse_data_dir(name, data_dir)
        whole, class_names = _load_digits()
    elif shapes_only:
        whole, class_names = cifar_shapes(CIFARS[name])
    else:
        whole, class_names = load_cifar(CIFARS[name], data_dir, {split.name for split in splits})
    for split in splits:
        check_disjoint([other for other in splits if other.name == split.name], len(whole[split.name]))
    return [slice_split(whole[split.name], split) for split in splits], class_names


def keep_classes(dataset: Dataset, classes: Sequence[str]) -> Dataset:
    """Keeps the images of some classes, which are numbered in the given order.

    Raises:
        UsageError: a class is unknown or named twice, or there are fewer than two.
        UserError: a split has no image of them.
    """
    for name in classes:
        if name not in dataset.class_names:
            near = ", ".join(nearest_first(name, dataset.class_names)[:10])
            raise UsageError(f"config.dataset.classes: no class {name!r}; there are {near}")
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise UsageError(f"config.dataset.classes is {tuple(classes)}; expected at least two different names")
    new_labels = np.full(len(dataset.class_names), -1, np.int32)
    new_labels[[dataset.class_names.index(name) for name in classes]] = np.arange(len(classes))

    def keep(split: Split) -> Split:
        labels = new_labels[split.labels]
        if not np.any(labels >= 0):
            raise UserError(f"no images of the classes {', '.join(classes)}; give larger splits")
        kept = np.flatnonzero(labels >= 0)
        ids = None if split.ids is None else split.ids[kept]
        return Split(images=split.images.take(kept, axis=0), labels=labels[kept], ids=ids)

    return Dataset(train=keep(dataset.train), test=keep(dataset.test), class_names=tuple(classes))


def _refuse_data_dir(name: str, data_dir: str) -> None:
    if data_dir:
        raise UsageError(f"dataset {name!r} does not read data_dir, got {data_dir!r}; leave it empty")


def _load_digits() -> tuple[dict[str, Split], tuple[str, ...]]:
    """Scikit-learn's 1,797 handwritten digits, 8 × 8: 1,437 to train on, 360 to test on.

    Source: the test part of "Optical Recognition of Handwritten Digits", UCI, Alpaydin and Kaynak 1998.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    grey = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)  # [n h w], 0..16 -> 0..255
    images = np.repeat(grey[..., None], 3, axis=-1)  # [n h w c]
    labels = digits.target[order].astype(np.int32)
    num_train = len(order) * 4 // 5
    train = Split(images=images[:num_train], labels=labels[:num_train])
    test = Split(images=images[num_train:], labels=labels[num_train:])
    return {"train": train, "test": test}, tuple(str(digit) for digit in digits.target_names)
