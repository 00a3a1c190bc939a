"""Loads models by name or path; saves and loads Orbax exports."""

from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.pretrained.formats import to_original
from vit_jax.pretrained.huggingface import load_huggingface
from vit_jax.pretrained.metadata import ModelMetadata, load_metadata, save_metadata
from vit_jax.pretrained.npz import load_npz, read_metadata
from vit_jax.pretrained.released import resolve
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.types import Params


def read_model(name_or_path: str) -> tuple[Params, ModelMetadata | None]:
    """Loads the parameters and the metadata of a model.

    Args:
        name_or_path: name of a pretrained checkpoint, an `.npz` file, or a directory written by `save_orbax`,
            `huggingface.save_huggingface` or Hugging Face.

    Returns:
        (params, metadata): parameters in the original ViT checkpoint format; None for files without metadata.

    Raises:
        UserError: the model does not exist, is damaged, or has values that are not finite in float32.
    """
    path, metadata = resolve(name_or_path), None
    if (path / "model.safetensors").exists():
        params, metadata = load_huggingface(path)
    elif (path / "params").is_dir():
        params, metadata = load_orbax(path)
    elif path.is_dir():
        if (path / "checkpoints").is_dir():
            raise UserError(f"{path} is a run directory; give an export of it (python -m vit_jax.export)")
        if (path / "model.stablehlo").exists():
            raise UserError(f"{path} is a StableHLO export, which only jax.export runs; give another export")
        expected = "checkpoints/, params/ or model.safetensors in it"
        raise UserError(f"{path} is neither a run directory nor an orbax or safetensors export; expected {expected}")
    else:
        params, metadata = to_original(load_npz(path)), read_metadata(path)
    try:
        _check_finite(params)
        if metadata is not None:
            metadata.validate(params)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return params, metadata


def _check_finite(params: Params) -> None:
    for key, leaf in flatten_dict(params, sep="/").items():
        with np.errstate(over="ignore"):
            is_finite = np.isfinite(np.asarray(leaf, np.float32)).all()
        if not is_finite:
            raise UserError(f"{key} has values that float32 cannot hold (NaN or infinity); give another file")


def save_orbax(directory: Path, params: Params, metadata: ModelMetadata) -> None:
    """Saves parameters as an Orbax checkpoint, `directory/params`, and `directory/metadata.json`."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / "params").absolute(), params)
    save_metadata(directory, metadata, params)


def load_orbax(directory: Path) -> tuple[Params, ModelMetadata | None]:
    """Loads what `save_orbax` wrote."""
    import orbax.checkpoint as ocp

    path = (directory / "params").absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            shapes = dict(checkpointer.metadata(path).item_metadata)
            # Given NumPy arrays, Orbax restores to host memory.
            params = checkpointer.restore(path, jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)[:300]}; export it again") from error
    return params, load_metadata(directory, params)
