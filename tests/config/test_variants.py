import pytest

from vit_jax import models
from vit_jax.config import variants


@pytest.mark.parametrize("variant", ["B_16", "R50_B_16"])
def test_model_sizes_returns_constructor_arguments(variant):
    sizes = variants.model_sizes(variant)
    models.create_model("vit", sizes, num_classes=None)
    assert (sizes["hidden_size"], sizes.get("stem_units")) == (768, (3, 4, 9) if "R" in variant else None)
