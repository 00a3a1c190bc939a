"""Decodes image files to uint8 arrays, at once or on demand."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image, ImageCms, ImageOps, features

from vit_jax.data.crops import AUGMENTATIONS, EDGE_SLACK, Box, center, resized_size
from vit_jax.runtime import resources
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.runtime.progress import progress_bar

_READABLE = {  # suffixes of optional formats -> can be read
    (".avif",): features.check("avif"),
    (".heic", ".heif"): importlib.util.find_spec("pillow_heif") is not None,
}
_OPTIONAL = [suffix for suffixes, readable in _READABLE.items() if readable for suffix in suffixes]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", *_OPTIONAL)
"""Suffixes of the files that are read, in lower case; .avif if Pillow has AVIF, .heic and .heif with pillow_heif."""

MISSING_FORMATS = {
    suffix: "install a Pillow with AVIF" if suffix == ".avif" else "install the extra vit_jax[heif]"
    for suffixes, readable in _READABLE.items()
    if not readable
    for suffix in suffixes
}
"""Suffixes of image formats that are not installed -> what to do."""

_IMAGES_PER_TASK = 64  # one future per image would cost as much as decoding a small image
_EXIF_ORIENTATION = 0x0112
_NO_FILE = "no such file"
ImageFile = str | Path | io.BytesIO | io.BufferedReader  # a path, or an open binary file
Color = tuple[int, ...]  # red, green, blue from 0 to 255


class ImageError(UserError):
    """An image that is missing or cannot be decoded."""

    def __init__(self, path: str, reason: str) -> None:
        """Keeps the path of the image and the reason on one line."""
        self.path, self.reason = path, reason
        if reason == _NO_FILE:
            super().__init__(f"image {path}: {reason}")
        else:
            super().__init__(f"image {path} cannot be decoded ({reason}); replace or remove it")


class DamagedImagesError(UserError):
    """Images that cannot be decoded; the message has the first 20."""

    def __init__(self, errors: Sequence[ImageError]) -> None:
        """Keeps the errors of all images."""
        self.errors = list(errors)
        if len(self.errors) == 1:
            message = f"{errors[0]}, or set dataset.damaged to 'skip'"
        else:
            listed = list_first([f"{error.path} ({error.reason})" for error in errors])
            message = (
                f"{len(errors):,} images cannot be decoded: {listed}; "
                "replace or remove them, or set dataset.damaged to 'skip'"
            )
        super().__init__(message)


def list_first(items: Sequence[str], number: int = 20) -> str:
    """Joins the first items, and the number of the others."""
    more = f" and {len(items) - number:,} more" if len(items) > number else ""
    return ", ".join(items[:number]) + more


def decode_image(
    source: ImageFile,
    *,
    size: tuple[int, int] | None = None,
    resize: str = "squash",
    sample_box: Callable[[int, int], Box] | None = None,
    margin_color: Color = (127, 127, 127),
) -> Image.Image:
    """Decodes an image file of any mode to RGB; raises UserError if it is missing or damaged.

    EXIF or XMP orientation is applied, transparent pixels become white, 16-bit grey keeps its upper 8 bits, and of
    several frames the first is read. The image
    is resized to `size` (width, height) with Pillow's bilinear filter and antialiasing; the pixels equal those of
    `preprocess.prepare`. For `resize` "center_crop", `size` is square; see `crops.resized_size`. An image of `size`
    is not resized. `sample_box` maps (height, width) to the box to resize instead of the whole image; pixels outside
    the image have the `margin_color`.
    """
    with _open(source) as image:
        image.load()  # first, as a PNG may store its orientation after the pixels
        rgb = _convert_to_rgb(ImageOps.exif_transpose(image))
    if not size or (rgb.size == size and not sample_box):
        return rgb
    if not sample_box:
        return _resize_and_crop(rgb, size) if resize == "center_crop" else _resize(rgb, (0, 0, *rgb.size), size)
    top, left, rows, columns = map(float, sample_box(rgb.height, rgb.width))
    return _crop_and_resize(rgb, (left, top, left + columns, top + rows), size, margin_color)


def read_size(source: ImageFile) -> tuple[int, int]:
    """Reads (width, height) with EXIF orientation from the header; a PNG that is not square is decoded for it."""
    with _open(source) as image:
        if image.format == "TIFF":  # Pillow applies its orientation
            return image.size
        if image.width == image.height or image.getexif().get(_EXIF_ORIENTATION, 1) not in (5, 6, 7, 8):
            return image.size
        return image.size[::-1]


def check_image(source: ImageFile) -> None:
    """Raises ImageError unless all of an image file can be decoded; faster than `decode_image` for JPEG."""
    with _open(source) as image:
        image.draft("RGB", (1, 1))
        image.load()


Failed = Mapping[int, ImageError]  # row of an image -> error


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Image files that are decoded when they are indexed; a `types.ImageSource`, uint8 [n h w 3]."""

    open_image: Callable[[int], ImageFile]  # number of an image -> path or binary file
    numbers: Int[np.ndarray, " n"]
    size: tuple[int, int] = (0, 0)  # (width, height) that images are resized to; (0, 0) if unknown
    resize: str = "squash"  # one of `types.RESIZES`, unless images are cropped
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
            images, failed = decode_all(self.take(np.arange(len(self))[rows]))
            if failed:
                raise DamagedImagesError([failed[row] for row in sorted(failed)])
            return images
        source, sampler, sample_box = self.open_image(self.numbers[rows]), AUGMENTATIONS[self.augment].sample_box, None
        if sampler and self.uniforms is not None:
            sample_box = functools.partial(sampler, self.uniforms[rows], image_size=self.size[0], xp=np)
        image = decode_image(
            source, size=self.size, resize=self.resize, sample_box=sample_box, margin_color=self.margin_color
        )
        return np.asarray(image)

    def take(self, rows: Int[np.ndarray, " m"], axis: int = 0) -> "EncodedImages":
        """Selects images without decoding them; `axis` is 0, as in `numpy.ndarray.take`."""
        uniforms = None if self.uniforms is None else self.uniforms.take(rows, axis)
        return dataclasses.replace(self, numbers=self.numbers.take(rows, axis), uniforms=uniforms)

    def crop(
        self, rows: Int[np.ndarray, " m"], *, augment: str, uniforms: Float32[np.ndarray, "m 4"], margin_color: Color
    ) -> "EncodedImages":
        """Selects images to be cropped when they are decoded; an image may be selected several times."""
        return dataclasses.replace(self.take(rows), augment=augment, uniforms=uniforms, margin_color=margin_color)

    def read_sizes(self) -> tuple[set[tuple[int, int]], Failed]:
        """Returns the distinct (width, height) in pixels, and failures; reads headers unless `size` is known."""
        sizes = {self.size} if any(self.size) else set()
        if sizes:
            return sizes, {}
        return sizes, _for_each_image(
            len(self), lambda row: sizes.add(read_size(self.open_image(self.numbers[row]))), "headers"
        )

    def check(self) -> Failed:
        """Decodes all images and returns the failures."""
        return _for_each_image(len(self), lambda row: check_image(self.open_image(self.numbers[row])), "checking")


def decode_all(images: EncodedImages) -> tuple[UInt8[np.ndarray, "n h w 3"], Failed]:
    """Decodes all images; returns failures as well, whose pixels are undefined."""
    decoded = np.empty(images.shape, np.uint8)

    def decode(row: int) -> None:
        decoded[row] = images[row]

    return decoded, _for_each_image(len(images), decode, "decoding")


def _for_each_image(num_images: int, work: Callable[[int], None], title: str) -> Failed:
    """Calls `work(row)` for every image in a thread pool; returns the failures."""
    failed: dict[int, ImageError] = {}

    def work_on(rows: range) -> int:
        for row in rows:
            try:
                work(row)
            except ImageError as error:
                failed[row] = error
        return len(rows)

    tasks = [range(num_images)[start : start + _IMAGES_PER_TASK] for start in range(0, num_images, _IMAGES_PER_TASK)]
    with ThreadPoolExecutor(resources.available_cpus()) as pool, progress_bar(total=num_images, desc=title) as bar:
        for num_done in pool.map(work_on, tasks):
            bar.update(num_done)
    return failed


@contextlib.contextmanager
def _open(source: ImageFile) -> Iterator[Image.Image]:
    """Opens an image; converts exceptions of decoders, which can be anything for a damaged file, to ImageError."""
    name = str(source if isinstance(source, str | Path) else getattr(source, "name", "(no name)"))
    _register_heif()
    try:
        if isinstance(source, str | Path) and os.path.exists(source) and not os.path.isfile(source):
            raise OSError("not a regular file")  # reading a pipe could block forever
        with Image.open(source) as image:
            yield image
    except FileNotFoundError as error:
        raise ImageError(name, _NO_FILE) from error
    except Exception as error:
        reason = one_line(error)
        if "cannot identify" in reason:
            reason = MISSING_FORMATS.get(Path(name).suffix.lower(), "not an image that Pillow can read")
        raise ImageError(name, reason) from error


@functools.cache
def _register_heif() -> None:
    if ".heic" in IMAGE_SUFFIXES:
        import pillow_heif

        pillow_heif.register_heif_opener()


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow itself would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":  # floating-point grey, from 0 to 1 or from 0 to 255
        pixels = np.nan_to_num(np.asarray(image))
        scale = 255 if pixels.size and pixels.max() <= 1 else 1
        return Image.fromarray((scale * pixels).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _resize_and_crop(rgb: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = resized_size("center_crop", rgb.height, rgb.width, image_size=size[0])
    columns, rows = center(width, size[0]), center(height, size[1])
    resized = _resize(rgb, (0, 0, *rgb.size), (width, height))
    return resized.crop((columns.start, rows.start, columns.stop, rows.stop))


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
