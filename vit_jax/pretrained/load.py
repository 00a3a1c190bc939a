"""Models as `export` writes them into folders, and any model by its name or place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from vit_jax.pretrained.formats import to_original
from vit_jax.pretrained.huggingface import load_huggingface
from vit_jax.pretrained.metadata import ModelMetadata
from vit_jax.pretrained.npz import load_npz, read_metadata
from vit_jax.pretrained.released import resolve
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.types import Params


def read_model(name_or_path: str) -> tuple[Params, ModelMetadata | None]:
    """Reads parameters wherever they lie.

    Args:
        name_or_path: a released name, an `.npz` file, a folder of `save_folder`, or one of Hugging Face's.

    Returns:
        (params, metadata): with the keys of the original ViT checkpoint format; None where a file has no metadata.

    Raises:
        UserError: there is none, or it is damaged or not finite.
    """
    path = resolve(name_or_path)
    metadata: ModelMetadata | None
    if not path.is_dir():
        params, metadata = to_original(load_npz(path)), read_metadata(path)
    elif (path / "model.safetensors").exists():
        params, metadata = load_huggingface(path)
    elif (path / "params").is_dir():
        params, metadata = load_folder(path)
    else:
        raise UserError(f"{path} is a folder without parameters; give an .npz file, or a folder that export wrote")
    _check_finite(path, params)
    return params, metadata


def _check_finite(path: Path, params: Params) -> None:
    """Refuses what would make every answer of the model, and every update, no number."""
    for key, leaf in flatten_dict(params, sep="/").items():
        with np.errstate(over="ignore"):
            finite = np.isfinite(np.asarray(leaf).astype(np.float32, copy=False)).all()
        if not finite:
            raise UserError(f"{path}: {key} holds numbers that float32 cannot (NaN or infinity); give another file")


def save_folder(folder: Path, params: Params, metadata: ModelMetadata) -> None:
    """Writes parameters alone, as Orbax does, into `folder/params`, and the metadata into `folder/about.json`."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "params").absolute(), params)
    (folder / "about.json").write_text(json.dumps(metadata.to_json(), indent=2) + "\n")


def load_folder(folder: Path) -> tuple[Params, ModelMetadata]:
    """Reads what `save_folder` wrote.

    Raises:
        UserError: it is not whole.
    """
    import orbax.checkpoint as ocp

    try:
        metadata = ModelMetadata.from_json(json.loads((folder / "about.json").read_text()))
        with ocp.StandardCheckpointer() as checkpointer:
            path = (folder / "params").absolute()
            shapes = dict(checkpointer.metadata(path).item_metadata)
            return checkpointer.restore(path, _zeros(shapes)), metadata
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} could not be read: {one_line(error)[:300]}; export it again") from error


def _zeros(shapes: dict[str, Any]) -> Params:
    """Host arrays of the same shapes: Orbax restores into what it is given."""
    return {
        key: _zeros(value) if isinstance(value, dict) else np.zeros(value.shape, value.dtype)
        for key, value in shapes.items()
    }
