"""Requests for splits, and their slices in TFDS syntax, such as "train[:90%]"."""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from vit_jax.runtime.errors import UsageError
from vit_jax.types import Split

ROLES = ("train", "validation", "test")

_SPLIT_PATTERN = re.compile(r"(?P<name>[\w.\-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


class OpenedSplits(NamedTuple):
    """Splits by role, class names, and one line for each kind of files that were not read."""

    splits: dict[str, Split]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SplitSlice:
    """A parsed split such as "train[:90%]"; a bound is a number or a percentage."""

    text: str
    name: str
    start: str
    stop: str

    def rows(self, num_images: int) -> range:
        """Returns the selected rows of the split; percentages are rounded to the nearest image, as in TFDS."""
        start, stop = (_parse_bound(bound, num_images) for bound in (self.start, self.stop))
        if not 0 <= start < stop <= num_images:
            raise UsageError(
                f"split {self.text!r} selects images {start} to {stop} of {num_images:,} in {self.name!r}; "
                "select at least one image"
            )
        return range(start, stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A dataset and the splits to open.

    Attributes:
        name: such as "cifar10" or "folder:DIR".
        splits: role -> name or slice of a split; the roles are `ROLES`, and "other" for any other split.
        only: role of the only split to open; "" opens all of them.
        data_dir, classes, split_seed, test_fraction, validation_fraction: see `DatasetOptions`.
        dry_run: nothing is downloaded or decoded: the numbers of images are right, but the images may be black, with
            evenly distributed labels.
    """

    name: str
    splits: Mapping[str, str]
    only: str = ""
    data_dir: str = ""
    classes: Sequence[str] = ()
    split_seed: int = 0
    test_fraction: float = 0.0
    validation_fraction: float = 0.0
    dry_run: bool = False

    def slices(self, *, known: Iterable[str] = ()) -> dict[str, SplitSlice]:
        """Parses the splits to open; see `parse_split`."""
        return {
            role: parse_split(text, known=known)
            for role, text in self.splits.items()
            if self.only in ("", role) and (text or role != "validation")
        }

    def all_slices(self) -> dict[str, SplitSlice]:
        """Parses all splits, also those that are not to be opened."""
        return dataclasses.replace(self, only="").slices()


def parse_split(text: str, *, known: Iterable[str] = ()) -> SplitSlice:
    """Parses the name or a slice of a split in TFDS syntax; without `known` names, any name is allowed."""
    match = _SPLIT_PATTERN.fullmatch(text.strip())
    names = nearest_first(match["name"] if match else text, known)
    if not match or (names and match["name"] not in names):
        raise UsageError(
            f"unknown split {text!r}; expected {', '.join(names) or 'a name'}, or a slice such as 'train[:90%]'"
        )
    return SplitSlice(text, match["name"], match["start"] or "0", match["stop"] or "100%")


def select_rows(slices: Mapping[str, SplitSlice], num_images: Mapping[str, int]) -> dict[str, range]:
    """Returns the rows of the slice of each role, given the sizes of the full splits.

    Raises:
        UsageError: a slice is empty, or two slices overlap.
    """
    selected = {role: split.rows(num_images[split.name]) for role, split in slices.items()}
    for (role, rows), (other, others) in itertools.combinations(selected.items(), 2):
        first, second = slices[role], slices[other]
        shared = min(rows.stop, others.stop) - max(rows.start, others.start)
        if first.name == second.name and shared > 0:
            raise UsageError(
                f"{role}_split {first.text!r} and {other}_split {second.text!r} overlap in {shared:,} of "
                f"{num_images[first.name]:,} images; choose disjoint slices, such as 'train[:90%]' and 'train[90%:]'"
            )
    return selected


def slice_splits(whole: Mapping[str, Split], slices: Mapping[str, SplitSlice]) -> dict[str, Split]:
    """Slices splits in memory, by name, without copying; returns them by role."""
    selected = select_rows(slices, {name: len(split) for name, split in whole.items()})
    return {
        role: Split(*(array[rows.start : rows.stop] for array in (whole[name].images, whole[name].labels)))
        for role, rows, name in ((role, rows, slices[role].name) for role, rows in selected.items())
    }


def stratified_order(labels: Int[np.ndarray, " n"], hashes: UInt64[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Returns an order of images in which each range has images of all classes, in proportion to their numbers.

    Within a class, images are ordered by their hashes.
    """
    ranks, counts = _ranks(labels, hashes)
    return np.lexsort((hashes, (ranks + 0.5) / counts))


def sample_fraction(
    labels: Int[np.ndarray, " n"], hashes: UInt64[np.ndarray, " n"], fraction: float
) -> Bool[np.ndarray, " n"]:
    """Returns a mask of the images with the smallest hashes, a fraction of each class rounded to whole images.

    It does not depend on the order of the images, nor for one class on the images of the others. At least one image of
    each class is not selected.
    """
    ranks, counts = _ranks(labels, hashes)
    return (ranks + 0.5 < fraction * counts) & (ranks < counts - 1)


def _ranks(
    labels: Int[np.ndarray, " n"], hashes: UInt64[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns the rank of each image among the hashes of its class, from 0, and the number of images of its class."""
    order, counts = np.lexsort((hashes, labels)), np.bincount(labels)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    return ranks, counts[labels]


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Sorts known names by their similarity to a mistyped name."""
    return sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())


def _parse_bound(bound: str, num_images: int) -> int:
    number = int(bound.rstrip("%"))
    index = round(number * num_images / 100) if bound.endswith("%") else number
    return index + num_images if number < 0 else index
