"""Linen modules whose parameter names are the released files' keys."""

from typing import Any

from vit_jax.models.common import HEAD_INITS, REMAT_POLICIES
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import POOLS, VisionTransformer

__all__ = ["ARCHITECTURES", "HEAD_INITS", "POOLS", "REMAT_POLICIES", "ResNet", "VisionTransformer"]

ARCHITECTURES: dict[str, Any] = {"vit": VisionTransformer, "resnet50": ResNet}
"""`config.architecture` -> module. Each names the arguments that a file's shapes give (`SIZES`), makes its head
(`create_head`) and says whether its sizes fit together (`complaint`)."""
