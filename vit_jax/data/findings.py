"""Class counts of a dataset, images that are in several splits, and the problems found while it was read."""

import collections
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from vit_jax.data.images import list_first
from vit_jax.runtime.files import write_atomically
from vit_jax.types import Dataset, Findings, ImageSource, Split

MIN_TRAIN_IMAGES = 10
"""Classes with fewer training images are named in a warning."""
MAX_IMBALANCE = 10
"""Ratio of the numbers of training images of two classes above which there is a warning."""
_MAX_ROWS = 20  # of the table of classes


def find_duplicates(splits: Sequence[Split]) -> tuple[tuple[str, ...], ...]:
    """Returns groups of paths of equal images that are in at least two of the splits; splits without paths are ignored.

    Images in memory are equal if their pixels are, at the size they are kept at. Streamed images are equal if their
    files are: only files of the same size are read.
    """
    paths = [split.paths for split in splits if split.paths is not None]
    splits = [split for split in splits if split.paths is not None]
    groups: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    for number, split in enumerate(splits):
        for row in range(len(split)):
            groups[_cheap_key(split.images, paths[number], row)].append((number, row))
    found = []
    for group in groups.values():
        if len({number for number, _ in group}) < 2:
            continue
        equal: dict[bytes, list[tuple[int, int]]] = collections.defaultdict(list)
        for number, row in group:
            equal[_digest(splits[number].images, paths[number], row)].append((number, row))
        found += [rows for rows in equal.values() if len({number for number, _ in rows}) > 1]
    return tuple(tuple(paths[number][row] for number, row in rows) for rows in sorted(found))


def _cheap_key(images: ImageSource, paths: np.ndarray, row: int) -> int:
    """Returns a number that is the same for equal images."""
    return zlib.crc32(images[row]) if isinstance(images, np.ndarray) else os.path.getsize(paths[row])


def _digest(images: ImageSource, paths: np.ndarray, row: int) -> bytes:
    content = images[row].tobytes() if isinstance(images, np.ndarray) else Path(paths[row]).read_bytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def class_counts(dataset: Dataset) -> dict[str, np.ndarray]:
    """Returns the number of images of each class, int64 [number of classes], by split."""
    size = len(dataset.class_names)
    return {role: np.bincount(split.labels, minlength=size) for role, split in dataset.splits.items()}


def describe_classes(dataset: Dataset) -> str:
    """Returns a table of the number of images per class and split; of many classes, those with the fewest and most."""
    counts = class_counts(dataset)
    order, size = np.argsort(-counts["train"], kind="stable"), len(dataset.class_names)
    shown = range(size) if size <= _MAX_ROWS else [*order[: _MAX_ROWS // 2], *sorted(order[-(_MAX_ROWS // 2) :])]
    rows = [["images per class", *counts]]
    rows += [[dataset.class_names[label], *(f"{number[label]:,}" for number in counts.values())] for label in shown]
    if len(shown) < size:
        rows.insert(1 + _MAX_ROWS // 2, [f"… {size - len(shown):,} more", *[""] * len(counts)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[text.rjust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *line[1:]]) for row, line in zip(rows, lines, strict=True))


def describe_warnings(dataset: Dataset) -> Iterator[str]:
    """Yields one line for each problem: damaged images, equal images in several splits, few images, imbalance."""
    findings, names = dataset.findings, dataset.class_names
    if damaged := findings.damaged:
        yield f"skipped images that cannot be decoded ({len(damaged):,}): {list_first(damaged)}"
    if findings.duplicates:
        pairs = [" = ".join(paths) for paths in findings.duplicates]
        yield f"equal images in more than one split ({len(pairs):,}): {list_first(pairs)}; remove them from all but one"
    numbers = class_counts(dataset)["train"]
    few = [f"{names[label]} ({numbers[label]})" for label in np.flatnonzero(numbers < MIN_TRAIN_IMAGES)]
    if few:
        yield f"classes with fewer than {MIN_TRAIN_IMAGES} training images ({len(few):,}): {list_first(few, 5)}"
    least, most = int(numbers.argmin()), int(numbers.argmax())
    if numbers[most] > MAX_IMBALANCE * numbers[least]:
        yield (
            f"classes are imbalanced: {numbers[most]:,} training images of {names[most]}, "
            f"{numbers[least]:,} of {names[least]}; consider dataset.sampling=balanced"
        )


def save_findings(findings: Findings, workdir: Path) -> None:
    """Writes damaged.txt and duplicates.txt, one line each, for findings of which a warning shows only the first."""
    save_lines(findings.damaged, workdir / "damaged.txt")
    save_lines(["\t".join(paths) for paths in findings.duplicates], workdir / "duplicates.txt")


def save_lines(lines: Sequence[str], path: Path) -> bool:
    """Writes more than 20 lines to a file; returns whether it did."""
    if len(lines) <= 20:
        return False
    write_atomically(path, "".join(f"{line}\n" for line in lines))
    return True
