"""Encoded pictures -> one uint8 array: decoding, folders of pictures, memory."""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from vit_jax.data.splits import SplitSlice
from vit_jax.errors import UserError, one_line
from vit_jax.types import Dataset, Split

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_PROGRESS_MIN_PICTURES = 2000  # fewer are read before a progress bar could be looked at
_PICTURES_PER_TASK = 64  # one future a picture would cost as much as decoding a small one
_EXIF_ORIENTATION = 0x0112


def decode_picture(source: str | Path | BinaryIO, *, size: tuple[int, int] | None = None) -> "Image.Image":
    """Decodes one picture file, whatever its mode, upright and in RGB.

    The camera's EXIF rotation is applied, transparent parts become white, 16-bit greys keep their upper 8 bits.

    Args:
        source: path of a picture, or an open binary file.
        size: (width, height) in pixels to squash the picture to, bilinear with antialiasing; None keeps its own.

    Returns:
        The picture, mode "RGB".

    Raises:
        UserError: the file is missing, or cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        _check_regular(source)
        with Image.open(source) as image:
            if size:
                # A JPEG decoder can leave out the detail that resizing would average away, which is faster.
                image.draft(None, (2 * max(size), 2 * max(size)))
            picture = _convert_to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # a damaged file makes the decoders raise nearly anything
        raise _picture_error(source, error) from error
    if size and picture.size != size:
        picture = picture.resize(size, Image.Resampling.BILINEAR)
    return picture


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Pictures of one split that are not decoded yet: `open_picture(i)` is a path or a binary file."""

    open_picture: Callable[[int], Path | BinaryIO]
    labels: np.ndarray  # int32 [n]


def load_folder(root: Path, splits: dict[str, SplitSlice], image_size: int) -> Dataset:
    """Reads DIR/SPLIT/CLASS/*.jpg and the like."""
    if not root.is_dir():
        raise UserError(f"dataset folder:{root}: no such directory")
    files = {split.name: _list_classes(root / split.name) for split in splits.values()}
    train_classes, test_classes = (set(files[split.name]) for split in splits.values())
    if train_classes != test_classes:
        differing = [f"{name} (only in {splits['train'].name})" for name in sorted(train_classes - test_classes)]
        differing += [f"{name} (only in {splits['test'].name})" for name in sorted(test_classes - train_classes)]
        raise UserError(f"{root}: both splits must have the same class folders; these differ: {', '.join(differing)}")
    class_names = tuple(sorted(train_classes))
    encoded = {role: _select_files(files[split.name], class_names, split) for role, split in splits.items()}
    train, test = decode_splits(encoded, image_size)
    return Dataset(train=train, test=test, class_names=class_names)


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


def _select_files(classes: dict[str, list[Path]], class_names: Sequence[str], split: SplitSlice) -> Encoded:
    """The files of a split, in the order of classes and names.

    A slice is cut from a fixed shuffle: cut from the sorted files, "train[:90%]" would lose the last classes.
    """
    paths = [path for name in class_names for path in classes[name]]
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), [len(classes[name]) for name in class_names])
    start, stop = split.bounds(len(paths))
    chosen = np.sort(np.random.RandomState(0).permutation(len(paths))[start:stop])
    chosen_paths = [paths[i] for i in chosen]
    return Encoded(open_picture=chosen_paths.__getitem__, labels=labels[chosen])


def decode_splits(encoded: dict[str, Encoded], image_size: int) -> list[Split]:
    """Decodes every picture to one common size."""
    sizes = [_read_sizes(pictures) for pictures in encoded.values()]
    different = set().union(*sizes)
    size = different.pop() if len(different) == 1 else (image_size, image_size)
    if max(size) > 2 * image_size:
        size = (image_size, image_size)
    width, height = size
    _check_memory(sum(len(pictures.labels) for pictures in encoded.values()) * height * width * 3)
    return [_decode_split(pictures, size) for pictures in encoded.values()]


def _read_sizes(pictures: Encoded) -> set[tuple[int, int]]:
    """All different (width, height), upright, from the headers only."""
    from PIL import Image

    sizes: set[tuple[int, int]] = set()

    def read_size(i: int) -> None:
        source = pictures.open_picture(i)
        _check_regular(source)
        with Image.open(source) as image:
            # Asking for EXIF where the header has none would decode a whole PNG.
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1) if "exif" in image.info else 1
            sizes.add(image.size[::-1] if orientation in (5, 6, 7, 8) else image.size)

    _for_each_picture(pictures, read_size, "reading headers")
    return sizes


def _decode_split(pictures: Encoded, size: tuple[int, int]) -> Split:
    width, height = size
    images = np.empty((len(pictures.labels), height, width, 3), np.uint8)  # [n h w c]

    def decode(i: int) -> None:
        images[i] = np.asarray(decode_picture(pictures.open_picture(i), size=size))

    _for_each_picture(pictures, decode, "decoding")
    return Split(images=images, labels=pictures.labels)


def _for_each_picture(pictures: Encoded, work: Callable[[int], None], title: str) -> None:
    """Calls `work(i)` for every picture in a pool of threads, and names the first of those that fail."""
    from tqdm import tqdm

    num_pictures = len(pictures.labels)
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
    silent = num_pictures < _PROGRESS_MIN_PICTURES
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=num_pictures, desc=title, disable=silent) as bar:
        for num_done in pool.map(work_on, chunks):
            bar.update(num_done)
    if failed:
        first = min(failed)
        error = failed[first]
        message = str(error if isinstance(error, UserError) else _picture_error(pictures.open_picture(first), error))
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


def _check_memory(num_bytes: int) -> None:
    available = _available_bytes()
    if num_bytes > available:
        raise UserError(
            f"the decoded pictures need {num_bytes:,} bytes of memory, {available:,} are available;"
            " take a smaller image_size or a slice such as 'train[:10%]'"
        )


def _available_bytes() -> int:
    """Memory that can be had without swapping; the physical memory where the system does not say."""
    meminfo = Path("/proc/meminfo")  # Linux only; its MemAvailable counts the file cache, SC_AVPHYS_PAGES does not
    match = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(match[1]) * 1024 if match else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
