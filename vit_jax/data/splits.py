"""Parses split names and slices, such as "train[:90%]"."""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from vit_jax.runtime.errors import UsageError
from vit_jax.types import Split

OpenedSplits = tuple[list[Split], tuple[str, ...]]  # splits, and class names

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


def parse_split(text: str, *, known: Iterable[str] = ()) -> SplitSlice:
    """Parses the name or a slice of a split in TFDS syntax; without `known` names, any name is allowed."""
    match = _SPLIT_PATTERN.fullmatch(text.strip())
    names = nearest_first(match["name"] if match else text, known)
    if not match or (names and match["name"] not in names):
        raise UsageError(
            f"unknown split {text!r}; expected {', '.join(names) or 'a name'}, or a slice such as 'train[:90%]'"
        )
    return SplitSlice(text, match["name"], match["start"] or "0", match["stop"] or "100%")


def select_rows(slices: Sequence[SplitSlice], num_images: Mapping[str, int]) -> list[range]:
    """Returns the rows of each slice, given the sizes of the full splits; raises UsageError if slices overlap."""
    selected = [(split, split.rows(num_images[split.name])) for split in slices]
    for (first, rows), (second, others) in itertools.combinations(selected, 2):
        shared = min(rows.stop, others.stop) - max(rows.start, others.start)
        if first.name == second.name and shared > 0:
            raise UsageError(
                f"train_split {first.text!r} and test_split {second.text!r} overlap in {shared:,} of "
                f"{num_images[first.name]:,} images; choose disjoint slices, such as 'train[:90%]' and 'train[90%:]'"
            )
    return [rows for _, rows in selected]


def slice_splits(whole: Mapping[str, Split], slices: Sequence[SplitSlice]) -> list[Split]:
    """Slices splits in memory, by name, without copying."""
    selected = select_rows(slices, {name: len(split) for name, split in whole.items()})
    return [
        Split(whole[split.name].images[rows.start : rows.stop], whole[split.name].labels[rows.start : rows.stop])
        for split, rows in zip(slices, selected, strict=True)
    ]


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Sorts known names by their similarity to a mistyped name."""
    return sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())


def _parse_bound(bound: str, num_images: int) -> int:
    number = int(bound.rstrip("%"))
    index = round(number * num_images / 100) if bound.endswith("%") else number
    return index + num_images if number < 0 else index
