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
def checkpoint(tmp_path):
    """Random checkpoint in the original ViT checkpoint format, for 16-pixel images."""
    shapes = reference.released_shapes(**SIZES, representation_size=12, num_classes=7, num_tokens=17)
    rng = np.random.default_rng(0)
    flat = {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    pretrained.save_npz(tmp_path / "file.npz", unflatten_dict(flat, sep="/"))
    return tmp_path / "file.npz"


def arguments_of(checkpoint, **given):
    return initialize.model_arguments(given, "vit", initialize.load_pretrained(str(checkpoint)))


def test_model_arguments_reads_missing_sizes_from_checkpoint(checkpoint):
    arguments = arguments_of(checkpoint)
    assert {name: arguments[name] for name in SIZES} == SIZES
    assert "representation_size" not in arguments and "num_classes" not in arguments


def test_create_params_loads_all_parameters_except_head(checkpoint):
    source = initialize.load_pretrained(str(checkpoint))
    model = models.create_model("vit", arguments_of(checkpoint), num_classes=10)
    params = initialize.create_params(model, source, image_size=16, seed=0)
    with np.load(checkpoint) as arrays:
        for key, leaf in flatten_dict(params, sep="/").items():
            expected = np.zeros(leaf.shape) if key.startswith("head/") else arrays[key]
            np.testing.assert_array_equal(leaf, expected, err_msg=key)


def test_model_arguments_rejects_sizes_that_differ_from_checkpoint(checkpoint):
    message = r"config.model does not match .*file.npz: hidden_size 48 \(checkpoint: 24\);"
    with pytest.raises(UsageError, match=message):
        arguments_of(checkpoint, **{**SIZES, "hidden_size": 48})


def test_model_arguments_rejects_other_architecture(checkpoint):
    with pytest.raises(UsageError, match=r"does not match .*: resnet50 \(checkpoint: vit\)"):
        initialize.model_arguments({}, "resnet50", initialize.load_pretrained(str(checkpoint)))


def test_model_arguments_keeps_options_not_determined_by_shapes(checkpoint):
    assert arguments_of(checkpoint, **SIZES, dropout_rate=0.1)["dropout_rate"] == 0.1


def test_model_arguments_prefers_given_options_over_metadata(checkpoint, tmp_path):
    params = pretrained.load_npz(checkpoint)
    metadata = ModelMetadata.from_params(params)
    model = {**metadata.model, "gelu_approximate": False, "layer_norm_epsilon": 1e-12}
    path = tmp_path / "other.npz"
    pretrained.save_npz(path, params, dataclasses.replace(metadata, model=model))
    arguments = arguments_of(path)
    assert (arguments["gelu_approximate"], arguments["layer_norm_epsilon"]) == (False, 1e-12)
    arguments = arguments_of(path, gelu_approximate=True)
    assert (arguments["gelu_approximate"], arguments["layer_norm_epsilon"]) == (True, 1e-12)


def test_model_arguments_requires_sizes_without_checkpoint():
    with pytest.raises(UsageError, match="config.model is empty"):
        initialize.model_arguments({}, "vit", None)
