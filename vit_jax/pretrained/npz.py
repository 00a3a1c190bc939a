"""Parameter files as `numpy.savez` writes them: read with every check, written whole or not at all."""

import json
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.pretrained.metadata import ModelMetadata
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.runtime.files import atomic_path
from vit_jax.types import FlatParams, Params

_MOST_COMPRESSED = 100
_ALWAYS_UNPACKED_BYTES = 1 << 28
"""An archive may unpack to so many times its size, or to so many bytes."""


class _ObjectsError(Exception):
    """An array of Python objects, which are pickled."""


def load_npz(path: str | os.PathLike[str]) -> Params:
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


def read_metadata(path: str | os.PathLike[str]) -> ModelMetadata | None:
    """Reads the metadata that `save_npz` wrote; None for files without any, such as Google's.

    Raises:
        UserError: the metadata is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        text = b"".join([archive.comment, *(info.comment for info in members)])
    if not text.startswith(b"{") and b'"metadata":{' not in text:  # no one flipped bit hides both
        return None
    try:
        value = json.loads(text)
        if "architecture" not in value:  # as in files of version 0.1, which have no checksum
            if value["crc32"] != _crc32(value["metadata"], members):
                raise UserError("its checksum is wrong")
            value = value["metadata"]
        return ModelMetadata.from_json(value)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} has damaged metadata: {one_line(error)}; export or copy it again") from error


def _crc32(metadata: object, members: list[zipfile.ZipInfo]) -> str:
    """Returns the checksum of the metadata, the names of the arrays, and their checksums."""
    return f"{zlib.crc32(_encode([metadata, [[info.filename, info.CRC] for info in members]])):08x}"


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def save_npz(path: str | os.PathLike[str], params: Params, metadata: ModelMetadata | None = None) -> None:
    """Writes parameters as `numpy.savez` does: stored, not compressed; equal parameters give equal bytes.

    The file is written under a temporary name and then renamed, so that `path` is never a partial file.

    The metadata is JSON in the comments of the ZIP archive: its own, and, past the 65,535 bytes that a comment can
    have, those of its members in their order. A member would be one more array for everyone who loops over
    `numpy.load(path)`; comments are invisible there. It has a checksum; the arrays have those of ZIP.

    Args:
        path: file to write; its directory exists.
        params: nested dictionary of arrays, NumPy's or JAX's; their joined keys become the file's keys.
        metadata: read again by `read_metadata`.

    Raises:
        UserError: the file cannot be written, or the metadata is too long. An existing file at `path` is unchanged.
    """
    path = Path(path)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for key, leaf in flatten_dict(params, sep="/").items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(leaf), allow_pickle=False)
        if metadata is not None:
            _set_comments(archive, metadata.to_json())


def _set_comments(archive: zipfile.ZipFile, metadata: dict[str, Any]) -> None:
    members = archive.infolist()
    text = _encode({"crc32": _crc32(metadata, members), "metadata": metadata})
    step = zipfile.ZIP_MAX_COMMENT
    if len(text) > step * (1 + len(members)):
        raise UserError(f"the metadata has {len(text):,} bytes; expected at most {step * (1 + len(members)):,}")
    archive.comment = text[:step]
    for i, info in enumerate(members):
        info.comment = text[step * (i + 1) : step * (i + 2)]
