"""Reads directories of image files, DIR/SPLIT/CLASS/IMAGE or DIR/CLASS/IMAGE."""

import collections
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_jax.data.images import IMAGE_SUFFIXES, MISSING_FORMATS
from vit_jax.data.listing import Listing, SplitRows, canonical_split, open_listing, requested_slices
from vit_jax.data.splits import ROLES, OpenedSplits, Request
from vit_jax.runtime.errors import UserError, one_line

_LAYOUT = "DIR/{train,validation,test}/CLASS/IMAGE or DIR/CLASS/IMAGE"


def open_folder(request: Request) -> OpenedSplits:
    """Opens "folder:DIR"; reads only file names."""
    root = Path(request.name.partition(":")[2]).expanduser()
    return open_listing(list_folder(root, request), request)


def list_folder(root: Path, request: Request) -> Listing:
    """Lists the images of a directory; hidden files and directories are skipped.

    `root` has directories of splits if one that is named like a split has directories, which are its classes.
    Otherwise, its own directories are the classes, and all images are training images.
    """
    used = {split.name for split in requested_slices(request).values()} | set(ROLES)
    directories = _subdirectories(root)
    split_dirs = {path.name: path for path in directories if canonical_split(path.name) in used}
    if not any(map(_subdirectories, split_dirs.values())):
        split_dirs = {}
    if len(split_dirs) > len({canonical_split(name) for name in split_dirs}):
        raise UserError(f"{root} has both validation and val; expected one of them, rename the other")

    unread: collections.Counter[str] = collections.Counter()
    paths: list[str] = []
    names: list[str] = []
    class_of: list[str] = []
    splits: SplitRows = {}
    for split, directory in (split_dirs or {"train": root}).items():
        start = len(paths)
        for class_dir in _class_dirs(directory, root):
            images = [*_list_images(class_dir, class_dir.name, {}, unread)]
            if not images and (not request.classes or class_dir.name in request.classes):
                raise UserError(f"{class_dir}: no images ({_suffixes()}) in it; add images, or remove it")
            paths += [path for path, _ in images]
            names += [name for _, name in images]
            class_of += [class_dir.name] * len(images)
        splits[canonical_split(split)] = np.arange(start, len(paths))
    class_names = tuple(sorted(set(class_of)))
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = np.array([label_of[name] for name in class_of], np.int32)
    return Listing(str(root), paths, names, labels, class_names, splits, _describe_unread(root, unread))


def _subdirectories(directory: Path) -> list[Path]:
    """Returns the directories in a directory, sorted; not the hidden ones."""
    return [path for path, is_directory, _ in _scan(directory) if is_directory]


def _class_dirs(directory: Path, root: Path) -> list[Path]:
    found = _subdirectories(directory)
    if not found:
        raise UserError(f"{directory} has no class directories; expected {_LAYOUT}, where DIR is {root}")
    return found


def _scan(directory: Path) -> Iterator[tuple[Path, bool, bool]]:
    """Yields (path, is a directory, is a file) of all but hidden entries, sorted by name."""
    try:
        with os.scandir(directory) as entries:
            found = sorted((entry.name, entry.is_dir(), entry.is_file()) for entry in entries)
    except FileNotFoundError as error:
        raise UserError(f"{directory}: no such directory; expected {_LAYOUT}") from error
    except OSError as error:  # no permission, not a directory, or a symbolic link to itself
        raise UserError(
            f"{error.filename or directory} cannot be read ({error.strerror or one_line(error)}); "
            "change its permissions, or remove it"
        ) from error
    yield from ((directory / name, is_dir, is_file) for name, is_dir, is_file in found if name[0] != ".")


def _list_images(
    directory: Path, name: str, parents: Mapping[tuple[int, int], Path], unread: collections.Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yields (path, name relative to the split) of the images in a directory and those below; counts other files."""
    status = directory.stat()
    key = status.st_dev, status.st_ino
    if key in parents:
        raise UserError(f"{directory} is a symbolic link to {parents[key]}, which contains it; remove it")
    for path, is_directory, is_file in _scan(directory):
        if is_directory:
            yield from _list_images(path, f"{name}/{path.name}", {**parents, key: directory}, unread)
        elif is_file and path.suffix.lower() in IMAGE_SUFFIXES:
            yield str(path), f"{name}/{path.name}"
        else:
            unread[path.suffix.lower() or "without suffix" if is_file else "broken links or special files"] += 1


def _describe_unread(root: Path, unread: Mapping[str, int]) -> tuple[str, ...]:
    if not unread:
        return ()
    counts = ", ".join(f"{number:,} {suffix}" for suffix, number in sorted(unread.items()))
    needed = {MISSING_FORMATS[suffix] for suffix in unread if suffix in MISSING_FORMATS}
    advice = f"; {', '.join(sorted(needed))}" if needed else ""
    return (f"{root}: files that were not read: {counts}{advice}",)


def _suffixes(suffixes: Sequence[str] = IMAGE_SUFFIXES) -> str:
    return ", ".join(suffixes)
