"""Sizes of the ViT variants."""

from typing import Any

VARIANTS = {
    # name: (patch_size, hidden_size, num_layers, num_heads, mlp_dim)
    "Ti_16": (16, 192, 12, 3, 768),
    "S_16": (16, 384, 12, 6, 1536),
    "S_32": (32, 384, 12, 6, 1536),
    "B_16": (16, 768, 12, 12, 3072),
    "B_32": (32, 768, 12, 12, 3072),
    "B_8": (8, 768, 12, 12, 3072),
    "L_16": (16, 1024, 24, 16, 4096),
    "L_32": (32, 1024, 24, 16, 4096),
    "H_14": (14, 1280, 32, 16, 5120),
    "micro_4": (4, 96, 4, 4, 384),
    # Hybrids: patches of the feature map of a ResNet, see STEM_UNITS; the number in the name is in pixels.
    "R50_B_16": (1, 768, 12, 12, 3072),
    "R50_L_32": (1, 1024, 24, 16, 4096),
    "R26_B_32": (1, 768, 12, 12, 3072),
    "R26_S_32": (1, 384, 12, 6, 1536),
    "R_Ti_16": (8, 192, 12, 3, 768),  # 32 pixels: the name does not count the root's max-pool
}
"""Sizes of the ViT variants. Dosovitskiy et al. 2021, table 1; Ti and S: Touvron et al. 2021, table 1; micro_4: this
project; hybrids: Steiner et al. 2021, "How to train your ViT?"."""

STEM_UNITS = {
    "R50_B_16": (3, 4, 9),
    "R50_L_32": (3, 4, 6, 3),
    "R26_B_32": (2, 2, 2, 2),
    "R26_S_32": (2, 2, 2, 2),
    "R_Ti_16": (),
}
"""Number of bottlenecks in each block of a hybrid's ResNet."""


def model_sizes(variant: str) -> dict[str, Any]:
    """Returns the sizes of a variant as constructor arguments of `vit_jax.models.VisionTransformer`."""
    names = ("patch_size", "hidden_size", "num_layers", "num_heads", "mlp_dim")
    stem = {"stem_units": STEM_UNITS[variant]} if variant in STEM_UNITS else {}
    return {**dict(zip(names, VARIANTS[variant], strict=True)), **stem}
