"""Linen modules whose parameter names are the released files' keys."""

from vit_jax.models.vit import REMAT_POLICIES, VisionTransformer

__all__ = ["REMAT_POLICIES", "VisionTransformer"]
