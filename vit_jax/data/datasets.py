"""Loads datasets by name: uint8 images in host memory or decoded on demand, int labels, class names.

To add a dataset, write a `Reader` in a new module and add it to `READERS`.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence, Set
from typing import Protocol, Required, TypedDict, Unpack, runtime_checkable

import numpy as np

from vit_jax.data.cifar import open_cifar
from vit_jax.data.csv_file import open_csv
from vit_jax.data.findings import find_duplicates
from vit_jax.data.fingerprint import count_images
from vit_jax.data.folder import open_folder
from vit_jax.data.images import DamagedImagesError, EncodedImages, Failed, ImageError, decode_all
from vit_jax.data.splits import ROLES, OpenedSplits, Request, nearest_first, slice_splits
from vit_jax.data.tfds import open_tfds
from vit_jax.runtime import resources
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.types import Dataset, Findings, ImageSource, Split


@runtime_checkable
class Reader(Protocol):
    """Opens the requested splits as arrays or as `EncodedImages`.

    Raises UserError if files are missing, damaged or inconsistent.
    """

    def __call__(self, request: Request) -> OpenedSplits:
        """Returns the splits by role and the class names."""


def open_digits(request: Request) -> OpenedSplits:
    """Loads scikit-learn's handwritten digits, 8 × 8 pixels: 1,437 training and 360 test images.

    Source: the test part of "Optical Recognition of Handwritten Digits", UCI, Alpaydin and Kaynak 1998.
    """
    from sklearn.datasets import load_digits

    slices = request.slices(known=("train", "test"))
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    grey = np.round(digits.images[order] * (255 / 16)).astype(np.uint8)  # [n h w], 0..16 -> 0..255
    images, labels = np.repeat(grey[..., None], 3, axis=-1), digits.target[order].astype(np.int32)  # [n h w c], [n]
    stop = len(order) * 4 // 5
    whole = {"train": Split(images[:stop], labels[:stop]), "test": Split(images[stop:], labels[stop:])}
    return OpenedSplits(slice_splits(whole, slices), tuple(map(str, digits.target_names)))


READERS: dict[str, Reader] = {  # DIR and NAME are placeholders
    "cifar10": open_cifar,
    "cifar100": open_cifar,
    "csv:FILE": open_csv,
    "digits": open_digits,
    "folder:DIR": open_folder,
    "tfds:NAME": open_tfds,
}


class DatasetOptions(TypedDict, total=False):
    """Options shared by the functions that open a dataset.

    Attributes:
        image_size: height and width of the model's input, pixels; required.
        train_split: name of a split, or a slice in TFDS syntax, such as "train[:90%]".
        validation_split: the same; "" is the validation split of a folder or CSV, or the one made from its training
            images; none for other datasets.
        test_split: the same as `train_split`; the three must not overlap.
        test_fraction: of the images of each class, for the test split of a folder or CSV that has none.
        validation_fraction: the same, of the training images that are left, for the validation split; 0 makes none.
        split_seed: seed of the splits that are made, and of slices of a folder or CSV.
        data_dir: archive or directory of CIFAR, or data_dir of TFDS; "" downloads CIFAR, or is the default of TFDS.
        classes: class names to keep, in label order, after slicing the splits; all if empty.
        damaged: "error" raises for images that cannot be decoded, "skip" leaves them out.
        verified: all files are known to be intact; otherwise, streamed images are decoded once to check them.
        test_resize: one of `types.RESIZES`, for images that are not cropped; see `crops.resized_size`.
        crops: training images will be cropped at random, and so keep their resolution.
        storage: "memory", "stream" or "auto", the default: memory if the images take at most half of it.
        device_bytes: memory of a device; None sets no limit.
    """

    image_size: Required[int]
    train_split: str
    validation_split: str
    test_split: str
    data_dir: str
    classes: Sequence[str]
    test_fraction: float
    validation_fraction: float
    split_seed: int
    damaged: str
    verified: bool
    test_resize: str
    crops: bool
    storage: str
    device_bytes: int | None


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Sizes and class names of a dataset."""

    num_train: int
    num_test: int
    image_shape: tuple[int, ...]  # [h w 3]
    class_names: tuple[str, ...]
    in_memory: bool  # or streamed
    num_validation: int = 0

    def __str__(self) -> str:
        """Returns a one-line summary."""
        height, width, _ = self.image_shape
        return (
            f"{count_images(self.num_train, self.num_validation, self.num_test)} images of {height} × {width} pixels, "
            f"{len(self.class_names)} classes{'' if self.in_memory else ', streamed'}"
        )

    def describe_storage(self) -> str:
        """Returns a line with the memory that image files take once they are decoded, or that they are streamed."""
        height, width, channels = self.image_shape
        if not self.in_memory:
            return "stream: every step decodes its images; crops are taken from all pixels of a file"
        num_bytes = (self.num_train + self.num_validation + self.num_test) * height * width * channels
        return f"memory: {num_bytes / 2**20:,.1f} MiB, decoded once to {height} × {width} pixels"

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "DatasetInfo":
        """Returns the sizes and class names of a loaded dataset."""
        train, test, num_validation = dataset.train, dataset.test, len(dataset.validation or ())
        shape, in_memory = train.images.shape[1:], train.in_memory
        return cls(len(train), len(test), shape, dataset.class_names, in_memory, num_validation)


def load_dataset(name: str, **options: Unpack[DatasetOptions]) -> Dataset:
    """Loads a dataset into host memory, or opens it for streaming.

    Args:
        name: "cifar10", "cifar100", "digits", "folder:DIR", "csv:FILE" or "tfds:NAME".
        **options: see `DatasetOptions`.

    Raises:
        UsageError: an unknown name, split or class, empty or overlapping slices, or a storage that is not possible.
        UserError: missing, damaged or inconsistent files; `DamagedImagesError` for images that cannot be decoded.

    Examples:
        >>> from vit_jax import data
        >>> digits = data.load_dataset("digits", train_split="train[:10%]", image_size=16)
        >>> digits.train.images.shape, digits.train.images.dtype, len(digits.test)
        ((144, 8, 8, 3), dtype('uint8'), 360)
    """
    splits, class_names, findings = _load(name, **options)
    return create_dataset(splits, class_names, findings)


def create_dataset(
    splits: Mapping[str, Split], class_names: Sequence[str], findings: Findings | None = None
) -> Dataset:
    """Returns a dataset of splits by role."""
    return Dataset(
        train=splits["train"],
        test=splits["test"],
        class_names=tuple(class_names),
        validation=splits.get("validation"),
        findings=findings or Findings(),
    )


def load_split(name: str, *, split: str, **options: Unpack[DatasetOptions]) -> tuple[Split, tuple[str, ...]]:
    """Loads one split of a dataset and the class names.

    `split` is "train", "validation" or "test", the splits of `load_dataset` with these options, or any other name or
    slice. Raises UsageError if there is no validation split; see also `load_dataset`.
    """
    splits, class_names, _ = _load(name, only=split, **options)
    if not splits:
        raise UsageError(f"{name} has no validation split; set dataset.validation_split, such as 'train[90%:]'")
    (loaded,) = splits.values()
    return loaded, class_names


def dataset_info(name: str, **options: Unpack[DatasetOptions]) -> DatasetInfo:
    """Returns the sizes of what `load_dataset` would return; downloads and decodes nothing.

    Sizes are exact, except that `classes` of CIFAR and TFDS are assumed to be equally frequent in every slice, and that
    only images whose headers are damaged are found.
    """
    splits, class_names, _ = _load(name, dry_run=True, **options)
    return DatasetInfo.from_dataset(create_dataset(splits, class_names))


def _load(
    name: str,
    *,
    image_size: int,
    train_split: str = "train",
    validation_split: str = "",
    test_split: str = "test",
    data_dir: str = "",
    classes: Sequence[str] = (),
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    split_seed: int = 0,
    damaged: str = "error",
    verified: bool = False,
    test_resize: str = "squash",
    crops: bool = False,
    storage: str = "auto",
    device_bytes: int | None = None,
    only: str = "",
    dry_run: bool = False,
) -> tuple[dict[str, Split], tuple[str, ...], Findings]:
    reader = find_reader(name)
    if data_dir and reader in (open_digits, open_folder, open_csv):
        raise UsageError(f"dataset.data_dir is {data_dir!r}, which {name!r} does not use; leave it empty")
    texts = {"train": train_split, "validation": validation_split, "test": test_split}
    if only and only not in ROLES:
        texts, only = {**texts, "other": only}, "other"
    splits, class_names, notes = reader(
        Request(
            name=name,
            splits=texts,
            only=only,
            data_dir=data_dir,
            classes=classes,
            split_seed=split_seed,
            test_fraction=test_fraction,
            validation_fraction=validation_fraction,
            dry_run=dry_run,
        )
    )
    if classes:
        splits = {role: keep_classes(split, class_names, classes) for role, split in splits.items()}
        class_names = tuple(classes)
    if not splits:
        return {}, class_names, Findings()

    errors: list[ImageError] = []
    sizes: set[tuple[int, int]] = set()
    if storage != "stream" and not any(split.in_memory for split in splits.values()):
        for role, split in splits.items():
            found, failed = split.images.read_sizes()
            splits[role], sizes = drop_failed(split, failed, errors), sizes | found
    storage, size = choose_storage(
        list(splits.values()), image_size, sizes=sizes, crops=crops, storage=storage, device_bytes=device_bytes
    )
    # Images that keep another size are resized on the device, with the same result.
    resize = test_resize if size == (image_size, image_size) else "squash"
    check = damaged == "skip" or not (only or verified)
    for role, split in splits.items():
        decoded, failed = _decode(split, storage, size, resize, check=check, dry_run=dry_run)
        splits[role] = drop_failed(decoded, failed, errors)
    if errors and damaged == "error":
        raise DamagedImagesError(errors)
    check_not_empty(name, splits, class_names, errors)
    skipped = tuple(f"{error.path} ({error.reason})" for error in errors)
    duplicates = () if only or dry_run else find_duplicates(list(splits.values()))
    return splits, class_names, Findings(notes=notes, damaged=skipped, duplicates=duplicates)


def drop_failed(split: Split, failed: Failed, errors: list[ImageError]) -> Split:
    """Removes images that cannot be decoded from a split, and appends their errors to `errors`."""
    if not failed:
        return split
    errors += [failed[row] for row in sorted(failed)]
    return split.take(np.setdiff1d(np.arange(len(split)), list(failed)))


def check_not_empty(
    name: str, splits: Mapping[str, Split], class_names: Sequence[str], errors: Sequence[ImageError]
) -> None:
    """Raises UserError if all images of a split, or all training images of a class, were skipped."""
    if not errors:
        return
    for role, split in splits.items():
        lost = np.flatnonzero(np.bincount(split.labels, minlength=len(class_names)) == 0)
        if not len(split) or (role == "train" and len(lost)):
            which = f"class {class_names[lost[0]]!r}" if len(split) else f"{role} split"
            raise UserError(f"{name}: no image of the {which} can be decoded; first of {len(errors):,}: {errors[0]}")


def default_resize(name: str) -> str:
    """Returns the resize of a dataset's test images, one of `types.RESIZES`, if the config does not give it."""
    return "center_crop" if name.partition(":")[0] in ("folder", "csv") else "squash"


def check_dataset(dataset: Dataset) -> Dataset:
    """Validates a user's dataset; loads image sources other than `EncodedImages` into memory."""
    if not isinstance(dataset, Dataset):
        raise UsageError(f"dataset is a {type(dataset).__name__}; expected a vit_jax.types.Dataset")
    splits = {}
    for role, split in dataset.splits.items():
        images = split.images if isinstance(split.images, EncodedImages) else np.asarray(split.images[:])
        split = dataclasses.replace(split, images=images)
        splits[role] = check_split(split, num_classes=len(dataset.class_names), name=f"dataset.{role}")
    shapes = [split.images.shape[1:] for split in splits.values()]
    if len(set(shapes)) > 1:
        sizes = " and ".join(f"{h} × {w}" for h, w, _ in shapes)
        names = "training, validation and test" if len(shapes) > 2 else "training and test"
        raise UsageError(f"dataset: {names} images are {sizes} pixels; expected the same size")
    return create_dataset(splits, dataset.class_names)


def check_split(split: Split, *, num_classes: int, name: str = "split") -> Split:
    """Validates a user's images and labels; returns them with int32 labels.

    Raises:
        UsageError: images are not uint8 [n h w 3], or labels are not n class indices; the message starts with `name`.
    """
    images = split.images if isinstance(split.images, ImageSource) else np.asarray(split.images)
    labels, dtype = np.asarray(split.labels), getattr(images, "dtype", np.dtype(np.uint8))
    if dtype != np.uint8 or len(images.shape) != 4 or images.shape[-1] != 3:
        raise UsageError(f"{name}: images are {dtype} {list(images.shape)}; expected uint8 [n h w 3]")
    are_integers = labels.dtype.kind in "iu" and labels.size > 0
    if labels.shape != (len(images),) or not are_integers or not 0 <= labels.min() <= labels.max() < num_classes:
        limits = f" from {labels.min()} to {labels.max()}" if are_integers else ""
        raise UsageError(
            f"{name}: labels are {labels.dtype} {list(labels.shape)}{limits} of {len(images)} images; "
            f"expected integers [n] from 0 to {num_classes - 1}, n at least 1"
        )
    return Split(images=images, labels=labels.astype(np.int32), ids=split.ids, paths=split.paths)


def find_reader(name: str) -> Reader:
    """Returns the reader of a dataset such as "cifar10" or "folder:DIR"."""
    kind, _, argument = name.partition(":")
    for pattern, reader in READERS.items():
        known_kind, _, placeholder = pattern.partition(":")
        if kind == known_kind and bool(argument) == bool(placeholder):
            return reader
    raise UsageError(f"unknown dataset {name!r}; expected one of {', '.join(nearest_first(name, READERS))}")


def keep_classes(split: Split, class_names: Sequence[str], classes: Sequence[str]) -> Split:
    """Keeps the images of the given classes and renumbers the labels in this order."""
    unknown = [name for name in classes if name not in class_names]
    if unknown or not 2 <= len(set(classes)) == len(classes):
        found = f"no class {unknown[0]!r}" if unknown else f"got {tuple(classes)}"
        near = ", ".join(nearest_first((unknown or classes)[0], class_names)[:10])
        raise UsageError(f"dataset.classes: {found}; expected at least two different names, such as {near}")
    new_labels = np.full(len(class_names), -1, np.int32)
    new_labels[[class_names.index(name) for name in classes]] = np.arange(len(classes))
    rows = np.flatnonzero(new_labels[split.labels] >= 0)
    if not len(rows):
        raise UserError(f"no images of the classes {', '.join(classes)}; choose larger splits")
    kept = split.take(rows)
    return dataclasses.replace(kept, labels=new_labels[kept.labels])


def choose_storage(
    splits: Sequence[Split],
    image_size: int,
    *,
    sizes: Set[tuple[int, int]],
    crops: bool,
    storage: str,
    device_bytes: int | None,
) -> tuple[str, tuple[int, int]]:
    """Returns "memory" or "stream", and the decoded (width, height) in pixels; `sizes` are those of all images.

    "auto" is "memory" if the images take at most half of the available memory of host and device. Images in memory
    have one size: their own, if all are equal and at most twice `image_size`; otherwise `image_size`. Crops need full
    resolution: "auto" streams them if the images are larger or differ in size.
    """
    problem, size = "", (image_size, image_size)
    if splits[0].in_memory:
        problem = "only folder:DIR, csv:FILE and tfds:NAME can be streamed" if storage == "stream" else ""
    elif storage != "stream":
        common = next(iter(sizes)) if len(sizes) == 1 else None
        small = common is not None and max(common) <= 2 * image_size
        decoded_size = common if common and (crops or small) else size
        needed = sum(map(len, splits)) * math.prod(decoded_size) * 3
        available = min(resources.available_memory(), device_bytes or sys.maxsize)
        if storage == "auto":
            storage = "memory" if needed <= available // 2 and (small or not crops) else "stream"
        elif crops and not common:
            problem = "images of different sizes cannot be cropped in memory"
        elif needed > available:
            problem = f"the decoded images need {needed:,} bytes of memory, {available:,} are available"
        size = decoded_size if storage == "memory" else size
    if problem:
        raise UsageError(f"dataset.storage is {storage!r}, but {problem}; set it to 'auto'")
    return storage, size


def _decode(
    split: Split, storage: str, size: tuple[int, int], resize: str, *, check: bool, dry_run: bool
) -> tuple[Split, Failed]:
    """Decodes a split into memory, or checks the images of a stream; returns the failures as well."""
    if split.in_memory:
        return split, {}
    encoded: EncodedImages = dataclasses.replace(split.images, size=size, resize=resize)
    if storage == "stream":
        return dataclasses.replace(split, images=encoded), encoded.check() if check and not dry_run else {}
    images, failed = (np.broadcast_to(np.uint8(0), encoded.shape), {}) if dry_run else decode_all(encoded)
    return dataclasses.replace(split, images=images), failed
