"""Files of the BiT layout: sizes, the head, and what is refused."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from reference_resnet import UNITS, WIDTH, flat_params, released_params, released_shapes

from configs import digits
from vit_jax import pretrained
from vit_jax.runtime import download
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.training import build

HEAD = "resnet/head/conv2d/kernel"


@pytest.fixture
def write(tmp_path):
    """Flat parameters -> path of a file of them."""

    def save(flat):
        pretrained.save_npz(tmp_path / "BiT-micro.npz", unflatten_dict(flat, sep="/"))
        return str(tmp_path / "BiT-micro.npz")

    return save


def config_with(*, pretrained, architecture="resnet50", model=None):
    config = digits.get_config("scratch")
    config.architecture, config.pretrained = architecture, pretrained
    config.model = model or {}
    return config


def create_model(config):
    return build.create_model(config, build.load_source(config), num_classes=10)


def infer(flat):
    return pretrained.infer_resnet(pretrained.to_original(unflatten_dict(flat, sep="/")))


@pytest.mark.parametrize("units", [(1,), (1, 2), (1, 1, 11)])
def test_infer_resnet_reads_sizes_and_classes(units):
    assert infer(flat_params(units=units)) == {"units": units, "width": WIDTH, "num_classes": 7}


def test_the_head_becomes_a_matrix_and_nothing_else_changes():
    before, after = released_params(), pretrained.to_original(released_params())
    np.testing.assert_array_equal(after["head"]["kernel"], before["resnet"]["head"]["conv2d"]["kernel"][0, 0])
    np.testing.assert_array_equal(after["head"]["bias"], before["resnet"]["head"]["conv2d"]["bias"])
    del before["resnet"]["head"]
    jax.tree.map(np.testing.assert_array_equal, after["resnet"], before["resnet"])
    jax.tree.map(np.testing.assert_array_equal, pretrained.to_original(after), after)


def test_sizes_are_read_off_a_file_and_all_but_the_head_is_loaded(write, capsys):
    flat = flat_params()
    config = config_with(pretrained=write(flat))
    model = create_model(config)
    assert (model.units, model.width) == (UNITS, WIDTH)
    params = flatten_dict(build.create_params(config, model, build.load_source(config)), sep="/")
    assert set(params) == {key.replace("resnet/head/conv2d", "head") for key in flat}
    for key, leaf in params.items():
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape) if key.startswith("head/") else flat[key], err_msg=key)
    report = capsys.readouterr().out
    assert "resnet/block2/…" in report and "position embeddings" not in report


def test_what_was_trained_is_a_file_again(write):
    squeezed = flatten_dict(pretrained.to_original(released_params()), sep="/")
    assert create_model(config_with(pretrained=write(squeezed))).units == UNITS


@pytest.mark.parametrize("units", [list(UNITS), UNITS])
def test_sizes_given_may_be_a_list(write, units):
    file = write(flat_params())
    assert create_model(config_with(pretrained=file, model={"units": units, "width": WIDTH})).units == UNITS
    with pytest.raises(UsageError, match=r"which is of another variant: width 64 \(file: 32\)"):
        create_model(config_with(pretrained=file, model={"units": units, "width": 64}))


def without(part):
    return {key: leaf for key, leaf in flat_params().items() if part not in key}


def renamed(old, new):
    return {key.replace(old, new): leaf for key, leaf in flat_params().items()}


def with_shape(key, shape):
    return {**flat_params(), key: np.zeros(shape, np.float32)}


NOT_WHOLE = {
    f"its head, {HEAD}, is missing": without("head"),
    f"its head, {HEAD}, is of shape (3, 3, 512, 7); expected": with_shape(HEAD, (3, 3, 512, 7)),
    f"its head, {HEAD}, is of shape (); expected": with_shape(HEAD, ()),
    "root_block/standardized_conv2d/kernel is missing": without("root_block"),
    "its width, 48, is not a multiple of 32": flat_params(width=48),
    "missing: resnet/block2/unit02/b/group_norm/gamma": without("unit02/b/group_norm"),
    "missing: resnet/block1/unit01/a/proj/standardized_conv2d/kernel": without("block1/unit01/a/proj"),
    "missing: resnet/block2/unit02/a/group_norm/gamma": renamed("unit02", "unit03"),
    "missing: resnet/block2/unit01/a/group_norm/gamma": renamed("block2", "block3"),
    "gamma (1, 1, 1, 256) instead of (256,)": with_shape("resnet/group_norm/gamma", (1, 1, 1, 256)),
    "unexpected: extra/scale": with_shape("extra/scale", (1,)),
}


@pytest.mark.parametrize("cause", NOT_WHOLE)
def test_infer_resnet_names_what_is_not_whole(cause):
    with pytest.raises(UserError) as caught:
        infer(NOT_WHOLE[cause])
    message = str(caught.value)
    assert message.startswith("this is not a whole ResNet (BiT): ") and cause in message and "\n" not in message


FOREIGN = {
    "a ViT file (Transformer/encoderblock_…); give a ResNet (BiT), or set architecture to 'vit'": {
        "Transformer/encoderblock_0/LayerNorm_0/scale": np.zeros(1)
    },
    "not a ResNet (BiT) file, for it holds conv_root/kernel": {"conv_root/kernel": np.zeros(1)},
    "not a ResNet (BiT) file, for it holds layer1/weight; give a ResNet (BiT)": {"layer1/weight": np.zeros(1)},
    "for it holds nothing": {},
}


@pytest.mark.parametrize("cause", FOREIGN)
def test_infer_resnet_recognises_other_files(cause):
    with pytest.raises(UserError) as caught:
        infer(FOREIGN[cause])
    assert cause in str(caught.value)


def test_each_architecture_refuses_the_others_file(write):
    with pytest.raises(UserError, match="micro: .* looks like a ViT file .* set architecture to 'vit'"):
        create_model(config_with(pretrained="micro"))
    with pytest.raises(UserError, match=r"BiT-micro.npz: .* a ResNet \(BiT\) file .* set architecture to 'resnet50'"):
        create_model(config_with(pretrained=write(flat_params()), architecture="vit"))


def test_adapt_params_says_which_file_does_not_fit():
    vit, resnet = pretrained.load_npz(pretrained.resolve("micro")), pretrained.to_original(released_params())
    with pytest.raises(UserError, match="do not fit the model: it looks like a ViT file"):
        pretrained.adapt_params(vit, resnet)
    with pytest.raises(UserError, match="do not fit the model: it looks like a ResNet"):
        pretrained.adapt_params(resnet, vit)


def test_a_released_file_is_checked_against_its_name(monkeypatch, tmp_path):
    fetched = {}

    def fetch(url, path, *, num_bytes, check):
        fetched.update(url=url, path=path)
        shapes = released_shapes(**fetched.pop("sizes"), num_classes=1)
        flat = {key: np.zeros(shape, np.int8) for key, shape in shapes.items()}
        pretrained.save_npz(tmp_path / "part", unflatten_dict(flat, sep="/"))
        check(tmp_path / "part")
        return path

    monkeypatch.setattr(download, "fetch", fetch)
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path))
    fetched["sizes"] = {"units": (3, 4, 6, 3), "width": 64}
    assert pretrained.resolve("bit_models/BiT-S-R50x1")
    fetched["sizes"] = {}
    with pytest.raises(UserError, match=r"the file is not bit_models/BiT-M-R50x1: units \(1, 2\) instead of"):
        pretrained.resolve("bit_models/BiT-M-R50x1")
    assert fetched["url"] == "https://storage.googleapis.com/bit_models/BiT-M-R50x1.npz"
    assert fetched["path"] == tmp_path / "bit_models" / "BiT-M-R50x1.npz"
