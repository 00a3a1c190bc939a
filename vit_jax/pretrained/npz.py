"""Loads and saves .npz checkpoints: verified when read, written atomically."""

import io
import json
import os
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.pretrained.metadata import ModelMetadata, unwrap_metadata, wrap_metadata
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.runtime.files import atomic_path
from vit_jax.types import FlatParams, Params


def load_npz(path: str | os.PathLike[str]) -> Params:
    """Loads an .npz checkpoint; verifies CRC-32 checksums and never unpickles.

    Args:
        path: a file in the format of `numpy.savez`.

    Returns:
        Nested dictionary of arrays whose joined keys are the file's keys. Shapes and dtypes are the file's, except
        that bfloat16, which the format stores as two raw bytes, becomes float32 of the same values.

    Raises:
        UserError: the file cannot be read, is truncated, damaged or not an .npz file, or has arrays that are not real
            numbers.

    Examples:
        >>> from vit_jax import pretrained
        >>> params = pretrained.load_npz(pretrained.resolve("micro"))
        >>> params["embedding"]["kernel"].shape
        (4, 4, 3, 96)
        >>> pretrained.save_npz("copy.npz", params)
    """
    path = Path(path)
    name = ""
    flat: FlatParams = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for file in archive.namelist():
                name = f"{file}: "
                flat[file.removesuffix(".npy")] = _decode(archive.read(file))
        params: Params = unflatten_dict(flat, sep="/")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror or one_line(error)}; give the path of an .npz file, or the name "
            "of a pretrained checkpoint such as imagenet21k/ViT-B_16"
        ) from error
    except Exception as error:  # zipfile, its decompressors and NumPy can raise anything for damaged files
        raise UserError(
            f"{path} is truncated, damaged or not an .npz file: {name}{one_line(error)} "
            f"(it has {path.stat().st_size:,} bytes); download or copy it again"
        ) from error
    return params


def _decode(content: bytes) -> np.ndarray:
    """Decodes an .npy file."""
    array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    if array.dtype == np.dtype("V2"):
        array = array.view(jnp.bfloat16).astype(np.float32)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{array.dtype} {list(array.shape)}; expected real numbers")
    return array


def read_metadata(path: str | os.PathLike[str]) -> ModelMetadata | None:
    """Reads the metadata that `save_npz` wrote; None for files without any, such as Google's."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        text = b"".join([archive.comment, *(info.comment for info in members)])
    if not text.startswith(b"{") and b'"metadata":{' not in text:  # one flipped bit cannot hide both
        return None
    try:
        return unwrap_metadata(json.loads(text), _checksums(members))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} has damaged metadata: {one_line(error)}; export or copy it again") from error


def save_npz(path: str | os.PathLike[str], params: Params, metadata: ModelMetadata | None = None) -> None:
    """Saves parameters atomically in the format of `numpy.savez`; equal parameters give equal bytes.

    Metadata is stored as JSON in the comment of the ZIP archive, which `numpy.load` ignores; beyond the 65,535 bytes
    of a comment, it continues in the comments of the members.

    Args:
        path: file to write; its directory must exist.
        params: nested dictionary of NumPy or JAX arrays; the joined keys become the file's keys.
        metadata: metadata of the model, which `read_metadata` returns.

    Raises:
        UserError: the file cannot be written, or the metadata is too long. An existing file at `path` is unchanged.
    """
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for key, leaf in flatten_dict(params, sep="/").items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(leaf), allow_pickle=False)
        if metadata is not None:
            _write_comments(archive, metadata)


def _write_comments(archive: zipfile.ZipFile, metadata: ModelMetadata) -> None:
    members = archive.infolist()
    text = json.dumps(wrap_metadata(metadata, _checksums(members)), separators=(",", ":")).encode()
    step = zipfile.ZIP_MAX_COMMENT
    archive.comment, *comments = [text[i : i + step] for i in range(0, len(text), step)]
    if len(comments) > len(members):
        raise UserError(f"metadata of {len(text):,} bytes is too long for the comments of {len(members)} arrays")
    for info, comment in zip(members, comments, strict=False):
        info.comment = comment


def _checksums(members: list[zipfile.ZipInfo]) -> dict[str, str]:
    """Returns the checksums of the ZIP archive, which include the arrays' headers."""
    return {info.filename: f"{info.CRC:08x}" for info in members}
