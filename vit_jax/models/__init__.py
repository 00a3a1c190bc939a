"""Linen modules whose parameter names are the released files' keys."""

from vit_jax.models.vit import VisionTransformer

__all__ = ["VisionTransformer"]
