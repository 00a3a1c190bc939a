import dataclasses

import numpy as np
import pytest
import reference
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import models, pretrained
from vit_jax.pretrained import ModelMetadata
from vit_jax.runtime.errors import UsageError
from vit_jax.training import initialize

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}


@pytest.fixture
def file(tmp_path):
    """A checkpoint of the original format for 16-pixel images, of random numbers."""
    shapes = reference.released_shapes(**SIZES, representation_size=12, num_classes=7, num_tokens=17)
    rng = np.random.default_rng(0)
    flat = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    pretrained.save_npz(tmp_path / "file.npz", unflatten_dict(flat, sep="/"))
    return tmp_path / "file.npz"


def arguments_of(file, **given):
    return initialize.model_arguments(given, "vit", initialize.load_pretrained(str(file)))


def test_model_arguments_takes_missing_sizes_from_the_checkpoint(file):
    arguments = arguments_of(file)
    assert {name: arguments[name] for name in SIZES} == SIZES
    assert "representation_size" not in arguments and "num_classes" not in arguments


def test_create_params_loads_all_but_the_head(file):
    source = initialize.load_pretrained(str(file))
    model = models.create_model("vit", arguments_of(file), num_classes=10)
    params = initialize.create_params(model, source, image_size=16, seed=0)
    with np.load(file) as arrays:
        for key, leaf in flatten_dict(params, sep="/").items():
            expected = np.zeros(leaf.shape) if key.startswith("head/") else arrays[key]
            np.testing.assert_array_equal(leaf, expected, err_msg=key)


def test_model_arguments_rejects_other_sizes_than_those_of_the_checkpoint(file):
    message = r"config.model does not match .*file.npz: hidden_size 48 \(checkpoint: 24\);"
    with pytest.raises(UsageError, match=message):
        arguments_of(file, **{**SIZES, "hidden_size": 48})


def test_model_arguments_rejects_another_architecture(file):
    with pytest.raises(UsageError, match=r"does not match .*: resnet50 \(checkpoint: vit\)"):
        initialize.model_arguments({}, "resnet50", initialize.load_pretrained(str(file)))


def test_model_arguments_keeps_options_that_shapes_do_not_tell(file):
    assert arguments_of(file, **SIZES, dropout_rate=0.1)["dropout_rate"] == 0.1


def test_model_arguments_prefers_given_options_to_those_in_the_metadata(file, tmp_path):
    params = pretrained.load_npz(file)
    metadata = ModelMetadata.from_params(params)
    model = {**metadata.model, "gelu_approximate": False, "layer_norm_epsilon": 1e-12}
    other = tmp_path / "other.npz"
    pretrained.save_npz(other, params, dataclasses.replace(metadata, model=model))
    arguments = arguments_of(other)
    assert (arguments["gelu_approximate"], arguments["layer_norm_epsilon"]) == (False, 1e-12)
    arguments = arguments_of(other, gelu_approximate=True)
    assert (arguments["gelu_approximate"], arguments["layer_norm_epsilon"]) == (True, 1e-12)


def test_model_arguments_requires_sizes_without_a_checkpoint():
    with pytest.raises(UsageError, match="config.model is empty"):
        initialize.model_arguments({}, "vit", None)
