"""Lists of image files, as of a folder or a CSV file, and the splits that are made from them."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt64

from vit_jax.data.images import EncodedImages
from vit_jax.data.splits import (
    ROLES,
    OpenedSplits,
    Request,
    SplitSlice,
    sample_fraction,
    select_rows,
    stratified_order,
)
from vit_jax.runtime.errors import UserError
from vit_jax.types import Split

SplitRows = dict[str, Int[np.ndarray, " _"]]  # split -> rows of a listing

_ALIASES = {"val": "validation"}


@dataclasses.dataclass(frozen=True)
class Listing:
    """Image files, their classes and splits, before any is opened.

    Attributes:
        source: directory or file, for errors.
        paths: of all images.
        names: of all images, the same wherever the source is: paths relative to the directory of the split.
        labels: int32 [n], indices into `class_names`.
        class_names: names of all classes.
        splits: canonical name of a split -> its rows. An image is in one split; without splits, all are in "train".
        notes: see `OpenedSplits`.
    """

    source: str
    paths: Sequence[str]
    names: Sequence[str]
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]
    splits: SplitRows
    notes: tuple[str, ...] = ()


def canonical_split(name: str) -> str:
    """Returns the name of a split; "val" is "validation"."""
    return _ALIASES.get(name, name)


def requested_slices(request: Request) -> dict[str, SplitSlice]:
    """Returns all slices of a request by role, with canonical names."""
    return {
        role: dataclasses.replace(split, name=canonical_split(split.name))
        for role, split in request.all_slices().items()
    }


def open_listing(listing: Listing, request: Request) -> OpenedSplits:
    """Opens the splits of a request, and makes missing test and validation splits; reads no files.

    The order of the images of a slice is that of the listing. A missing test split is a fraction of each class of the
    training images; a missing validation split is a fraction of each class of those that are left.

    Raises:
        UsageError: a slice is empty, or slices overlap.
        UserError: a split is missing and cannot be made, or has other classes.
    """
    slices, keys = requested_slices(request), _hash_names(f"{request.split_seed}/{name}" for name in listing.names)
    splits = dict(listing.splits)
    origins = {name: name for name in splits}  # made split -> split that it was taken from
    if "test" not in splits and "train" in splits and "test" in {split.name for split in slices.values()}:
        splits |= _make_test_split(listing, keys, request.test_fraction)
        origins |= {"test": "train"} if "test" in splits else {}
    slices = {role: split for role, split in slices.items() if split.name in splits or request.only in ("", role)}
    for split in slices.values():
        if split.name not in splits:
            raise UserError(_describe_missing(listing, split, request))
    if "validation" not in slices and "validation" in splits.keys() - {split.name for split in slices.values()}:
        slices["validation"] = SplitSlice("validation", "validation", "0", "100%")
    rows = _slice_rows(listing, keys, splits, slices, check_overlap=not request.only)
    if "validation" not in rows and "train" in rows:
        train = rows["train"]
        held_out = sample_fraction(listing.labels[train], keys[train], request.validation_fraction)
        if held_out.any():
            rows |= {"train": train[~held_out], "validation": train[held_out]}
            origins["validation"] = origins[slices["train"].name]
    rows = {role: rows[role] for role in (*ROLES, "other") if role in rows and request.only in ("", role)}
    used = {origins[slices[role].name if role in slices else role] for role in rows}
    class_names = _class_names(listing, sorted(used), classes=request.classes, check=not request.only)
    if not request.only:
        _check_classes(listing, class_names, num_train=len(rows["train"]))
    return OpenedSplits({role: _select(listing, rows[role], class_names) for role in rows}, class_names, listing.notes)


def _check_classes(listing: Listing, class_names: Sequence[str], *, num_train: int) -> None:
    if len(class_names) < 2:
        raise UserError(f"{listing.source} has one class, {class_names[0]}; expected at least two")
    if num_train < len(class_names):
        raise UserError(
            f"{listing.source} has {num_train:,} training images of {len(class_names):,} classes; expected at least "
            "one of each; check the labels, or choose a larger train_split"
        )


def _make_test_split(listing: Listing, keys: UInt64[np.ndarray, " n"], fraction: float) -> SplitRows:
    train = listing.splits["train"]
    held_out = sample_fraction(listing.labels[train], keys[train], fraction)
    if fraction and not held_out.any():
        raise UserError(
            f"{listing.source}: a test_fraction of {fraction} selects none of {len(train):,} images of "
            f"{len(listing.class_names):,} classes; add images, or check that the classes are what you want to predict"
        )
    return {"train": train[~held_out], "test": train[held_out]} if fraction else {}


def _describe_missing(listing: Listing, split: SplitSlice, request: Request) -> str:
    known = ", ".join(sorted(listing.splits)) or "none"
    advice = "choose one of these, or add it"
    if split.name == "test":
        advice = f"set dataset.test_fraction, now {request.test_fraction}, to make it from the training images"
    name = re.sub(r"\[.*", "", split.text)
    return f"{listing.source} has no split {name!r}; it has {known}; {advice}"


def _slice_rows(
    listing: Listing,
    keys: UInt64[np.ndarray, " n"],
    splits: SplitRows,
    slices: Mapping[str, SplitSlice],
    *,
    check_overlap: bool,
) -> SplitRows:
    """Returns the rows of each role, sorted. Slices are stratified."""
    sizes = {name: len(rows) for name, rows in splits.items()}
    if check_overlap:
        ranges = select_rows(slices, sizes)
    else:
        ranges = {role: split.rows(sizes[split.name]) for role, split in slices.items()}
    selected = {}
    for role, split in slices.items():
        rows = splits[split.name]
        order = stratified_order(listing.labels[rows], keys[rows])
        selected[role] = np.sort(rows[order[ranges[role].start : ranges[role].stop]])
    return selected


def _class_names(listing: Listing, splits: Sequence[str], *, classes: Sequence[str], check: bool) -> tuple[str, ...]:
    """Returns the sorted classes of the splits; with `check`, raises UserError if a split lacks some of them."""
    found = {name: set(np.unique(listing.labels[listing.splits[name]]).tolist()) for name in splits}
    names = {label: listing.class_names[label] for label in sorted(set().union(*found.values()))}
    missing = [
        f"{names[label]} (not in {name})"
        for label in names
        for name in splits
        if label not in found[name] and (not classes or names[label] in classes)
    ]
    if check and missing:
        more = f", … ({len(missing)} in all)" if len(missing) > 10 else ""
        raise UserError(
            f"{listing.source}: all splits must have the same classes; these differ: {', '.join(missing[:10])}{more}; "
            "add images, or choose classes with dataset.classes"
        )
    return tuple(names.values())


def _select(listing: Listing, rows: Int[np.ndarray, " m"], class_names: Sequence[str]) -> Split:
    new_labels = np.full(len(listing.class_names), -1, np.int32)
    label_of = {name: label for label, name in enumerate(listing.class_names)}
    new_labels[[label_of[name] for name in class_names]] = np.arange(len(class_names))
    return Split(
        images=EncodedImages(listing.paths.__getitem__, rows),
        labels=new_labels[listing.labels[rows]],
        ids=_hash_names(listing.names[row] for row in rows),
        paths=np.array([listing.paths[row] for row in rows], object),
    )


def _hash_names(names: Iterable[str]) -> UInt64[np.ndarray, " n"]:
    """Returns a 64-bit hash of each name."""
    digests = (hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)
