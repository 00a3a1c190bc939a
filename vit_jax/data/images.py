"""Decodes image files to uint8 arrays, at once or on demand."""

import contextlib
import dataclasses
import functools
import io
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image, ImageOps

from vit_jax.data.crops import AUGMENTATIONS, EDGE_SLACK, Box
from vit_jax.runtime import resources
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.runtime.progress import progress_bar

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_IMAGES_PER_TASK = 64  # one future per image would cost as much as decoding a small image
_EXIF_ORIENTATION = 0x0112
ImageFile = str | Path | io.BytesIO | io.BufferedReader  # a path, or an open binary file
Color = tuple[int, ...]  # red, green, blue from 0 to 255


def decode_image(
    source: ImageFile,
    *,
    size: tuple[int, int] | None = None,
    sample_box: Callable[[int, int], Box] | None = None,
    margin_color: Color = (127, 127, 127),
) -> Image.Image:
    """Decodes an image file of any mode to RGB; raises UserError if it is missing or damaged.

    EXIF or XMP orientation is applied, transparent pixels become white, 16-bit grey keeps its upper 8 bits. The image
    is resized to `size` (width, height) with Pillow's bilinear filter and antialiasing; the pixels equal those of
    `preprocess.prepare`. `sample_box` maps (height, width) to the box to resize instead of the whole image; pixels
    outside the image have the `margin_color`.
    """
    with _image_errors(source), Image.open(source) as image:
        image.load()  # first, as a PNG may store its orientation after the pixels
        rgb = _convert_to_rgb(ImageOps.exif_transpose(image))
    if not size or (rgb.size == size and not sample_box):
        return rgb
    if not sample_box:
        return _resize(rgb, (0, 0, *rgb.size), size)
    top, left, rows, columns = map(float, sample_box(rgb.height, rgb.width))
    return _crop_and_resize(rgb, (left, top, left + columns, top + rows), size, margin_color)


def read_size(source: ImageFile) -> tuple[int, int]:
    """Reads (width, height) with EXIF orientation from the header; a PNG that is not square is decoded for it."""
    with _image_errors(source), Image.open(source) as image:
        if image.width == image.height or image.getexif().get(_EXIF_ORIENTATION, 1) not in (5, 6, 7, 8):
            return image.size
        return image.size[::-1]


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Image files that are decoded when they are indexed; a `types.ImageSource`, uint8 [n h w 3]."""

    open_image: Callable[[int], ImageFile]  # number of an image -> path or binary file
    numbers: Int[np.ndarray, " n"]
    size: tuple[int, int] = (0, 0)  # (width, height) that images are resized to; (0, 0) if unknown
    augment: str = "none"  # key of `crops.AUGMENTATIONS`; only its crop is applied
    uniforms: Float32[np.ndarray, "n 4"] | None = None  # random numbers in [0, 1) for the crop of each image
    margin_color: Color = (127, 127, 127)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[n h w 3]."""
        return len(self), self.size[1], self.size[0], 3

    def __len__(self) -> int:
        """The number of images."""
        return len(self.numbers)

    def __getitem__(self, rows: Any, /) -> UInt8[np.ndarray, "*m h w 3"]:
        """Decodes an image [h w 3], or a slice or index array of images [m h w 3] with one thread per CPU."""
        if np.ndim(rows) or isinstance(rows, slice):
            return decode_all(self.take(np.arange(len(self))[rows]))
        source, sampler, sample_box = self.open_image(self.numbers[rows]), AUGMENTATIONS[self.augment].sample_box, None
        if sampler and self.uniforms is not None:
            sample_box = functools.partial(sampler, self.uniforms[rows], image_size=self.size[0], xp=np)
        return np.asarray(decode_image(source, size=self.size, sample_box=sample_box, margin_color=self.margin_color))

    def take(self, rows: Int[np.ndarray, " m"], axis: int = 0) -> "EncodedImages":
        """Selects images without decoding them; `axis` is 0, as in `numpy.ndarray.take`."""
        uniforms = None if self.uniforms is None else self.uniforms.take(rows, axis)
        return dataclasses.replace(self, numbers=self.numbers.take(rows, axis), uniforms=uniforms)

    def crop(
        self, rows: Int[np.ndarray, " m"], *, augment: str, uniforms: Float32[np.ndarray, "m 4"], margin_color: Color
    ) -> "EncodedImages":
        """Selects images to be cropped when they are decoded; an image may be selected several times."""
        return dataclasses.replace(self.take(rows), augment=augment, uniforms=uniforms, margin_color=margin_color)

    def read_sizes(self) -> set[tuple[int, int]]:
        """Returns the distinct (width, height) in pixels; reads headers unless `size` is known."""
        sizes = {self.size} if any(self.size) else set()
        if not sizes:
            _for_each_image(len(self), lambda row: sizes.add(read_size(self.open_image(self.numbers[row]))), "headers")
        return sizes


def decode_all(images: EncodedImages) -> UInt8[np.ndarray, "n h w 3"]:
    """Decodes all images; raises a UserError that names the first damaged image and counts the others."""
    decoded = np.empty(images.shape, np.uint8)

    def decode(row: int) -> None:
        decoded[row] = images[row]

    _for_each_image(len(images), decode, "decoding")
    return decoded


def _for_each_image(num_images: int, work: Callable[[int], None], title: str) -> None:
    """Calls `work(row)` for every image in a thread pool."""
    failed: dict[int, UserError] = {}

    def work_on(rows: range) -> int:
        for row in rows:
            try:
                work(row)
            except UserError as error:
                failed[row] = error
        return len(rows)

    tasks = [range(num_images)[start : start + _IMAGES_PER_TASK] for start in range(0, num_images, _IMAGES_PER_TASK)]
    with ThreadPoolExecutor(resources.available_cpus()) as pool, progress_bar(total=num_images, desc=title) as bar:
        for num_done in pool.map(work_on, tasks):
            bar.update(num_done)
    if failed:
        first = failed[min(failed)]
        raise UserError(f"{first}; {len(failed) - 1} more images failed" if len(failed) > 1 else str(first)) from first


@contextlib.contextmanager
def _image_errors(source: ImageFile) -> Iterator[None]:
    """Converts exceptions of decoders, which can be anything for a damaged file, to UserError."""
    name = source if isinstance(source, str | Path) else getattr(source, "name", "(no name)")
    try:
        if isinstance(source, str | Path) and os.path.exists(source) and not os.path.isfile(source):
            raise OSError("not a regular file")  # reading a pipe could block forever
        yield
    except FileNotFoundError as error:
        raise UserError(f"image {name}: no such file") from error
    except Exception as error:
        reason = "not an image that Pillow can read" if "cannot identify" in str(error) else one_line(error)
        raise UserError(f"image {name} cannot be decoded ({reason}); replace or remove it") from error


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow itself would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _crop_and_resize(
    rgb: Image.Image, box: tuple[float | int, ...], size: tuple[int, int], margin_color: Color
) -> Image.Image:
    """Resizes a box (left, top, right, bottom) of an image; the pixels around the box do not contribute."""
    left, top = (math.floor(edge + EDGE_SLACK) for edge in box[:2])
    right, bottom = (math.ceil(edge - EDGE_SLACK) for edge in box[2:])
    margin = max(0, -left, -top, right - rgb.width, bottom - rgb.height)
    if margin:
        rgb = ImageOps.expand(rgb, margin, margin_color)
    part = rgb.crop((left + margin, top + margin, right + margin, bottom + margin))
    start = max(0, box[0] - left), max(0, box[1] - top)
    return _resize(part, (*start, min(part.width, box[2] - left), min(part.height, box[3] - top)), size)


def _resize(rgb: Image.Image, box: tuple[float | int, ...], size: tuple[int, int]) -> Image.Image:
    """Resizes a box (left, top, right, bottom), columns first, rounding to 8 bits after each axis, as on the device.

    In a single call, the order would depend on Pillow's version.
    """
    left, top, right, bottom = box
    rgb = rgb.resize((size[0], rgb.height), Image.Resampling.BILINEAR, (left, 0, right, rgb.height))
    return rgb.resize(size, Image.Resampling.BILINEAR, (0, top, size[0], bottom))
