"""EncodedImages pictures -> uint8 arrays, at once or when they are asked for: decoding, folders of pictures, memory."""

import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from vit_jax.data.crops import EDGE_SLACK, Box, random_box
from vit_jax.data.splits import SplitSlice, check_disjoint
from vit_jax.runtime import resources
from vit_jax.runtime.errors import UsageError, UserError, one_line
from vit_jax.runtime.progress import progress_bar
from vit_jax.types import Split

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_PICTURES_PER_TASK = 64  # one future a picture would cost as much as decoding a small one
_EXIF_ORIENTATION = 0x0112


def decode_image(
    source: str | Path | BinaryIO,
    *,
    size: tuple[int, int] | None = None,
    sample_box: Callable[[int, int], Box] | None = None,
    margin_color: tuple[int, ...] = (127, 127, 127),
) -> "Image.Image":
    """Decodes one image file of any mode to upright RGB.

    Orientation in EXIF or XMP is applied, transparent parts become white, 16-bit grey keeps its upper 8 bits. Images
    are decoded at their full resolution and resized by Pillow's bilinear filter with antialiasing: the same pixels as
    those of `preprocess.prepare`.

    Args:
        source: path of an image, or an open binary file.
        size: (width, height) in pixels to resize to; None keeps the image's own.
        sample_box: (height, width) in pixels -> the box to resize; None takes the whole image. Needs `size`.
        margin_color: color of what a box covers outside of the image.

    Returns:
        The image, mode "RGB".

    Raises:
        UserError: the file is missing, or cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        _check_regular(source)
        with Image.open(source) as image:
            # Loaded first: a PNG may name its orientation after its pixels.
            image.load()
            rgb = _convert_to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a damaged file makes the decoders raise nearly anything
        raise _picture_error(source, error) from error
    if not size or (rgb.size == size and not sample_box):
        return rgb
    if not sample_box:
        return _resize(rgb, (0, 0, *rgb.size), size)
    top, left, rows, columns = map(float, sample_box(rgb.height, rgb.width))
    return _crop_and_resize(rgb, (left, top, left + columns, top + rows), size, margin_color)


def _crop_and_resize(
    rgb: "Image.Image", box: tuple[float, ...], size: tuple[int, int], margin_color: tuple[int, ...]
) -> "Image.Image":
    """Resizes a box (left, top, right, bottom) of an image; the pixels around the box do not contribute."""
    from PIL import ImageOps

    left, top = (math.floor(edge + EDGE_SLACK) for edge in box[:2])
    right, bottom = (math.ceil(edge - EDGE_SLACK) for edge in box[2:])
    margin = max(0, -left, -top, right - rgb.width, bottom - rgb.height)
    if margin:
        rgb = ImageOps.expand(rgb, margin, margin_color)
    part = rgb.crop((left + margin, top + margin, right + margin, bottom + margin))
    inner = (
        max(0, box[0] - left),
        max(0, box[1] - top),
        min(part.width, box[2] - left),
        min(part.height, box[3] - top),
    )
    return _resize(part, inner, size)


def _resize(rgb: "Image.Image", box: tuple[float, ...], size: tuple[int, int]) -> "Image.Image":
    """Resizes a box (left, top, right, bottom): columns, then rows, each rounded to 8 bits as on the device.

    In one call the order would depend on Pillow's version.
    """
    from PIL import Image

    left, top, right, bottom = box
    rgb = rgb.resize((size[0], rgb.height), Image.Resampling.BILINEAR, (left, 0, right, rgb.height))
    return rgb.resize(size, Image.Resampling.BILINEAR, (0, top, size[0], bottom))


def upright_size(image: "Image.Image") -> tuple[int, int]:
    """Returns (width, height) after the orientation in EXIF or XMP is applied; decodes a PNG that is not square."""
    if image.width == image.height or image.getexif().get(_EXIF_ORIENTATION, 1) not in (5, 6, 7, 8):
        return image.size
    return image.size[::-1]


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Image files that are decoded when they are indexed; reads like an array uint8 [n h w 3].

    Attributes:
        open_image: number of an image -> its path, or a binary file.
        numbers: int [n], those of the images.
        size: (width, height) in pixels that every image is resized to.
        augment: how images are cropped before, see `crops.random_box`; "none" reads whole images.
        uniforms: float32 [n 4], random numbers in [0, 1) of each image's box; None where nothing is cropped.
        margin_color: color of what a box covers outside of an image.
    """

    open_image: Callable[[int], str | BinaryIO]
    numbers: np.ndarray
    size: tuple[int, int] = (0, 0)
    augment: str = "none"
    uniforms: np.ndarray | None = None
    margin_color: tuple[int, ...] = (127, 127, 127)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[n h w 3]."""
        return len(self), self.size[1], self.size[0], 3

    def __len__(self) -> int:
        """The number of images."""
        return len(self.numbers)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Decodes an image [h w 3], or those of a slice or an array of rows [m h w 3], in one thread per processor."""
        if np.ndim(rows) == 0 and not isinstance(rows, slice):
            return self._decode(rows)
        return decode_all(self.take(np.arange(len(self))[rows]))

    def take(self, rows: np.ndarray, axis: int = 0) -> "EncodedImages":
        """Selects images and decodes none; as `numpy.ndarray.take` along axis 0."""
        uniforms = None if self.uniforms is None else self.uniforms.take(rows, axis)
        return dataclasses.replace(self, numbers=self.numbers.take(rows, axis), uniforms=uniforms)

    def crop(
        self, rows: np.ndarray, *, augment: str, uniforms: np.ndarray, margin_color: tuple[int, ...]
    ) -> "EncodedImages":
        """Selects images to be cropped, and decodes none.

        Args:
            rows: int [m]; an image may be selected several times.
            augment: how they are cropped.
            uniforms: float32 [m 4].
            margin_color: color of what a box covers outside of an image.
        """
        return dataclasses.replace(self.take(rows), augment=augment, uniforms=uniforms, margin_color=margin_color)

    def _decode(self, row: int) -> np.ndarray:
        uniforms = None if self.uniforms is None else self.uniforms[row]

        def sample_box(height: int, width: int) -> Box:
            return random_box(self.augment, uniforms, height=height, width=width, image_size=self.size[0], xp=np)

        source = self.open_image(self.numbers[row])
        return np.asarray(
            decode_image(
                source,
                size=self.size,
                sample_box=None if uniforms is None else sample_box,
                margin_color=self.margin_color,
            )
        )


def list_folder(root: Path, splits: Sequence[SplitSlice]) -> tuple[list[Split], tuple[str, ...]]:
    """Lists DIR/SPLIT/CLASS/*.jpg and the like: splits of `EncodedImages` images, and class names."""
    if not root.is_dir():
        raise UserError(f"dataset folder:{root}: no such directory")
    files = {split.name: _list_classes(root / split.name) for split in splits}
    first, last = splits[0].name, splits[-1].name
    differing = [f"{name} (only in {first})" for name in sorted(files[first].keys() - files[last].keys())]
    differing += [f"{name} (only in {last})" for name in sorted(files[last].keys() - files[first].keys())]
    if differing:
        raise UserError(f"{root}: both splits must have the same class folders; these differ: {', '.join(differing)}")
    class_names = tuple(sorted(files[first]))
    for name, classes in files.items():
        check_disjoint([split for split in splits if split.name == name], sum(map(len, classes.values())))
    return [_select_files(files[split.name], class_names, split) for split in splits], class_names


def _list_classes(split_dir: Path) -> dict[str, list[Path]]:
    """Class name -> its picture files, sorted; hidden files and folders are passed over."""
    if not split_dir.is_dir():
        raise UserError(f"{split_dir}: no such directory; a folder dataset is DIR/{{train,test}}/CLASS/PICTURE")
    classes = {}
    for class_dir in sorted(split_dir.iterdir()):
        if not class_dir.is_dir() or class_dir.name.startswith("."):
            continue
        files = sorted(entry for entry in class_dir.iterdir() if not entry.name.startswith("."))
        classes[class_dir.name] = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if not classes[class_dir.name]:
            others = f"; its {len(files)} other files are not read" if files else ""
            raise UserError(f"class folder {class_dir} has no pictures ({', '.join(IMAGE_SUFFIXES)}){others}")
    if not classes:
        raise UserError(f"{split_dir} has no class folders; a folder dataset is DIR/{{train,test}}/CLASS/PICTURE")
    return classes


def _select_files(classes: dict[str, list[Path]], class_names: Sequence[str], split: SplitSlice) -> Split:
    """The files of a split, in the order of classes and names.

    A slice is cut from a fixed shuffle: cut from the sorted files, "train[:90%]" would lose the last classes.
    """
    paths = [str(path) for name in class_names for path in classes[name]]
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), [len(classes[name]) for name in class_names])
    start, stop = split.bounds(len(paths))
    chosen = np.sort(np.random.RandomState(0).permutation(len(paths))[start:stop])
    ids = np.array([_hash_name(paths[i]) for i in chosen], np.uint64)
    return Split(images=EncodedImages(paths.__getitem__, chosen), labels=labels[chosen], ids=ids)


def _hash_name(path: str) -> int:
    """64-bit hash of CLASS/FILE, the end of a path."""
    name = "/".join(path.split(os.sep)[-2:])
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")


def decode_splits(
    splits: Sequence[Split],
    image_size: int,
    *,
    crops: bool = False,
    storage: str = "auto",
    device_bytes: int | None = None,
) -> list[Split]:
    """Decodes images into memory, or leaves them to be decoded whenever they are indexed; the pixels are the same.

    Images in memory have one common size: their own, if all have the same, at most twice the model's; otherwise
    the model's. Cropped images need their own resolution: larger ones, and those of different sizes, are streamed.

    Args:
        splits: of arrays, which are returned as they are, or of `EncodedImages` images.
        image_size: pixels, square, that the model sees.
        crops: whether images will be cropped.
        storage: "memory": decoded now, large images to be cropped at their own size; "stream": decoded later; "auto":
            in memory if the images take at most half of the available memory of host and device.
        device_bytes: memory of a device; None sets no limit.

    Raises:
        UsageError: the images cannot be stored as asked.
        UserError: an image cannot be decoded, or they do not fit.
    """
    if all(split.in_memory for split in splits):
        if storage == "stream":
            raise UsageError(
                "config.dataset.storage is 'stream', which needs folder:DIR or tfds:NAME; set it to 'auto'"
            )
        return list(splits)
    square = size = (image_size, image_size)
    if storage != "stream":
        sizes = set().union(*(_read_sizes(split.images) for split in splits))
        common = sizes.pop() if len(sizes) == 1 else None
        small = common is not None and max(common) <= 2 * image_size
        if crops and storage == "memory" and not common:
            raise UsageError(
                "images of different sizes cannot be cropped in memory; set config.dataset.storage to 'auto' or "
                "'stream', or augment to 'none' or 'flip'"
            )
        if crops and storage == "auto" and not small:
            storage = "stream"
        if common and (crops or small):
            size = common
    if storage != "stream":
        needed = sum(len(split) for split in splits) * math.prod(size) * 3
        available = min(resources.available_memory(), device_bytes or sys.maxsize)
        if storage == "auto" and needed > available // 2:
            storage, size = "stream", square
        elif needed > available:
            raise UserError(
                f"the decoded images need {needed:,} bytes of memory, {available:,} are available; "
                "set dataset.storage to 'stream', or take a slice such as 'train[:10%]'"
            )
    splits = [dataclasses.replace(split, images=dataclasses.replace(split.images, size=size)) for split in splits]
    if storage == "stream":
        return splits
    return [dataclasses.replace(split, images=decode_all(split.images)) for split in splits]


def _read_sizes(images: EncodedImages) -> set[tuple[int, int]]:
    """Returns all different (width, height), upright, mostly from headers alone."""
    from PIL import Image

    sizes: set[tuple[int, int]] = set()

    def read_size(i: int) -> None:
        source = images.open_image(images.numbers[i])
        _check_regular(source)
        with Image.open(source) as image:
            sizes.add(upright_size(image))

    _for_each_picture(images, read_size, "reading headers")
    return sizes


def decode_all(images: EncodedImages) -> np.ndarray:
    """Decodes every image: uint8 [n h w 3]."""
    decoded = np.empty(images.shape, np.uint8)

    def decode(i: int) -> None:
        decoded[i] = images[i]

    _for_each_picture(images, decode, "decoding")
    return decoded


def _for_each_picture(images: EncodedImages, work: Callable[[int], None], title: str) -> None:
    """Calls `work(i)` for every picture in a pool of threads, and names the first of those that fail."""
    num_images = len(images)
    failed: dict[int, Exception] = {}

    def work_on(chunk: range) -> int:
        for i in chunk:
            try:
                work(i)
            except Exception as error:  # a damaged file makes the decoders raise nearly anything
                failed[i] = error
        return len(chunk)

    starts = range(0, num_images, _PICTURES_PER_TASK)
    chunks = [range(start, min(start + _PICTURES_PER_TASK, num_images)) for start in starts]
    with ThreadPoolExecutor(resources.available_cpus()) as pool, progress_bar(total=num_images, desc=title) as bar:
        for num_done in pool.map(work_on, chunks):
            bar.update(num_done)
    if failed:
        first = min(failed)
        error = failed[first]
        message = str(
            error if isinstance(error, UserError) else _picture_error(images.open_image(images.numbers[first]), error)
        )
        raise UserError(message + (f"; {len(failed) - 1} more pictures fail" if len(failed) > 1 else "")) from error


def _check_regular(source: str | Path | BinaryIO) -> None:
    """Refuses a pipe, from which a picture could be waited for forever, a device and a folder."""
    if isinstance(source, str | Path) and os.path.exists(source) and not os.path.isfile(source):
        raise OSError("no regular file")


def _picture_error(source: str | Path | BinaryIO, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"picture {source}: no such file")
    name = source if isinstance(source, str | Path) else getattr(source, "name", "(no name)")
    reason = "not a picture" if "cannot identify" in str(error) else one_line(error)
    return UserError(f"picture {name} cannot be decoded ({reason}); replace or remove it")


def _convert_to_rgb(image: "Image.Image") -> "Image.Image":
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey: PIL itself would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
