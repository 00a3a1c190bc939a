import jax.numpy as jnp
import pytest

from vit_jax import models
from vit_jax.runtime.errors import UsageError

MICRO = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}
SIZES = {"vit": MICRO, "resnet50": {"units": (1, 2), "width": 32}}


def test_create_model_returns_module_with_given_arguments():
    expected = models.VisionTransformer(5, **MICRO, dtype=jnp.dtype("bfloat16"), remat="full")
    assert models.create_model("vit", MICRO, num_classes=5, dtype="bfloat16", remat="full") == expected
    expected = models.ResNet(5, (1, 2), 32, dtype=jnp.dtype("float32"))
    assert models.create_model("resnet50", {"units": [1, 2], "width": 32}, num_classes=5) == expected


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_model_arguments_recreate_model(architecture):
    model = models.create_model(architecture, SIZES[architecture], num_classes=5)
    arguments = models.model_arguments(model)
    assert not arguments.keys() & {"dtype", "remat", "parent", "name"}
    num_classes = arguments.pop("num_classes")
    assert models.create_model(architecture, arguments, num_classes=num_classes) == model


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        ("vgg", {}, "architecture is 'vgg'; expected one of vit, resnet50"),
        (
            "vit",
            {"depth": 2},
            "model.depth: VisionTransformer has no such argument; expected patch_size, hidden_size, ",
        ),
        ("vit", {"dtype": "float32"}, "model.dtype: VisionTransformer has no such argument"),
        ("vit", {"num_layers": 0}, "model.num_layers is 0; expected a positive integer up to 65,536"),
        ("vit", {"num_layers": True}, "model.num_layers is True; expected a positive integer"),
        ("vit", {"representation_size": -1}, "model.representation_size is -1; expected None, or a positive integer"),
        ("vit", {"dropout_rate": 1.0}, "model.dropout_rate is 1.0; expected a number in [0, 1)"),
        ("vit", {"gelu_approximate": 1}, "model.gelu_approximate is 1; expected True or False"),
        ("vit", {"pool": "max"}, "model.pool is 'max'; expected one of cls, mean, map"),
        ("vit", {"head_init": "ones"}, "model.head_init is 'ones'; expected one of zeros, xavier"),
        ("vit", {"hidden_size": 25}, "25"),
        ("resnet50", {"units": ()}, "model.units is (); expected a tuple of positive integers up to 65,536"),
        ("resnet50", {"units": (1, 0)}, "model.units is (1, 0); expected a tuple of positive integers"),
        ("resnet50", {"width": 48}, "model.width is 48; expected a multiple of 32"),
    ],
)
def test_create_model_rejects_invalid_arguments(architecture, arguments, message):
    with pytest.raises(UsageError) as caught:
        models.create_model(architecture, SIZES.get(architecture, {}) | arguments, num_classes=5)
    assert message in str(caught.value) and "\n" not in str(caught.value)
