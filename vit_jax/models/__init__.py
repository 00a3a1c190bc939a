"""Linen modules whose parameter names are the released files' keys."""

from vit_jax.models.vit import HEAD_INITS, REMAT_POLICIES, VisionTransformer

__all__ = ["HEAD_INITS", "REMAT_POLICIES", "VisionTransformer"]
