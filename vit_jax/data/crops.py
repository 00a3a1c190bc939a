"""Random crops and resize weights, computed on the device or in worker processes.

`xp` is `jax.numpy` or `numpy`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from vit_jax.types import CENTER_FRACTION

WEIGHT_BITS = 22  # fractional bits of fixed-point resize weights
EDGE_SLACK = 1e-3  # pixels by which rounding may move the edge of a box

Number = Any  # a scalar or an array of NumPy or JAX, which have no common type
Box = tuple[Number, Number, Number, Number]  # top, left, height, width in pixels; may be fractional or exceed the image
BoxSampler = Callable[..., Box]
"""(uniforms [4] in [0, 1), height, width, *, image_size, xp) -> box of an image, to be resized to `image_size`."""


def padded_box(uniforms: Number, height: int, width: int, *, image_size: int, xp: ModuleType) -> Box:
    """Samples a crop of the image's size from the image padded by 1/8 on each side (He et al. 2016, section 4.2)."""
    margins = height // 8, width // 8
    top, left = (xp.floor(x * (2 * margin + 1)) - margin for x, margin in zip(uniforms[:2], margins, strict=True))
    return top, left, height, width


def square_box(uniforms: Number, height: int, width: int, *, image_size: int, xp: ModuleType) -> Box:
    """Samples a square of 64 to 100 % of the area of the image resized to `image_size`.

    The area is uniform, the side is rounded to pixels, and the corner is uniform over the valid positions, as in
    torchvision's RandomResizedCrop after a resize. The box is in pixels of the image before the resize.
    """
    side = xp.round(image_size * xp.sqrt(0.64 + 0.36 * uniforms[0]))
    top, left = xp.floor(uniforms[1:3] * (image_size - side + 1))
    rows, columns = height / image_size, width / image_size
    return top * rows, left * columns, side * rows, side * columns


def inception_box(uniforms: Number, height: int, width: int, *, image_size: int, xp: ModuleType) -> Box:
    """Samples a crop of 5 to 100 % of the image's area, in whole pixels, as in the original training.

    The aspect ratio (width / height) is uniform in (0.75, 1.33); the height is uniform over the integers for which the
    area is in range and the crop fits; the corner is uniform over the valid positions except the last one.

    Source: Szegedy et al. 2015, section 6; TensorFlow's kernel of sample_distorted_bounding_box. Where rounding puts a
    crop out of bounds, it is clipped to the image instead of sampled again.
    """
    aspect = 0.75 + (1.33 - 0.75) * uniforms[0]
    smallest_area, largest_area = 0.05 * height * width, 1.0 * height * width
    largest = xp.round(xp.sqrt(largest_area / aspect))
    largest = xp.where(xp.round(largest * aspect) > width, xp.floor((width + 0.4999) / aspect), largest)
    largest = xp.minimum(largest, height)
    smallest = xp.minimum(xp.round(xp.sqrt(smallest_area / aspect)), largest)
    rows = smallest + xp.floor(uniforms[1] * (largest - smallest + 1))
    rows = xp.where(rows * xp.round(rows * aspect) < smallest_area, rows + 1, rows)
    rows = xp.where(rows * xp.round(rows * aspect) > largest_area, rows - 1, rows)
    rows = xp.clip(rows, 1, height)
    columns = xp.clip(xp.round(rows * aspect), 1, width)
    return xp.floor(uniforms[2] * (height - rows)), xp.floor(uniforms[3] * (width - columns)), rows, columns


def resized_size(resize: str, height: int, width: int, *, image_size: int) -> tuple[int, int]:
    """Returns the (height, width) in pixels that an image is resized to before its center of `image_size` is taken.

    "squash" resizes to `image_size`; "center_crop" resizes the short side to `image_size` / 0.875, and keeps the aspect
    ratio, with the rounding of Hugging Face's image processors.
    """
    if resize != "center_crop":
        return image_size, image_size
    short = round(image_size / CENTER_FRACTION)
    return short * height // min(height, width), short * width // min(height, width)


def center(length: int, image_size: int) -> slice:
    """Returns the central `image_size` of `length` pixels."""
    start = (length - image_size) // 2
    return slice(start, start + image_size)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A random crop and flip, applied before an image is resized."""

    sample_box: BoxSampler | None = None  # None for the whole image
    pads: bool = False  # boxes may exceed the image by at most 1/8 of each side
    flips: bool = True  # horizontally, with probability 1/2


AUGMENTATIONS = {
    "none": Augmentation(flips=False),
    "flip": Augmentation(),
    "pad_crop": Augmentation(padded_box, pads=True),
    "square_crop": Augmentation(square_box),
    "inception": Augmentation(inception_box),
}

# Augmentations that need images at full resolution.
CROPS = tuple(name for name, augmentation in AUGMENTATIONS.items() if augmentation.sample_box)


Augmentations = str | tuple[str, ...]
"""Name of an augmentation, or names of several that are applied in this order; see `split_names`."""


def split_names(names: str | Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Returns the crop or flip, a key of `AUGMENTATIONS`, and the other augmentations, keys of `augment.OPS`.

    Examples:
        >>> from vit_jax.data.crops import split_names
        >>> split_names(("inception", "trivial", "erase"))
        ('inception', ('trivial', 'erase'))
        >>> split_names("erase")
        ('none', ('erase',))
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    return (names[0], names[1:]) if names[0] in AUGMENTATIONS else ("none", names)


def resize_weights(start: Number, length: Number, *, input_size: int, output_size: int, xp: ModuleType) -> Number:
    """Returns Pillow's weights for resizing the pixels from `start` to `start + length` along one axis.

    Bilinear with half-pixel centers; for downscaling, the triangle filter is widened by the scale (antialiasing).
    Pixels outside the interval do not contribute. NumPy's weights are exact, JAX's up to float32 rounding.

    Returns:
        [output_size input_size], Pillow's integers in units of 2 ** -22; each row sums to 2 ** 22 up to rounding.

    Source: Pillow, `Image.resize(size, Resampling.BILINEAR, box)` of 8-bit images.
    """
    scale = length / output_size
    centers = start + (xp.arange(output_size) + 0.5) * scale
    pixels = xp.arange(input_size) + 0.5
    weights = xp.maximum(0.0, 1.0 - xp.abs(pixels - centers[:, None]) / xp.maximum(scale, 1.0))
    first, stop = xp.floor(start + EDGE_SLACK), xp.ceil(start + length - EDGE_SLACK)
    weights = xp.where((first < pixels) & (pixels < stop), weights, 0.0)
    return xp.floor(weights / weights.sum(axis=1, keepdims=True) * 2**WEIGHT_BITS + 0.5)
