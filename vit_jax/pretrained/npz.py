"""Parameter files as `numpy.savez` writes them: read with every check, written whole or not at all."""

import json
import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.runtime.errors import UserError, one_line
from vit_jax.runtime.files import atomic_path
from vit_jax.types import FlatParams, Params

_MOST_COMPRESSED = 100
_ALWAYS_UNPACKED_BYTES = 1 << 28
"""An archive may unpack to so many times its size, or to so many bytes."""


class _ObjectsError(Exception):
    """An array of Python objects, which are pickled."""


def load_npz(path: str | os.PathLike) -> Params:
    """Reads a parameter file; every member's CRC is checked, nothing is ever unpickled.

    Args:
        path: a file as `numpy.savez` writes it.

    Returns:
        Nested dictionary of arrays whose joined keys are the file's keys. Shapes and dtypes are the file's, save that
        bfloat16, which the format keeps as two raw bytes, becomes float32 of the same values.

    Raises:
        UserError: it is missing, unreadable, empty, not an .npz, truncated or damaged, holds what are no numbers or
            would take a hundred times its size in memory; or a key is there twice or is the beginning of another.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is no regular file, nor a link to one; give the path of an .npz file")
    try:
        with path.open("rb") as file:
            _check_start(path, file.read(256))
            with zipfile.ZipFile(file) as archive:
                _check_members(path, archive.infolist())
                flat = {info.filename.removesuffix(".npy"): _read(path, archive, info) for info in archive.infolist()}
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; check the path, or give a released name such as imagenet21k/ViT-B_16"
        ) from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; give the path of the .npz file itself") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}; check it and its disk") from error
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is truncated or damaged: the directory that ends an .npz file is not to be found in its "
            f"{path.stat().st_size:,} bytes; download or copy it again"
        ) from error
    if not flat:
        raise UserError(f"{path} holds no arrays; expected the parameters of a model")
    return _nest(path, flat)


def _check_start(path: Path, start: bytes) -> None:
    """Tells what is no ZIP archive from one that is merely cut off."""
    if not start:
        raise UserError(f"{path} is empty; download or copy it again")
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise UserError(f"{path} is not an .npz file but an HTML page, a server's answer perhaps; download it again")
    if not start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise UserError(f"{path} is not an .npz file; expected a ZIP archive of arrays, as numpy.savez writes it")


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """What the directory of an archive tells before anything is unpacked."""
    names = [info.filename for info in members]
    for name in names:
        if not name.endswith(".npy"):
            raise UserError(f"{path} is not an .npz file: its member {name} is not an array; give another file")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} holds {twice} more than once; download or copy it again")
    unpacked, packed = sum(info.file_size for info in members), path.stat().st_size
    if unpacked > max(_ALWAYS_UNPACKED_BYTES, _MOST_COMPRESSED * packed):
        raise UserError(
            f"{path} has {packed:,} bytes and would unpack to {unpacked:,}: parameters do not compress so well; "
            "give another file"
        )


def _read(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Reads one member."""
    try:
        with archive.open(info) as member:
            _check_header(member, info.file_size)
        with archive.open(info) as member:  # from its start again: after a step back its CRC would not be compared
            array = np.lib.format.read_array(member, allow_pickle=False)
            member.read()  # the CRC is compared where a member ends
    except _ObjectsError as error:
        raise UserError(
            f"{path}: {info.filename} holds Python objects, and nothing is unpickled here; save plain numbers"
        ) from error
    except Exception as error:  # a damaged archive makes zipfile, its decompressors and NumPy raise nearly anything
        raise UserError(
            f"{path} is damaged at {info.filename}: {one_line(error)}; download or copy it again"
        ) from error
    array = decode_bfloat16(array)
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: {info.filename} holds {array.dtype}; expected real numbers; give another file")
    return array


def _check_header(member: IO[bytes], num_bytes: int) -> None:
    """Compares what an array's header promises with the bytes of its member, before any memory is taken for it."""
    version = np.lib.format.read_magic(member)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array in format {version}; expected (1, 0) or (2, 0)")
    shape, _, dtype = read(member)
    if dtype.hasobject:
        raise _ObjectsError
    promised, there = math.prod(shape) * dtype.itemsize, num_bytes - member.tell()
    if promised != there or min(shape, default=0) < 0:
        raise ValueError(f"an array {list(shape)} of {dtype} takes {promised:,} bytes, there are {there:,}")


def decode_bfloat16(array: np.ndarray) -> np.ndarray:
    """Two raw bytes are the upper half of a float32."""
    if array.dtype != np.dtype("V2"):
        return array
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _nest(path: Path, flat: FlatParams) -> Params:
    for key in flat:
        names = key.split("/")
        for depth in range(1, len(names)):
            if (shorter := "/".join(names[:depth])) in flat:
                raise UserError(f"{path} holds both {shorter} and {key}, but an array has no parts; rename one of them")
    return unflatten_dict(flat, sep="/")


def read_about(path: str | os.PathLike) -> dict[str, Any] | None:
    """Returns the metadata that `save_npz` wrote; None for files without any, such as the released ones.

    Raises:
        UserError: there is metadata, but it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        text = b"".join([archive.comment, *(info.comment for info in archive.infolist())])
    if not text.startswith(b"{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has damaged metadata: {one_line(error)}; export or copy it again") from error


def save_npz(path: str | os.PathLike, params: Params, about: dict[str, Any] | None = None) -> None:
    """Writes parameters as `numpy.savez` does: stored, not compressed; equal parameters give equal bytes.

    The file is written beside and then renamed, so that what stands at `path` is always whole.

    The metadata is JSON in the comments of the ZIP archive: its own, and, past the 65,535 bytes that a comment can
    have, those of its members in their order. A member of its own would be one more array for everyone who loops over
    `numpy.load(path)`; comments are invisible there.

    Args:
        path: where it shall stand; its folder exists.
        params: nested dictionary of arrays, NumPy's or JAX's; their joined keys become the file's keys.
        about: metadata, as JSON values, that `read_about` returns.

    Raises:
        UserError: the file cannot be written, or `about` takes more than 65,535 bytes for each array and once more.
            What stood at `path` is unchanged.
    """
    path = Path(path)
    text = b"" if about is None else json.dumps(about, separators=(",", ":")).encode()
    flat = flatten_dict(params, sep="/")
    most = (1 + len(flat)) * zipfile.ZIP_MAX_COMMENT
    if len(text) > most:
        raise UserError(f"cannot write {path}: its metadata has {len(text):,} bytes; expected at most {most:,}")
    comments = [text[i : i + zipfile.ZIP_MAX_COMMENT] for i in range(0, len(text), zipfile.ZIP_MAX_COMMENT)]
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.comment = comments[0] if comments else b""
        for key, leaf in flat.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(leaf), allow_pickle=False)
        for info, comment in zip(archive.infolist(), comments[1:], strict=False):
            info.comment = comment
