"""Augmentations of resized images on the device, inside the jitted step: TrivialAugment, color jitter, random erasing.

A switch over operations would compute all of them for every image of a batch. Instead, an image passes one affine warp,
one lookup table and one blend, which are the identity unless the sampled operation needs them. Pixels are integers from
0 to 255, as in Pillow, whose rounding is followed.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped

Image = Int32[Array, "s s 3"]
Index = Int32[Array, ""]
Key = Shaped[Array, "..."]

_WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_TABLES = ("posterize", "solarize", "autocontrast", "equalize")
_BLENDS = ("brightness", "contrast", "color", "sharpness")
TRIVIAL_OPS = ("identity", *_WARPS, *_TABLES, *_BLENDS)
"""Operations of TrivialAugment."""

NUM_LEVELS = 31
"""Magnitudes of an operation of TrivialAugment, from 0 to the maximum."""

_MAGNITUDES = np.multiply.outer((1, -1), np.linspace(0, 1, NUM_LEVELS))  # fractions of the maximum, [sign level]
_MAX_SHEAR, _MAX_TRANSLATION, _MAX_ROTATION = 0.99, 32, 135  # tangent, pixels, degrees
_FACTORS = (1 + 0.99 * _MAGNITUDES).astype(np.float32)  # of brightness, contrast, color and sharpness

_JITTER = 0.4  # color jitter scales brightness, contrast and color by factors from 0.6 to 1.4
_ERASED_AREA, _ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)  # of random erasing: area, and height / width
_ERASE_PROBABILITY = 0.5

_FRACTION_BITS = 16  # of fixed-point coordinates, as in Pillow


class Op(Protocol):
    """An augmentation of a resized image."""

    def __call__(self, key: Key, image: Image, *, fill: Int32[Array, " 3"]) -> Image:
        """Returns the augmented image; `fill` is the mean color."""


def trivial(key: Key, image: Image, *, fill: Int32[Array, " 3"]) -> Image:
    """Applies one random operation with a random magnitude and sign; pixels from outside the image are black.

    Source: Müller and Hutter 2021, "TrivialAugment"; operations and ranges of torchvision's TrivialAugmentWide.
    """
    uniforms = jax.random.uniform(key, (3,))
    op, level, negative = (uniforms * jnp.array([len(TRIVIAL_OPS), NUM_LEVELS, 2])).astype(jnp.int32)
    return apply_op(image, op, level, negative)


def color_jitter(key: Key, image: Image, *, fill: Int32[Array, " 3"]) -> Image:
    """Scales brightness, contrast and color by random factors, in random order."""
    order_key, factor_key = jax.random.split(key)
    order = jax.random.permutation(order_key, 3)
    factors = jax.random.uniform(factor_key, (3,), minval=1 - _JITTER, maxval=1 + _JITTER)

    def apply(image: Image, sampled: tuple[Index, Float32[Array, ""]]) -> tuple[Image, None]:
        kind, factor = sampled
        return blend(image, degenerate(image, kind), factor), None

    image, _ = jax.lax.scan(apply, image, (order, factors))  # unrolled, XLA would compute each blend several times
    return image


def erase(key: Key, image: Image, *, fill: Int32[Array, " 3"]) -> Image:
    """Fills a random box with a color, with probability 1/2.

    Its area is uniform in 2 to 33 % of the image; its aspect ratio is from 0.3 to 3.3, uniform in the logarithm. A box
    that does not fit is clipped to the size of the image instead of sampled again.

    Source: Zhong et al. 2020, "Random Erasing Data Augmentation"; ranges of torchvision's RandomErasing.
    """
    size = image.shape[0]
    uniforms = jax.random.uniform(key, (5,))
    area = jnp.interp(uniforms[0], jnp.array([0.0, 1.0]), jnp.array(_ERASED_AREA))
    aspect = jnp.exp(jnp.interp(uniforms[1], jnp.array([0.0, 1.0]), jnp.log(jnp.array(_ERASED_ASPECT))))
    extent = jnp.clip(jnp.round(size * jnp.sqrt(area * jnp.array([aspect, 1 / aspect]))), 1, size)  # rows, columns
    start = jnp.floor(uniforms[2:4] * (size - extent + 1))
    positions = jnp.arange(size)[:, None]
    rows, columns = ((start <= positions) & (positions < start + extent)).T
    erased = rows[:, None] & columns & (uniforms[4] < _ERASE_PROBABILITY)
    return jnp.where(erased[..., None], fill, image)


OPS: dict[str, Op] = {"trivial": trivial, "color_jitter": color_jitter, "erase": erase}


def apply_op(image: Image, op: Index, level: Index, negative: Index) -> Image:
    """Applies an operation of `TRIVIAL_OPS`, given by its index, at a level from 0 to 30; `negative` is 0 or 1.

    The maxima are a shear of 0.99, a translation of 32 pixels, a rotation by 135 degrees, posterize to 2 bits, solarize
    of all values, and factors of 1 ± 0.99.
    """
    image = warp(image, jnp.asarray(_matrices(image.shape[0]))[op, negative, level])
    values, counts = jnp.arange(256), histogram(image)
    lost_bits = (level + 2) // 5  # level / 5, rounded
    tables = (
        values,
        values >> lost_bits << lost_bits,
        jnp.where(2 * values < 510 - 17 * level, values, 255 - values),  # the threshold is 255 - 8.5 · level
        autocontrast_table(counts),
        equalize_table(counts),
    )
    table = jnp.stack([jnp.broadcast_to(each, (3, 256)) for each in tables])[_position(op, _TABLES)]
    image = look_up(image, table)
    kind = _position(op, _BLENDS)
    other = jnp.where(kind == len(_BLENDS), smooth(image), degenerate(image, kind - 1))
    return blend(image, other, jnp.where(kind > 0, jnp.asarray(_FACTORS)[negative, level], 1.0))


def _position(op: Index, names: tuple[str, ...]) -> Index:
    """Returns the position of an operation in `names`, counted from 1; 0 if it is another one."""
    position = op - TRIVIAL_OPS.index(names[0]) + 1
    return jnp.where((position > 0) & (position <= len(names)), position, 0)


@functools.cache
def _matrices(image_size: int) -> Int32[np.ndarray, "ops 2 levels 2 3"]:
    """Returns the matrix of `warp` for each operation, sign and level."""
    matrices = np.zeros((len(TRIVIAL_OPS), *_MAGNITUDES.shape, 2, 3))
    matrices[..., :2] = np.eye(2)
    shear_x, shear_y, translate_x, translate_y, rotate = matrices[1 : 1 + len(_WARPS)]  # views
    shear_x[..., 0, 1] = shear_y[..., 1, 0] = _MAX_SHEAR * _MAGNITUDES
    translate_x[..., 0, 2] = translate_y[..., 1, 2] = -np.trunc(_MAX_TRANSLATION * _MAGNITUDES)
    angle = np.radians(_MAX_ROTATION * _MAGNITUDES)
    rotate[..., 0, 0] = rotate[..., 1, 1] = np.cos(angle)
    rotate[..., 1, 0] = np.sin(angle)
    rotate[..., 0, 1] = -np.sin(angle)
    rotate[..., 2] = (1 - rotate[..., :2].sum(axis=-1)) * image_size / 2  # around the center
    matrices[..., 2] += matrices[..., :2].sum(axis=-1) / 2  # from the corners to the centers of pixels
    fixed_point: np.ndarray = np.floor(matrices * 2**_FRACTION_BITS + 0.5).astype(np.int32)
    return fixed_point


def warp(image: Image, matrix: Int32[Array, "2 3"]) -> Image:
    """Samples the pixels at (x, y) = matrix · (column, row, 1), in units of 2 ** -16 pixels; black outside."""
    size = image.shape[0]
    rows, columns = jnp.arange(size)[:, None], jnp.arange(size)
    x, y = ((line[0] * columns + line[1] * rows + line[2]) >> _FRACTION_BITS for line in matrix)
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    pixels = image.reshape(size * size, 3).at[jnp.where(inside, y * size + x, 0)].get(mode="promise_in_bounds")
    return jnp.where(inside[..., None], pixels, 0)


def histogram(image: Image) -> Int32[Array, "3 256"]:
    """Counts the pixels of each value in each channel."""
    return jnp.zeros(3 * 256, jnp.int32).at[image + 256 * jnp.arange(3)].add(1).reshape(3, 256)


def autocontrast_table(counts: Int32[Array, "3 256"]) -> Int32[Array, "3 256"]:
    """Returns the table that maps the smallest value of a channel to 0 and the largest to 255."""
    values, found = jnp.arange(256), counts > 0
    lowest = jnp.argmax(found, axis=1, keepdims=True)
    extent = 255 - jnp.argmax(found[:, ::-1], axis=1, keepdims=True) - lowest
    return jnp.where(extent > 0, jnp.clip((values - lowest) * 255 // jnp.maximum(extent, 1), 0, 255), values)


def equalize_table(counts: Int32[Array, "3 256"]) -> Int32[Array, "3 256"]:
    """Returns the table that makes the histogram of each channel as uniform as possible."""
    total = counts.sum(axis=1, keepdims=True)
    last = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1, keepdims=True)
    step = (total - jnp.take_along_axis(counts, last, axis=1)) // 255
    below = jnp.cumsum(counts, axis=1) - counts
    return jnp.where(step > 0, jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255), jnp.arange(256))


def look_up(image: Image, table: Int32[Array, "3 256"]) -> Image:
    """Replaces each value by that of its channel's table."""
    return table.reshape(-1).at[image + 256 * jnp.arange(3)].get(mode="promise_in_bounds")


def degenerate(image: Image, kind: Index) -> Int32[Array, "s s 1"]:
    """Returns the image without brightness (black), contrast (its mean grey) or color (grey), for kind 0, 1 or 2."""
    grey = (image @ jnp.array([19595, 38470, 7471]) + 2**15) >> 16  # ITU-R BT.601
    mean = jnp.floor(jnp.mean(grey.sum(axis=1) / grey.shape[1]) + 0.5).astype(jnp.int32)
    return jnp.where(kind == 0, 0, jnp.where(kind == 1, mean, grey))[..., None]


def smooth(image: Image) -> Image:
    """Returns the image without sharpness: means of 3 × 3 pixels, the center counted five times; the border is kept."""
    columns = image[:, :-2] + image[:, 1:-1] + image[:, 2:]
    total = columns[:-2] + columns[1:-1] + columns[2:] + 4 * image[1:-1, 1:-1]
    return image.at[1:-1, 1:-1].set((2 * total + 13) // 26)


def blend(image: Image, other: Int32[Array, "s s #c"], factor: Float32[Array, ""]) -> Image:
    """Returns other + factor · (image - other), clipped and rounded down."""
    return jnp.clip(other + factor * (image - other), 0, 255).astype(jnp.int32)
