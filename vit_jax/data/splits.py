"""Split names and their slices, such as "train[:90%]"."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Sequence

from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.types import Split


@dataclasses.dataclass(frozen=True)
class SplitSlice:
    """A parsed split such as "train[:90%]"; a bound is (number, is a percentage)."""

    text: str
    name: str
    start: tuple[int, bool] | None
    stop: tuple[int, bool] | None

    def bounds(self, num_images: int) -> tuple[int, int]:
        """The first index and the one after the last; percentages are rounded to the closest picture as TFDS does."""
        start, stop = (
            default if bound is None else self._absolute(*bound, num_images)
            for bound, default in ((self.start, 0), (self.stop, num_images))
        )
        if start >= stop:
            raise UserError(
                f"split {self.text!r} is empty: {num_images} pictures in {self.name!r}, asked for [{start}:{stop}]"
            )
        return start, stop

    def _absolute(self, number: int, is_percent: bool, num_images: int) -> int:
        index = round(number * num_images / 100) if is_percent else number
        if abs(index) > num_images:
            raise UsageError(f"split {self.text!r} reaches past the {num_images} pictures of {self.name!r}")
        return index + num_images if number < 0 else index


_SPLIT_PATTERN = re.compile(r"(?P<name>[\w.\-]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def parse_split(text: str, *, known: Sequence[str] = ()) -> SplitSlice:
    """Reads a split's text; a name that is not in `known` is a UsageError, unless nothing is known."""
    match = _SPLIT_PATTERN.fullmatch(text.strip())
    if not match:
        raise UsageError(f"cannot read split {text!r}; write a split's name, or a slice such as 'train[:90%]'")
    if known and match["name"] not in known:
        raise UsageError(f"unknown split {text!r}; known are {', '.join(nearest_first(match['name'], known))}")
    bounds = []
    for bound in (match["start"], match["stop"]):
        bounds.append((int(bound.rstrip("%")), bound.endswith("%")) if bound else None)
        if bound and bound.endswith("%") and abs(int(bound[:-1])) > 100:
            raise UsageError(f"split {text!r} asks for {bound}; percentages lie between -100% and 100%")
    return SplitSlice(text=text, name=match["name"], start=bounds[0], stop=bounds[1])


def check_disjoint(splits: Sequence[SplitSlice], num_images: int) -> None:
    """Raises UsageError if two slices of one split share an image: it would be trained and tested on.

    Args:
        splits: of the same name, the one to train on first.
        num_images: of the whole split.
    """
    if len(splits) < 2:
        return
    (first, first_stop), (second, second_stop) = (split.bounds(num_images) for split in splits)
    shared = min(first_stop, second_stop) - max(first, second)
    if shared > 0:
        raise UsageError(
            f"train_split {splits[0].text!r} and test_split {splits[1].text!r} overlap in {shared:,} of {num_images:,} "
            "images; choose disjoint slices, such as 'train[:90%]' and 'train[90%:]'"
        )


def slice_split(split: Split, wanted: SplitSlice) -> Split:
    """Returns the part of an in-memory split that a slice asks for."""
    start, stop = wanted.bounds(len(split))
    return Split(images=split.images[start:stop], labels=split.labels[start:stop])


def nearest_first(name: str, known: Iterable[str]) -> list[str]:
    """Names sorted by their likeness to one that was mistyped."""
    return sorted(known, key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
