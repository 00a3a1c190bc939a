"""Requests for splits, and their slices in TFDS syntax, such as "train[:90%]"."""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping

from vit_jax.runtime.errors import UsageError
from vit_jax.types import Split

ROLES = ("train", "validation", "test")
OpenedSplits = tuple[dict[str, Split], tuple[str, ...]]  # role -> split, and class names

_SPLIT_PATTERN = re.compile(r"(?P<name>[\w.\-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


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
        splits: role, one of `ROLES`, -> name or slice of a split; "" for no validation split, or that of a directory.
        only: role of the only split to open; "" opens all of them.
        data_dir: see `DatasetOptions`.
        dry_run: nothing is downloaded or decoded: the numbers of images are right, but the images may be black, with
            evenly distributed labels.
    """

    name: str
    splits: Mapping[str, str]
    only: str = ""
    data_dir: str = ""
    dry_run: bool = False

    def slices(self, *, known: Iterable[str] = ()) -> dict[str, SplitSlice]:
        """Parses the splits to open; see `parse_split`."""
        return {
            role: parse_split(text, known=known)
            for role, text in self.splits.items()
            if self.only in ("", role) and (text or role != "validation")
        }


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


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Sorts known names by their similarity to a mistyped name."""
    return sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())


def _parse_bound(bound: str, num_images: int) -> int:
    number = int(bound.rstrip("%"))
    index = round(number * num_images / 100) if bound.endswith("%") else number
    return index + num_images if number < 0 else index
