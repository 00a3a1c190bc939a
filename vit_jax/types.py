"""Types shared by the packages."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

Params = dict[str, Any]
"""Nested dictionary of arrays; its keys joined by "/" are the keys of a pretrained checkpoint."""

FlatParams = dict[str, np.ndarray]
"""Flattened parameters in host memory: joined key -> array."""

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

RESIZES = ("squash", "center_crop")
"""Resizes of images that are not cropped at random: of the whole image, or of its center."""

CENTER_FRACTION = 0.875
"""Fraction of the short side that "center_crop" keeps: at 224 pixels, the short side is resized to 256."""


@runtime_checkable
class ImageSource(Protocol):
    """Images of a split, uint8 [n h w 3]: a NumPy array, or `data.EncodedImages`, which decodes files when indexed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[n h w 3]."""

    def __len__(self) -> int:
        """The number of images."""

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        """Returns an image [h w 3], or the images of a slice or an index array [m h w 3]."""

    def take(self, rows: np.ndarray, axis: int = 0) -> "ImageSource":
        """Selects images along axis 0, as `numpy.ndarray.take`."""


@runtime_checkable
class ImageModel(Hashable, Protocol):
    """A Linen module that maps images to class logits: `VisionTransformer`, `ResNet`."""

    num_classes: int | None  # None: no head; the outputs are features
    dtype: Any  # of the computation
    head_init: str  # a key of `models.HEAD_INITS`

    @property
    def pixels_per_patch(self) -> int:
        """Height and width in pixels of one output position, such as a token."""

    def init(self, rngs: Any, images: Any) -> Mapping[str, Params]:
        """Initializes {"params": …}."""

    def apply(self, variables: Mapping[str, Params], images: Any, **options: Any) -> Any:
        """Maps preprocessed images [b h w 3] to logits [b num_classes]."""

    def clone(self, **changes: object) -> "ImageModel":
        """Returns a copy of the module with other attributes."""

    def layer_index(self, path: str) -> int:
        """Returns the layer of a parameter, for layer-wise learning rate decay; raises UsageError if undefined."""

    def validate(self, image_size: int | None = None) -> None:
        """Raises UsageError if the sizes are incompatible with each other or with the image size in pixels."""

    def create_head(self, num_classes: int, name: str | None = None) -> Any:
        """Creates the head, [b d] -> [b num_classes], to apply it to cached features."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one split and their labels.

    Attributes:
        images: uint8 [n h w 3], RGB, in host memory; or an `ImageSource` that decodes files.
        labels: int32 [n], indices into the dataset's class names.
        ids: uint64 [n], the same in memory and streamed: hashes of the file names relative to the split's directory, or
            record numbers of TFDS; None for datasets that are always in memory.
        paths: object [n], paths of the image files as strings; None for other datasets.
    """

    images: Any
    labels: np.ndarray
    ids: np.ndarray | None = None
    paths: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Split":
        """Selects images by an index array."""
        ids, paths = (None if array is None else array[rows] for array in (self.ids, self.paths))
        return Split(images=self.images.take(rows, axis=0), labels=self.labels[rows], ids=ids, paths=paths)

    @property
    def in_memory(self) -> bool:
        """True if the images are decoded, in memory."""
        return isinstance(self.images, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Findings:
    """Problems that were found while a dataset was read.

    Attributes:
        notes: one line each, about files that were not read.
        damaged: path and reason of each image that was skipped because it cannot be decoded.
        duplicates: groups of paths of images with the same pixels that are in different splits.
    """

    notes: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training and test images, and validation images if there are any.

    Attributes:
        train: training split.
        test: test split.
        class_names: name of each label.
        validation: validation split, for choices during training; None if there is none.
        findings: problems that were found while the images were read.

    Examples:
        >>> import numpy as np
        >>> from vit_jax.types import Dataset, Split
        >>> images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])
        >>> dataset = Dataset(Split(images[:2], labels[:2]), Split(images[2:], labels[2:]), ("cat", "dog"))
        >>> len(dataset.train), dataset.test.images.shape
        (2, (2, 8, 8, 3))
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]
    validation: Split | None = None
    findings: Findings = Findings()

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name: "train", "validation" unless it is None, and "test"."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}
