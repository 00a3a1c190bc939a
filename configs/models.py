"""Constructor arguments of the ViT variants, for `config.model`."""

from ml_collections import ConfigDict

import vit_jax.config


def get_config(variant: str = "B_16", *, dropout_rate: float = 0.0) -> ConfigDict:
    """Returns the constructor arguments of a key of `vit_jax.config.VARIANTS`."""
    return ConfigDict({**vit_jax.config.model_sizes(variant), "dropout_rate": dropout_rate})
