import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference import MICRO, flat_params, nest
from safetensors.numpy import load_file, save_file

from vit_jax import models
from vit_jax.pretrained import ModelMetadata, huggingface
from vit_jax.runtime.errors import UserError


def create_metadata(**changes):
    model = models.VisionTransformer(5, **MICRO | changes)
    return ModelMetadata.from_model(
        model, image_size=8, class_names=tuple("abcde"), image_mean=(0.4, 0.4, 0.4), image_std=(0.2, 0.2, 0.2)
    )


@pytest.fixture
def directory(tmp_path):
    """Directory of a saved micro ViT for 8-pixel images."""
    huggingface.save_huggingface(tmp_path, nest(flat_params()), create_metadata())
    return tmp_path


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_load_huggingface_returns_saved_params_and_metadata(directory):
    params, metadata = huggingface.load_huggingface(directory)
    expected = flat_params()
    found = flatten_dict(params, sep="/")
    assert found.keys() == expected.keys()
    for key, leaf in expected.items():
        np.testing.assert_array_equal(found[key], leaf)
    expected = create_metadata()
    assert metadata.create_model() == expected.create_model()
    names = ("image_size", "class_names", "dtype", "image_mean", "image_std")
    assert [getattr(metadata, name) for name in names] == [getattr(expected, name) for name in names]


def test_save_huggingface_transposes_kernels(directory):
    """hidden_size 6 = 2 heads × 3, patch_size 4, mlp_dim 8."""
    flat, tensors = flat_params(), load_file(directory / "model.safetensors")
    layer = "vit.encoder.layer.2"
    assert tensors["vit.embeddings.patch_embeddings.projection.weight"].shape == (6, 3, 4, 4)
    assert tensors[f"{layer}.intermediate.dense.weight"].shape == (8, 6)
    assert tensors[f"{layer}.attention.attention.query.bias"].shape == (6,)
    block = "Transformer/encoderblock_2/MultiHeadDotProductAttention_1"
    query = flat[f"{block}/query/kernel"]  # [d heads d/heads]
    np.testing.assert_array_equal(tensors[f"{layer}.attention.attention.query.weight"], query.reshape(6, 6).T)
    out = flat[f"{block}/out/kernel"]  # [heads d/heads d]
    np.testing.assert_array_equal(tensors[f"{layer}.attention.output.dense.weight"], out.reshape(6, 6).T)
    np.testing.assert_array_equal(tensors["classifier.weight"], flat["head/kernel"].T)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"representation_size": 4}, "parameters pre_logits"),
        ({"pool": "map", "num_tokens": 4}, "parameters MAPHead_0"),
        ({"pool": "mean", "num_tokens": 4}, "no class token"),
        ({"stem_units": (), "stem_width": 32}, "parameters conv_root"),
    ],
)
def test_save_huggingface_rejects_unsupported_architecture(changes, part, tmp_path):
    with pytest.raises(UserError, match=f"the model has {part}, unlike any ViTForImageClassification"):
        huggingface.save_huggingface(tmp_path, nest(flat_params(**changes)), create_metadata())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("approximate", "activation"), [(True, "gelu_pytorch_tanh"), (False, "gelu")])
def test_save_huggingface_writes_model_and_preprocessor_configs(approximate, activation, tmp_path):
    huggingface.save_huggingface(tmp_path, nest(flat_params()), create_metadata(gelu_approximate=approximate))
    config, preprocessor = (
        json.loads((tmp_path / name).read_text()) for name in ("config.json", "preprocessor_config.json")
    )
    assert (config["hidden_act"], config["num_hidden_layers"], config["intermediate_size"]) == (activation, 3, 8)
    assert config["id2label"]["4"] == "e" and config["label2id"]["e"] == 4
    assert (preprocessor["size"], preprocessor["image_std"]) == ({"height": 8, "width": 8}, [0.2, 0.2, 0.2])


def test_save_huggingface_crops_as_the_model(tmp_path):
    metadata = dataclasses.replace(create_metadata(), test_resize="center_crop")
    huggingface.save_huggingface(tmp_path, nest(flat_params()), metadata)
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (preprocessor["size"], preprocessor["crop_size"]) == ({"shortest_edge": 9}, {"height": 8, "width": 8})
    assert preprocessor["do_center_crop"] and preprocessor["image_processor_type"] == "BitImageProcessor"
    assert huggingface.load_huggingface(tmp_path)[1].test_resize == "center_crop"


def test_load_huggingface_sorts_class_names_numerically(directory):
    """As strings, "10" would come before "9"."""
    (directory / "metadata.json").unlink()
    names = {str(i): f"class {i}" for i in (10, 0, 9, 8, 7, 6, 5, 4, 3, 2, 1)}
    edit_json(directory / "config.json", id2label=names)
    tensors = load_file(directory / "model.safetensors")
    head = {"classifier.weight": np.zeros((11, 6), np.float32), "classifier.bias": np.zeros(11, np.float32)}
    save_file(tensors | head, directory / "model.safetensors")
    _, metadata = huggingface.load_huggingface(directory)
    assert metadata.class_names == tuple(f"class {i}" for i in range(11))


def test_load_huggingface_returns_zero_head_for_vit_model(directory):
    (directory / "metadata.json").unlink()
    tensors = load_file(directory / "model.safetensors")
    bare = {name.removeprefix("vit."): leaf for name, leaf in tensors.items() if not name.startswith("classifier")}
    save_file({**bare, "pooler.dense.bias": np.zeros(6)}, directory / "model.safetensors")
    params, _ = huggingface.load_huggingface(directory)
    assert params["head"]["kernel"].shape == (6, 5) and not np.any(params["head"]["kernel"])
    np.testing.assert_array_equal(params["cls"], flat_params()["cls"])


def test_load_huggingface_reads_configs_of_old_versions(directory):
    config = json.loads((directory / "config.json").read_text())
    del config["qkv_bias"], config["num_channels"]
    (directory / "config.json").write_text(json.dumps(config))
    assert huggingface.load_huggingface(directory)[1].model["num_layers"] == 3


def test_load_huggingface_uses_default_mean_without_preprocessor_config(directory):
    for name in ("metadata.json", "preprocessor_config.json"):
        (directory / name).unlink()
    assert huggingface.load_huggingface(directory)[1].image_mean == (0.5, 0.5, 0.5)


def test_load_huggingface_reads_dtype_from_metadata(tmp_path):
    metadata = create_metadata(dtype=jnp.bfloat16)
    huggingface.save_huggingface(tmp_path, nest(flat_params()), metadata)
    assert huggingface.load_huggingface(tmp_path)[1].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type of config.json is 'bert'"),
        ({"hidden_act": "relu"}, "hidden_act of config.json is 'relu'"),
        ({"qkv_bias": False}, "qkv_bias of config.json is False"),
        ({"num_channels": 1}, "num_channels of config.json is 1"),
        (
            {"num_hidden_layers": 4},
            "model.safetensors is not of the model in config.json: missing: vit.encoder.layer.3",
        ),
        ({"image_size": "8"}, "image_size is '8'; expected a positive integer"),
    ],
)
def test_load_huggingface_rejects_unsupported_configs(directory, changes, message):
    edit_json(directory / "config.json", **changes)
    with pytest.raises(UserError) as caught:
        huggingface.load_huggingface(directory)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_load_huggingface_rejects_missing_and_damaged_files(directory, name, content):
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    with pytest.raises(UserError, match="is not a complete ViTForImageClassification: "):
        huggingface.load_huggingface(directory)
