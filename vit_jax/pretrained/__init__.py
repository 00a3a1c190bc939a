"""Pretrained checkpoints: found by name, loaded, verified, adapted to a model, and saved."""

from vit_jax.pretrained.adapt import Report, adapt_params, resample_position_embeddings
from vit_jax.pretrained.formats import to_original
from vit_jax.pretrained.imagenet import canonical_name, imagenet_classes
from vit_jax.pretrained.load import read_model, save_orbax
from vit_jax.pretrained.metadata import ModelMetadata, save_metadata
from vit_jax.pretrained.npz import load_npz, read_metadata, save_npz
from vit_jax.pretrained.released import RELEASED, is_local, is_name, needs_download, resolve
from vit_jax.pretrained.sizes import infer_sizes

__all__ = [
    "RELEASED",
    "ModelMetadata",
    "Report",
    "adapt_params",
    "canonical_name",
    "imagenet_classes",
    "infer_sizes",
    "is_local",
    "is_name",
    "load_npz",
    "needs_download",
    "read_metadata",
    "read_model",
    "resample_position_embeddings",
    "resolve",
    "save_metadata",
    "save_npz",
    "save_orbax",
    "to_original",
]
