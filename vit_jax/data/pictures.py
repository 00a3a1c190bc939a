"""Encoded pictures -> uint8 arrays, at once or when they are asked for: decoding, folders of pictures, memory."""

import dataclasses
import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from vit_jax.crops import Box
from vit_jax.data.splits import SplitSlice
from vit_jax.errors import UserError, one_line
from vit_jax.progress import progress_bar
from vit_jax.types import Split

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_PICTURES_PER_TASK = 64  # one future a picture would cost as much as decoding a small one
_EXIF_ORIENTATION = 0x0112


def decode_picture(
    source: str | Path | BinaryIO,
    *,
    size: tuple[int, int] | None = None,
    draw_box: Callable[[int, int], Box] | None = None,
    outside: tuple[int, ...] = (127, 127, 127),
) -> "Image.Image":
    """Decodes one picture file, whatever its mode, upright and in RGB.

    The camera's EXIF rotation is applied, transparent parts become white, 16-bit greys keep their upper 8 bits.

    Args:
        source: path of a picture, or an open binary file.
        size: (width, height) in pixels to squash the picture to, bilinear with antialiasing; None keeps its own.
        draw_box: (height, width) in pixels -> the part to squash; None takes all of it. Needs `size`.
        outside: colour of what a box covers outside of the picture.

    Returns:
        The picture, mode "RGB".

    Raises:
        UserError: the file is missing, or cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        _check_regular(source)
        with Image.open(source) as image:
            width, height = upright_size(image)
            top, left, rows, columns = map(float, draw_box(height, width)) if draw_box else (0.0, 0.0, height, width)
            if size:
                # A JPEG decoder can leave out the detail that resizing would average away, which is faster.
                detail = 2 * max(size) / min(rows, columns)
                image.draft(None, (round(image.width * detail), round(image.height * detail)))
            picture = _convert_to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a damaged file makes the decoders raise nearly anything
        raise _picture_error(source, error) from error
    if not size or (picture.size == size and not draw_box):
        return picture
    scale_x, scale_y = picture.width / width, picture.height / height
    box = (left * scale_x, top * scale_y, (left + columns) * scale_x, (top + rows) * scale_y)
    return _squash(picture, box, size, outside)


def _squash(
    picture: "Image.Image", box: tuple[float, ...], size: tuple[int, int], outside: tuple[int, ...]
) -> "Image.Image":
    """Cuts a box (left, top, right, bottom) out of a picture and resizes it, without a look at what lies around it."""
    from PIL import Image, ImageOps

    slack = 1e-3  # of rounding
    left, top = (math.floor(edge + slack) for edge in box[:2])
    right, bottom = (math.ceil(edge - slack) for edge in box[2:])
    margin = max(0, -left, -top, right - picture.width, bottom - picture.height)
    if margin:
        picture = ImageOps.expand(picture, margin, outside)
    part = picture.crop((left + margin, top + margin, right + margin, bottom + margin))
    inner = (
        max(0, box[0] - left),
        max(0, box[1] - top),
        min(part.width, box[2] - left),
        min(part.height, box[3] - top),
    )
    return part.resize(size, Image.Resampling.BILINEAR, inner)


def upright_size(image: "Image.Image") -> tuple[int, int]:
    """(width, height) after the camera's rotation, from the header alone."""
    # Asking for EXIF where the header has none would decode a whole PNG.
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if "exif" in image.info else 1
    return image.size[::-1] if orientation in (5, 6, 7, 8) else image.size


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Picture files that are decoded when they are asked for; reads like an array uint8 [n h w 3].

    Attributes:
        open_picture: number of a picture -> its path, or a binary file.
        numbers: int [n], those of the pictures.
        size: (width, height) in pixels that every one is squashed to.
    """

    open_picture: Callable[[int], str | BinaryIO]
    numbers: np.ndarray
    size: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[n h w 3]."""
        return len(self), self.size[1], self.size[0], 3

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.numbers)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Decodes a picture [h w 3], or those of a slice or an array of rows [m h w 3], in as many threads as cores."""
        if np.ndim(rows) == 0 and not isinstance(rows, slice):
            return np.asarray(decode_picture(self.open_picture(self.numbers[rows]), size=self.size))
        return decode_all(dataclasses.replace(self, numbers=self.numbers[rows]))

    def take(self, rows: np.ndarray, axis: int = 0) -> "Encoded":
        """Some of the pictures, none of them decoded; as `numpy.ndarray.take` along axis 0."""
        return dataclasses.replace(self, numbers=self.numbers.take(rows, axis))


def list_folder(root: Path, splits: dict[str, SplitSlice]) -> tuple[Split, Split, tuple[str, ...]]:
    """Lists DIR/SPLIT/CLASS/*.jpg and the like: what to train on, what to test on, class names."""
    if not root.is_dir():
        raise UserError(f"dataset folder:{root}: no such directory")
    files = {split.name: _list_classes(root / split.name) for split in splits.values()}
    train_classes, test_classes = (set(files[split.name]) for split in splits.values())
    if train_classes != test_classes:
        differing = [f"{name} (only in {splits['train'].name})" for name in sorted(train_classes - test_classes)]
        differing += [f"{name} (only in {splits['test'].name})" for name in sorted(test_classes - train_classes)]
        raise UserError(f"{root}: both splits must have the same class folders; these differ: {', '.join(differing)}")
    class_names = tuple(sorted(train_classes))
    train, test = (_select_files(files[split.name], class_names, split) for split in splits.values())
    return train, test, class_names


def _list_classes(split_dir: Path) -> dict[str, list[Path]]:
    """Class name -> its picture files, sorted; hidden files and folders are passed over."""
    if not split_dir.is_dir():
        raise UserError(f"{split_dir}: no such directory; a folder dataset is DIR/{{train,test}}/CLASS/PICTURE")
    classes = {}
    for class_dir in sorted(split_dir.iterdir()):
        if not class_dir.is_dir() or class_dir.name.startswith("."):
            continue
        files = sorted(entry for entry in class_dir.iterdir() if not entry.name.startswith("."))
        classes[class_dir.name] = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
        if not classes[class_dir.name]:
            others = f"; its {len(files)} other files are not read" if files else ""
            raise UserError(f"class folder {class_dir} has no pictures ({', '.join(PICTURE_SUFFIXES)}){others}")
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
    return Split(images=Encoded(paths.__getitem__, chosen), labels=labels[chosen], ids=ids)


def _hash_name(path: str) -> int:
    """64-bit hash of CLASS/FILE, the end of a path."""
    name = "/".join(path.split(os.sep)[-2:])
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")


def decode_splits(
    encoded: Sequence[Split], image_size: int, *, storage: str = "auto", device_bytes: int | None = None
) -> list[Split]:
    """Brings every picture to one common size: now, or, of what would fill the memory, when it is asked for.

    Args:
        encoded: splits of `Encoded` images.
        image_size: pixels, square, that the model sees.
        storage: "memory": now; "stream": later; "auto": by their size.
        device_bytes: what a device has for them; None sets no limit.

    Raises:
        UserError: a picture cannot be decoded, or they do not fit.
    """
    square = size = (image_size, image_size)
    if storage != "stream":
        sizes = set().union(*(_read_sizes(split.images) for split in encoded))
        common = sizes.pop() if len(sizes) == 1 else square
        size = common if max(common) <= 2 * image_size else square
        needed = sum(len(split) for split in encoded) * math.prod(size) * 3
        available = min(_available_bytes(), device_bytes or sys.maxsize)
        if storage == "auto" and needed > available // 2:
            storage, size = "stream", square
        elif needed > available:
            raise UserError(
                f"the decoded pictures need {needed:,} bytes of memory, {available:,} are available; "
                "set dataset.storage to 'stream', or take a slice such as 'train[:10%]'"
            )
    splits = [dataclasses.replace(split, images=dataclasses.replace(split.images, size=size)) for split in encoded]
    if storage == "stream":
        return splits
    return [dataclasses.replace(split, images=decode_all(split.images)) for split in splits]


def _read_sizes(images: Encoded) -> set[tuple[int, int]]:
    """All different (width, height), upright, from the headers only."""
    from PIL import Image

    sizes: set[tuple[int, int]] = set()

    def read_size(i: int) -> None:
        source = images.open_picture(images.numbers[i])
        _check_regular(source)
        with Image.open(source) as image:
            sizes.add(upright_size(image))

    _for_each_picture(images, read_size, "reading headers")
    return sizes


def decode_all(images: Encoded) -> np.ndarray:
    """Every picture, uint8 [n h w 3]."""
    decoded = np.empty(images.shape, np.uint8)

    def decode(i: int) -> None:
        decoded[i] = images[i]

    _for_each_picture(images, decode, "decoding")
    return decoded


def _for_each_picture(images: Encoded, work: Callable[[int], None], title: str) -> None:
    """Calls `work(i)` for every picture in a pool of threads, and names the first of those that fail."""
    num_pictures = len(images)
    failed: dict[int, Exception] = {}

    def work_on(chunk: range) -> int:
        for i in chunk:
            try:
                work(i)
            except Exception as error:  # a damaged file makes the decoders raise nearly anything
                failed[i] = error
        return len(chunk)

    starts = range(0, num_pictures, _PICTURES_PER_TASK)
    chunks = [range(start, min(start + _PICTURES_PER_TASK, num_pictures)) for start in starts]
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar(total=num_pictures, desc=title) as bar:
        for num_done in pool.map(work_on, chunks):
            bar.update(num_done)
    if failed:
        first = min(failed)
        error = failed[first]
        message = str(
            error if isinstance(error, UserError) else _picture_error(images.open_picture(images.numbers[first]), error)
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


def _available_bytes() -> int:
    """Memory that can be had without swapping; the physical memory where the system does not say."""
    meminfo = Path("/proc/meminfo")  # Linux only; its MemAvailable counts the file cache, SC_AVPHYS_PAGES does not
    match = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(match[1]) * 1024 if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
