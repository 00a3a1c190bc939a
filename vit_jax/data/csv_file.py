"""Reads lists of image files, "csv:FILE": a table with the columns path, label and, optionally, split."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from vit_jax.data.images import IMAGE_SUFFIXES, list_first
from vit_jax.data.listing import Listing, canonical_split, open_listing
from vit_jax.data.splits import OpenedSplits, Request
from vit_jax.runtime.errors import UserError, one_line

_DELIMITERS = ",\t;|"
_COLUMNS = {
    "path": "path file filename file_name filepath file_path image image_path",
    "label": "label class class_name category target",
    "split": "split set subset partition",
}
"""Column -> its names in a header, in lower case."""


def open_csv(request: Request) -> OpenedSplits:
    """Opens "csv:FILE"; reads no images, but all images must exist."""
    return open_listing(list_csv(Path(request.name.partition(":")[2]).expanduser()), request)


def list_csv(file: Path) -> Listing:
    """Lists the images of a CSV or TSV file, whose paths are relative to its directory.

    The delimiter is a comma, tab, semicolon or bar. Without a header, the columns are path, label and split.

    Raises:
        UserError: the file cannot be read, lacks a column or a value, or an image is missing or listed twice.
    """
    header, lines = _read_table(file)
    columns, notes = _find_columns(file, header, num_columns=len(lines[0][1]))
    for column, index in columns.items():
        if empty := [number for number, line in lines if not line[index].strip()]:
            raise UserError(f"{file}, line {empty[0]}: the {column} is empty; fill it in")
    lines = sorted(lines, key=lambda line: line[1][columns["path"]])  # the order of the file has no effect
    values = {column: [line[index].strip() for _, line in lines] for column, index in columns.items()}
    names = [PurePath(name).as_posix() for name in values["path"]]
    paths = [str(file.parent / name) for name in names]
    _check_files(file, names, paths, [number for number, _ in lines])
    class_names = tuple(sorted(set(values["label"])))
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = np.array([label_of[label] for label in values["label"]], np.int32)
    split_of = np.array([canonical_split(name) for name in values.get("split", ["train"] * len(names))])
    splits = {str(name): np.flatnonzero(split_of == name) for name in np.unique(split_of)}
    return Listing(str(file), paths, names, labels, class_names, splits, notes)


def _read_table(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Returns the header, [] if there is none, and the lines with their numbers, all of the same length."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{file} cannot be read ({reason}); expected a table in UTF-8: path,label[,split]") from error
    first = next(iter(text.splitlines()), "")
    delimiter = max(_DELIMITERS, key=first.count)
    lines = [*_numbered_lines(text, delimiter)]
    if not lines or len(lines[0][1]) < 2:
        raise UserError(f"{file} has no table; expected lines of path,label[,split]")
    size = len(lines[0][1])
    for number, line in lines:
        if len(line) != size:
            raise UserError(f"{file}, line {number}: {len(line)} columns; expected {size}, as in the first line")
    has_header = not any(PurePath(value.strip()).suffix.lower() in IMAGE_SUFFIXES for value in lines[0][1])
    header = lines.pop(0)[1] if has_header else []
    if not lines:
        raise UserError(f"{file} has a header, but no images; expected lines of path,label[,split]")
    return [name.strip().lower() for name in header], lines


def _numbered_lines(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    yield from ((reader.line_num, line) for line in reader if any(value.strip() for value in line))


def _find_columns(file: Path, header: Sequence[str], *, num_columns: int) -> tuple[dict[str, int], tuple[str, ...]]:
    """Returns the index of each column, and a note with the columns that are ignored."""
    if not header:
        return dict(zip(_COLUMNS, range(num_columns), strict=False)), ()
    columns = {
        column: next((index for index, name in enumerate(header) if name in names.split()), -1)
        for column, names in _COLUMNS.items()
    }
    missing = [column for column in ("path", "label") if columns[column] < 0]
    if missing:
        raise UserError(
            f"{file} has the columns {', '.join(header)}; expected path and label, also named "
            f"{_COLUMNS[missing[0]].replace(' ', ', ')}"
        )
    used = {column: index for column, index in columns.items() if index >= 0}
    ignored = [name for index, name in enumerate(header) if index not in used.values()]
    return used, (f"{file}: ignored columns: {', '.join(ignored)}",) if ignored else ()


def _check_files(file: Path, names: Sequence[str], paths: Sequence[str], numbers: Sequence[int]) -> None:
    first_line: dict[str, int] = {}
    for name, number in zip(names, numbers, strict=True):
        if first_line.setdefault(name, number) != number:
            raise UserError(f"{file} lists {name} in lines {first_line[name]} and {number}; remove one of them")
    missing = [name for name, path in zip(names, paths, strict=True) if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"{file}: {len(missing):,} of {len(names):,} images do not exist: {list_first(missing, 5)}; "
            f"paths are relative to {file.parent}"
        )
