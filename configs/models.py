"""Hyper-parameters of each released variant: the constructor arguments of `vit_jax.models.VisionTransformer`."""

from ml_collections import ConfigDict

VARIANTS = {
    # name: (patch_size, hidden_size, num_layers, num_heads, mlp_dim)
    "Ti_16": (16, 192, 12, 3, 768),
    "S_16": (16, 384, 12, 6, 1536),
    "B_16": (16, 768, 12, 12, 3072),
    "B_32": (32, 768, 12, 12, 3072),
    "L_16": (16, 1024, 24, 16, 4096),
    "L_32": (32, 1024, 24, 16, 4096),
    "H_14": (14, 1280, 32, 16, 5120),
    "micro_4": (4, 96, 4, 4, 384),
}
"""Dosovitskiy et al. 2021, table 1; Ti and S: Touvron et al. 2021, table 1; micro_4: this project."""


def get_config(variant: str = "B_16", *, dropout_rate: float = 0.0) -> ConfigDict:
    """Constructor arguments of a variant.

    Args:
        variant: a key of `VARIANTS`.
        dropout_rate: after position embeddings, attention output and in the MLP.

    Raises:
        ValueError: the variant is not in the table.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    patch_size, hidden_size, num_layers, num_heads, mlp_dim = VARIANTS[variant]
    return ConfigDict(
        {
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "mlp_dim": mlp_dim,
            "dropout_rate": dropout_rate,
        }
    )
