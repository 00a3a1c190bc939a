"""Boxes of random crops, and the weights of a resize: for JAX on the device and NumPy in worker processes alike."""

from typing import Any

Box = tuple[Any, Any, Any, Any]
"""Top, left, height, width in pixels."""

WEIGHT_BITS = 22
"""Bits of a resize's weights after the point."""

EDGE_SLACK = 1e-3
"""Pixels by which rounding may move the edge of a box."""

CROPS = ("pad_crop", "square_crop", "inception")
"""Augmentations that read a part of an image, and so depend on its resolution."""


def random_box(augment: str, uniforms: Any, *, height: int, width: int, image_size: int, xp: Any) -> Box:
    """The part of a picture that a training step sees.

    Args:
        augment: "none" or "flip" (all of it); "pad_crop", "square_crop", "inception": see the functions below.
        uniforms: four numbers in [0, 1).
        height: of the picture, pixels.
        width: of the picture, pixels.
        image_size: pixels, square, that the box is resized to.
        xp: `jax.numpy` or `numpy`.

    Returns:
        Scalars (top, left, height, width) in pixels of the picture; fractions of them, and places outside of it, too.
    """
    if augment == "pad_crop":
        return padded_box(uniforms, height=height, width=width, xp=xp)
    if augment == "square_crop":
        return square_box(uniforms, height=height, width=width, image_size=image_size, xp=xp)
    if augment == "inception":
        return inception_box(uniforms, height=height, width=width, xp=xp)
    return 0, 0, height, width


def padded_box(uniforms: Any, *, height: int, width: int, xp: Any) -> Box:
    """Returns a crop of the image's own size from the image padded by an eighth of each side.

    Args:
        uniforms: numbers in [0, 1): for top and left.
        height: of the image, pixels.
        width: of the image, pixels.
        xp: `jax.numpy` or `numpy`.

    Source:
        He et al. 2016, section 4.2, there with a margin of 4 pixels for 32.
    """
    top, left = (
        xp.floor(draw * (2 * margin + 1)) - margin
        for draw, margin in zip(uniforms[:2], (height // 8, width // 8), strict=True)
    )
    return top, left, height, width


def square_box(uniforms: Any, *, height: int, width: int, image_size: int, xp: Any) -> Box:
    """A square of 64 to 100 % of a picture as it is after a resize to `image_size`.

    The area is uniform, the side rounded to whole pixels, the corner uniform over the places that fit.

    Args:
        uniforms: numbers in [0, 1): for the area, top and left.
        height: of the picture, pixels.
        width: of the picture, pixels.
        image_size: pixels, square.
        xp: `jax.numpy` or `numpy`.

    Returns:
        Box in pixels of the picture before its resize, fractions of them too.

    Source:
        torchvision's RandomResizedCrop of a picture that has `image_size` already.
    """
    side = xp.round(image_size * xp.sqrt(0.64 + 0.36 * uniforms[0]))
    top, left = xp.floor(uniforms[1:3] * (image_size - side + 1))
    rows, columns = height / image_size, width / image_size
    return top * rows, left * columns, side * rows, side * columns


def inception_box(
    uniforms: Any,
    *,
    height: int,
    width: int,
    xp: Any,
    area_range: tuple[float, float] = (0.05, 1.0),
    aspect_range: tuple[float, float] = (0.75, 1.33),
) -> Box:
    """A crop as the original training drew it.

    The aspect (width / height) is uniform; the crop's height is uniform over the integers whose area lies within
    bounds and that fit the picture; the corner is uniform over the places that fit, the last one left out.

    Args:
        uniforms: numbers in [0, 1): for the aspect, the height, top and left.
        height: of the picture, pixels.
        width: of the picture, pixels.
        xp: `jax.numpy` or `numpy`.
        area_range: of the crop, as a share of the picture's area.
        aspect_range: of the crop's width to its height.

    Returns:
        Box of whole pixels.

    Source:
        Szegedy et al. 2015, section 6; TensorFlow's kernel of sample_distorted_bounding_box. Its rare redraw, for crops
        that rounding puts out of bounds, is replaced by a clip to the picture.
    """
    aspect = aspect_range[0] + (aspect_range[1] - aspect_range[0]) * uniforms[0]
    smallest_area, largest_area = (share * height * width for share in area_range)

    def width_of(rows: Any) -> Any:
        return xp.round(rows * aspect)

    largest = xp.round(xp.sqrt(largest_area / aspect))
    largest = xp.where(width_of(largest) > width, xp.floor((width + 0.4999) / aspect), largest)
    largest = xp.minimum(largest, height)
    smallest = xp.minimum(xp.round(xp.sqrt(smallest_area / aspect)), largest)
    rows = smallest + xp.floor(uniforms[1] * (largest - smallest + 1))
    rows = xp.where(rows * width_of(rows) < smallest_area, rows + 1, rows)
    rows = xp.where(rows * width_of(rows) > largest_area, rows - 1, rows)
    rows = xp.clip(rows, 1, height)
    columns = xp.clip(width_of(rows), 1, width)
    return xp.floor(uniforms[2] * (height - rows)), xp.floor(uniforms[3] * (width - columns)), rows, columns


def resize_weights(start: Any, length: Any, *, input_size: int, output_size: int, xp: Any) -> Any:
    """Returns the matrix by which Pillow resizes the pixels from `start` to `start + length` along one axis.

    Bilinear, with half-pixel centers; where it shrinks, the triangle is widened by the scale (antialiasing). Pixels
    outside of the interval do not contribute. Pillow holds weights in fixed point, and so does this.

    Args:
        start: of the interval, pixels; may be a fraction.
        length: of the interval, pixels.
        input_size: pixels of the whole axis.
        output_size: pixels.
        xp: `jax.numpy` or `numpy`; NumPy's weights are exact, JAX's within the rounding of float32.

    Returns:
        [output_size input_size]: integers in units of 2 ** -22; each row sums to 2 ** 22 within rounding.

    Source:
        Pillow, `Image.resize(size, Resampling.BILINEAR, box)` of 8-bit images.
    """
    scale = length / output_size
    centers = start + (xp.arange(output_size) + 0.5) * scale
    pixels = xp.arange(input_size) + 0.5
    weights = xp.maximum(0.0, 1.0 - xp.abs(pixels - centers[:, None]) / xp.maximum(scale, 1.0))
    first, stop = xp.floor(start + EDGE_SLACK), xp.ceil(start + length - EDGE_SLACK)
    weights = xp.where((first < pixels) & (pixels < stop), weights, 0.0)
    return xp.floor(weights / weights.sum(axis=1, keepdims=True) * 2**WEIGHT_BITS + 0.5)
