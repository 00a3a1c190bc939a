import jax
import numpy as np
import pytest
import reference_resnet
from reference import MICRO, flat_params, nest
from reference_resnet import UNITS, WIDTH

from vit_jax import pretrained
from vit_jax.runtime.errors import UserError

POSITIONS = "Transformer/posembed_input/pos_embedding"
HEAD = "resnet/head/conv2d/kernel"
QUERY = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"


@pytest.mark.parametrize("representation_size", [None, 4])
def test_infer_sizes_returns_sizes_from_shapes(representation_size):
    params = nest(flat_params(representation_size=representation_size))
    sizes = {"representation_size": representation_size, "num_classes": 5, "stem_units": None, "pool": "cls"}
    expected = "vit", {**MICRO, **sizes}
    assert pretrained.infer_sizes(params) == expected
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert pretrained.infer_sizes(abstract) == expected


def infer_error(flat):
    """Returns the message of the error that `infer_sizes` raises, one line."""
    with pytest.raises(UserError) as caught:
        pretrained.infer_sizes(nest(flat))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", flat_params(representation_size=4))
def test_infer_sizes_reports_missing_key(key):
    flat = flat_params(representation_size=4)
    del flat[key]
    message = infer_error(flat)
    assert "these are not the parameters of a complete VisionTransformer: " in message
    assert f"missing: {key}" in message or f"{key} is missing" in message


def test_infer_sizes_reports_missing_block():
    flat = {key: leaf for key, leaf in flat_params().items() if "encoderblock_1/" not in key}
    message = infer_error(flat)
    assert "missing: Transformer/encoderblock_1/LayerNorm_0/bias" in message and "and 13 more" in message


def test_infer_sizes_reports_shape_mismatch():
    message = infer_error({**flat_params(), QUERY: np.zeros((6, 3, 2))})
    assert f"of another shape: {QUERY} (6, 3, 2) instead of (6, 2, 3)" in message


def test_infer_sizes_reports_unexpected_key():
    assert "unexpected: extra/scale" in infer_error({**flat_params(), "extra/scale": np.zeros(6)})


def test_infer_sizes_rejects_hidden_size_not_divisible_by_num_heads():
    message = infer_error(flat_params(num_heads=4))
    assert message.endswith("complete VisionTransformer: model.hidden_size is 6; expected a multiple of 4 heads")


@pytest.mark.parametrize(
    ("key", "shape"), [("embedding/kernel", (48, 6)), ("head/kernel", (1, 1, 6, 5)), (POSITIONS, (5, 6))]
)
def test_infer_sizes_rejects_wrong_number_of_axes(key, shape):
    message = infer_error({**flat_params(), key: np.zeros(shape)})
    assert f"{key} is of shape {shape}" in message or f"{key} {shape} instead of" in message


UNKNOWN_FORMATS = {
    "found params/Transformer/encoder_norm/bias": {f"params/{key}": 0 for key in flat_params()},
    "found layer1/weight; expected keys Transformer/encoderblock_… or resnet/block…": {"layer1/weight": 0},
    "found conv_root/kernel": {"conv_root/kernel": 0},
    "found nothing": {},
}


@pytest.mark.parametrize("cause", UNKNOWN_FORMATS)
def test_infer_sizes_rejects_unknown_formats(cause):
    message = infer_error({key: np.zeros(1) for key in UNKNOWN_FORMATS[cause]})
    assert "these are not the parameters of a known model: " in message and cause in message


@pytest.mark.parametrize("num_patches", [1, 3, 7])
def test_infer_sizes_accepts_any_number_of_patches(num_patches):
    assert pretrained.infer_sizes(nest(flat_params(num_tokens=1 + num_patches)))[1]["num_layers"] == 3


def test_infer_sizes_requires_class_token_for_one_plus_square_tokens():
    flat = {key: leaf for key, leaf in flat_params().items() if key != "cls"}
    assert "missing: cls" in infer_error(flat)


# ---- ResNet


def infer_resnet(flat):
    return pretrained.infer_sizes(pretrained.to_original(nest(flat)))


@pytest.mark.parametrize("units", [(1,), (1, 2), (1, 1, 11)])
def test_infer_sizes_returns_resnet_sizes(units):
    expected = {"units": units, "width": WIDTH, "num_classes": 7}
    assert infer_resnet(reference_resnet.flat_params(units=units)) == ("resnet50", expected)


def test_infer_sizes_accepts_resnet_without_head():
    assert infer_resnet(without("head")) == ("resnet50", {"units": UNITS, "width": WIDTH, "num_classes": None})


def without(part):
    return {key: leaf for key, leaf in reference_resnet.flat_params().items() if part not in key}


def renamed(old, new):
    return {key.replace(old, new): leaf for key, leaf in reference_resnet.flat_params().items()}


def with_shape(key, shape):
    return {**reference_resnet.flat_params(), key: np.zeros(shape, np.float32)}


INVALID_RESNETS = {
    "head/kernel is missing": with_shape(HEAD, (3, 3, 512, 7)) | {"head/bias": np.zeros(7)},
    f"unexpected: {HEAD}": with_shape(HEAD, (3, 3, 512, 7)),
    "root_block/standardized_conv2d/kernel is missing": without("root_block"),
    "model.width is 48; expected a multiple of 32": reference_resnet.flat_params(width=48),
    "missing: resnet/block2/unit02/b/group_norm/": without("unit02/b/group_norm"),
    "missing: resnet/block1/unit01/a/proj/standardized_conv2d/kernel": without("block1/unit01/a/proj"),
    "missing: resnet/block2/unit02/a/group_norm/": renamed("unit02", "unit03"),
    "missing: resnet/block2/unit01/a/group_norm/": renamed("block2", "block3"),
    "gamma (1, 1, 1, 256) instead of (256,)": with_shape("resnet/group_norm/gamma", (1, 1, 1, 256)),
    "unexpected: extra/scale": with_shape("extra/scale", (1,)),
}


@pytest.mark.parametrize("cause", INVALID_RESNETS)
def test_infer_sizes_reports_mismatch_of_resnet(cause):
    with pytest.raises(UserError) as caught:
        infer_resnet(INVALID_RESNETS[cause])
    message = str(caught.value)
    assert message.startswith("these are not the parameters of a complete ResNet: ")
    assert cause in message and "\n" not in message
