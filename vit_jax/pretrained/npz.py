"""Parameter files as `numpy.savez` writes them: read with every check, written whole or not at all."""

import contextlib
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError, one_line
from vit_jax.types import FlatParams, Params


def load_npz(path: str | os.PathLike) -> Params:
    """Reads a parameter file; every member's CRC is checked, nothing is ever unpickled.

    Args:
        path: a file as `numpy.savez` writes it.

    Returns:
        Nested dictionary of arrays whose joined keys are the file's keys. Shapes and dtypes are the file's, save that
        bfloat16, which the format keeps as two raw bytes, becomes float32 of the same values.

    Raises:
        UserError: it is missing, unreadable, empty, not an .npz, truncated or damaged, holds Python objects, or one of
            its keys is the beginning of another.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            _check_start(path, file.read(256))
            with zipfile.ZipFile(file) as archive:
                flat = {info.filename.removesuffix(".npy"): _read(path, archive, info) for info in archive.infolist()}
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; check the path, or give a released name such as imagenet21k/ViT-B_16"
        ) from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; give the path of the .npz file itself") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or one_line(error)}; check it and its disk") from error
    except (zipfile.BadZipFile, NotImplementedError) as error:
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


def _read(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Reads one member."""
    if not info.filename.endswith(".npy"):
        raise UserError(f"{path} is not an .npz file: its member {info.filename} is not an array; give another file")
    try:
        with archive.open(info) as member:
            array = np.lib.format.read_array(member, allow_pickle=False)
            # The CRC is compared where the member ends; a damaged header may make the array end before.
            if member.read():
                raise zipfile.BadZipFile("bytes after the array")
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if "pickle" in str(error) or "Object arrays" in str(error):
            raise UserError(
                f"{path}: {info.filename} holds Python objects, and nothing is unpickled here; save plain numbers"
            ) from error
        raise UserError(
            f"{path} is damaged at {info.filename}: {one_line(error)}; download or copy it again"
        ) from error
    return decode_bfloat16(array)


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
    """What `save_npz` was told of the model; None where the file does not say, as the released ones."""
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
    try:
        about = json.loads(comment)
    except ValueError:
        return None
    return about if isinstance(about, dict) else None


def save_npz(path: str | os.PathLike, params: Params, about: dict[str, Any] | None = None) -> None:
    """Writes parameters as `numpy.savez` does: stored, not compressed; equal parameters give equal bytes.

    The file is written beside and then renamed, so that what stands at `path` is always whole.

    Args:
        path: where it shall stand; its folder exists.
        params: nested dictionary of arrays, NumPy's or JAX's; their joined keys become the file's keys.
        about: JSON values that `read_about` gives back; they lie in the comment of the archive, where other readers of
            such files do not look.

    Raises:
        UserError: the file cannot be written, or `about` takes more than the 65,535 bytes of a comment. What stood at
            `path` is unchanged.
    """
    path = Path(path)
    comment = b"" if about is None else json.dumps(about, separators=(",", ":")).encode()
    if len(comment) > zipfile.ZIP_MAX_COMMENT:
        raise UserError(f"cannot write {path}: its description takes {len(comment):,} bytes of at most 65,535")
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            archive.comment = comment
            for key, leaf in flatten_dict(params, sep="/").items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(leaf), allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
