"""Released parameter files: found by name, read, checked, fitted to a model, and written again. Host NumPy only."""

from vit_jax.pretrained.adapt import Grid, Report, adapt_params, resample_position_embeddings
from vit_jax.pretrained.bit import infer_resnet
from vit_jax.pretrained.formats import to_original
from vit_jax.pretrained.imagenet import canonical_name, imagenet_classes
from vit_jax.pretrained.infer import POSITION_KEY, infer_architecture
from vit_jax.pretrained.load import read_model, save_folder
from vit_jax.pretrained.metadata import ModelMetadata, infer_sizes
from vit_jax.pretrained.npz import load_npz, read_metadata, save_npz
from vit_jax.pretrained.released import RELEASED, is_name, resolve

__all__ = [
    "POSITION_KEY",
    "RELEASED",
    "Grid",
    "ModelMetadata",
    "Report",
    "adapt_params",
    "canonical_name",
    "imagenet_classes",
    "infer_architecture",
    "infer_resnet",
    "infer_sizes",
    "is_name",
    "load_npz",
    "read_metadata",
    "read_model",
    "resample_position_embeddings",
    "resolve",
    "save_folder",
    "save_npz",
    "to_original",
]
