import dataclasses

import numpy as np
import pytest
import reference
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import digits
from vit_jax import pretrained
from vit_jax.runtime.errors import UsageError
from vit_jax.training import build

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


@pytest.fixture
def file(tmp_path):
    """A file of the released layout for 16-pixel pictures, of random numbers."""
    shapes = reference.released_shapes(**SIZES, representation_size=12, num_classes=7, num_tokens=17)
    rng = np.random.default_rng(0)
    flat = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    pretrained.save_npz(tmp_path / "file.npz", unflatten_dict(flat, sep="/"))
    return tmp_path / "file.npz"


def config_with(*, model=None, **changes):
    config = digits.get_config("scratch")
    config.model = model or {}
    config.update(changes)
    return config


def create_model(config):
    return build.create_model(config, build.load_source(config), num_classes=10)


def test_sizes_left_out_are_read_off_the_file(file):
    config = config_with(pretrained=str(file))
    model = create_model(config)
    assert {name: getattr(model, name) for name in SIZES} == SIZES
    assert model.representation_size is None
    params = build.create_params(config, model, build.load_source(config))
    with np.load(file) as source:
        for key, leaf in flatten_dict(params, sep="/").items():
            expected = np.zeros(leaf.shape) if key.startswith("head/") else source[key]
            np.testing.assert_array_equal(leaf, expected, err_msg=key)


def test_sizes_given_must_be_those_of_the_file(file):
    model = {**SIZES, "hidden_size": 48}
    with pytest.raises(UsageError, match=r"config.model does not fit .*file.npz, .*: hidden_size 48 \(file: 24\);"):
        create_model(config_with(pretrained=str(file), model=model))


def test_options_that_a_file_does_not_know_are_kept(file):
    config = config_with(pretrained=str(file), model={**SIZES, "dropout_rate": 0.1})
    assert create_model(config).dropout_rate == 0.1


def test_what_a_file_says_beyond_its_sizes_is_taken_unless_the_config_says_otherwise(file, tmp_path):
    params = pretrained.load_npz(file)
    metadata = pretrained.ModelMetadata.from_params(params)
    arguments = {**metadata.model, "gelu_approximate": False, "layer_norm_epsilon": 1e-12}
    pretrained.save_npz(tmp_path / "other.npz", params, dataclasses.replace(metadata, model=arguments))
    model = create_model(config_with(pretrained=str(tmp_path / "other.npz")))
    assert (model.gelu_approximate, model.layer_norm_epsilon) == (False, 1e-12)
    model = create_model(config_with(pretrained=str(tmp_path / "other.npz"), model={"gelu_approximate": True}))
    assert (model.gelu_approximate, model.layer_norm_epsilon) == (True, 1e-12)


def test_a_model_from_scratch_needs_sizes():
    with pytest.raises(UsageError, match="config.model is empty"):
        create_model(config_with())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hiden_size": 24}, "config.model.hiden_size: VisionTransformer has no such argument"),
        ({"num_classes": 24}, "config.model.num_classes: VisionTransformer has no such argument"),
        ({"num_layers": 0}, "config.model.num_layers is 0; expected a positive integer"),
        ({"num_layers": 1.5}, "config.model.num_layers is 1.5; expected a positive integer"),
        ({"dropout_rate": 1.0}, "config.model.dropout_rate is 1.0; expected a number of at least 0 and below 1"),
        ({"dropout_rate": "0.1"}, "config.model.dropout_rate is '0.1'; expected a number"),
        ({"num_layers": True}, "config.model.num_layers is True; expected a positive integer"),
        ({"gelu_approximate": 1}, "config.model.gelu_approximate is 1; expected True or False"),
        ({"head_init": "ones"}, "config.model.head_init is 'ones'; expected one of zeros, xavier"),
        ({"pool": "max"}, "config.model.pool is 'max'; expected one of cls, mean, map"),
        (
            {"stem_units": (2, 0)},
            "config.model.stem_units is (2, 0); expected None, or a tuple of positive integers",
        ),
        ({"stem_units": (1,), "stem_width": 48}, "config.model.stem_width 48 is not a multiple of 32"),
        ({"num_heads": 5}, "config.model.hidden_size 24 is not a multiple of num_heads 5"),
        ({"patch_size": 5}, "config.image_size 16 is not a multiple of the patch, 5 pixels"),
    ],
)
def test_wrong_constructor_arguments_are_refused(model, message):
    with pytest.raises(UsageError) as error:
        create_model(config_with(model={**SIZES, **model}))
    assert message in str(error.value)
