"""Reads directories of image files, DIR/SPLIT/CLASS/IMAGE."""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vit_jax.data.images import IMAGE_SUFFIXES, EncodedImages
from vit_jax.data.splits import OpenedSplits, Request, select_rows
from vit_jax.runtime.errors import UserError
from vit_jax.types import Split


def open_folder(request: Request) -> OpenedSplits:
    """Opens "folder:DIR"; reads only file names."""
    root = Path(request.name.partition(":")[2]).expanduser()
    splits = dict(request.splits)
    if "validation" in splits and not splits["validation"]:
        used = {split.name for split in request.slices().values()}
        names = [name for name in ("validation", "val") if (root / name).is_dir() and name not in used]
        splits["validation"] = names[0] if names else ""
    slices = dataclasses.replace(request, splits=splits).slices()
    if not slices:
        return {}, ()
    files = {split.name: _list_classes(root / split.name) for split in slices.values()}
    class_names = tuple(next(iter(files.values())))
    common = set(class_names).intersection(*files.values())
    differing = [f"{name} (only in {split})" for split in files for name in files[split] if name not in common]
    if differing:
        raise UserError(f"{root}: all splits must have the same classes; these differ: {', '.join(differing)}")
    selected = select_rows(slices, {name: sum(map(len, classes.values())) for name, classes in files.items()})
    return {role: _select_files(files[slices[role].name], rows) for role, rows in selected.items()}, class_names


def _list_classes(split_dir: Path) -> dict[str, list[str]]:
    """Returns class name -> paths of images, both sorted; hidden files and directories are skipped."""
    entries = sorted(split_dir.iterdir()) if split_dir.is_dir() else []
    directories = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    classes = {directory.name: _list_images(directory) for directory in directories}
    empty = next((directory for directory in directories if not classes[directory.name]), None)
    if empty or not classes:
        raise UserError(
            f"{empty or split_dir}: no such directory, or no images ({', '.join(IMAGE_SUFFIXES)}) in it; "
            f"expected {split_dir.parent}/{{train,test}}/CLASS/IMAGE"
        )
    return classes


def _list_images(directory: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(directory) if entry.is_file())
    return [str(directory / name) for name in names if name[0] != "." and Path(name).suffix.lower() in IMAGE_SUFFIXES]


def _select_files(classes: Mapping[str, Sequence[str]], rows: range) -> Split:
    """Selects rows of a fixed permutation, so that "train[:90%]" has images of all classes; sorts them by class."""
    paths = [path for files in classes.values() for path in files]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(files) for files in classes.values()])
    selected = np.sort(np.random.RandomState(0).permutation(len(paths))[rows.start : rows.stop])
    ids = np.array([_hash_name(paths[i]) for i in selected], np.uint64)
    return Split(images=EncodedImages(paths.__getitem__, selected), labels=labels[selected], ids=ids)


def _hash_name(path: str) -> int:
    """Returns a 64-bit hash of CLASS/IMAGE, the last two parts of a path."""
    name = "/".join(path.split(os.sep)[-2:])
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")
