import json

import numpy as np
import pytest
from reference import MICRO, flat_params, nest

from vit_jax import models
from vit_jax.pretrained import ModelMetadata, imagenet_classes
from vit_jax.pretrained.metadata import load_metadata, save_metadata, unwrap_metadata, wrap_metadata
from vit_jax.runtime.errors import UserError

METADATA = ModelMetadata(
    "vit", {**MICRO, "num_classes": 5}, image_size=8, class_names=tuple("abcde"), dtype="bfloat16", image_std=(0.2,) * 3
)


def test_from_json_inverts_to_json():
    assert ModelMetadata.from_json(json.loads(json.dumps(METADATA.to_json()))) == METADATA


def test_from_json_reads_keys_of_version_0_1_and_ignores_unknown_keys():
    value = METADATA.to_json() | {"pixel_mean": [0.25] * 3, "pixel_deviation": [0.125] * 3, "command": "python"}
    for name in ("image_mean", "image_std", "dtype"):
        del value[name]
    metadata = ModelMetadata.from_json(value)
    assert (metadata.image_mean, metadata.image_std, metadata.dtype) == ((0.25,) * 3, (0.125,) * 3, "float32")


@pytest.mark.parametrize("name", ["model", "image_size", "class_names"])
def test_load_metadata_reports_missing_key(name, tmp_path):
    value = METADATA.to_json()
    del value[name]
    (tmp_path / "about.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"{tmp_path} is damaged: .*{name}"):
        load_metadata(tmp_path, nest(flat_params()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vgg"}, "architecture is 'vgg'; expected one of vit, resnet50"),
        ({"image_size": 0}, "image_size is 0; expected a positive integer"),
        ({"image_size": True}, "image_size is True; expected a positive integer"),
        ({"class_names": [1, 2]}, r"class_names is \(1, 2\); expected strings"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of float32, bfloat16"),
        ({"image_mean": [127, 127, 127]}, r"image_mean is \(127, 127, 127\); expected three numbers from 0 to 1"),
        ({"image_std": [0.5, 0.5, 0.0]}, r"image_std is \(0.5, 0.5, 0.0\); expected three numbers above 0, at most 1"),
        ({"image_std": [0.5, 0.5]}, r"image_std is \(0.5, 0.5\); expected three numbers above 0"),
    ],
)
def test_from_json_rejects_invalid_attribute(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        ModelMetadata.from_json(METADATA.to_json() | changes)


def test_create_model_inverts_from_model():
    model = models.ResNet(5, (1, 2), 32, dtype="bfloat16")
    metadata = ModelMetadata.from_model(model, image_size=32, class_names=tuple("abcde"))
    assert (metadata.architecture, metadata.dtype) == ("resnet50", "bfloat16")
    assert models.model_arguments(metadata.create_model()) == models.model_arguments(model)


@pytest.mark.parametrize(
    ("num_classes", "names"), [(3, ("0", "1", "2")), (1000, tuple(name for _, name in imagenet_classes()))]
)
def test_from_params_infers_image_size_and_class_names(num_classes, names):
    """A 3 × 3 grid of 4-pixel patches covers a 12-pixel image."""
    metadata = ModelMetadata.from_params(nest(flat_params(num_classes=num_classes, num_tokens=10)))
    assert (metadata.image_size, metadata.class_names) == (12, names)


def test_validate_reports_mismatch_with_params():
    METADATA.validate(nest(flat_params()))
    with pytest.raises(UserError, match="does not match its parameters: .*num_layers 3 instead of 2"):
        METADATA.validate(nest(flat_params(num_layers=2)))
    with pytest.raises(UserError, match="does not match its parameters: .*image_size 8 instead of 12"):
        METADATA.validate(nest(flat_params(num_tokens=10)))
    with pytest.raises(UserError, match="does not match its parameters: .*number of class_names 5 instead of 7"):
        METADATA.validate(nest(flat_params(num_classes=7)))


def test_unwrap_metadata_rejects_wrong_checksums():
    wrapped = wrap_metadata(METADATA, {"cls": "1"})
    assert unwrap_metadata(wrapped, {"cls": "1"}) == METADATA
    with pytest.raises(UserError, match="the checksum of the metadata is wrong"):
        unwrap_metadata(wrapped, {"cls": "2"})
    with pytest.raises(UserError, match="the checksum of cls"):
        unwrap_metadata(wrapped | {"checksums": {"cls": "1"}}, {"cls": "2"})


def test_load_metadata_returns_saved_metadata(tmp_path):
    params = nest(flat_params())
    assert load_metadata(tmp_path, params) is None
    save_metadata(tmp_path, METADATA, params)
    assert load_metadata(tmp_path, params) == METADATA


def test_load_metadata_rejects_changed_params_and_damaged_file(tmp_path):
    params = nest(flat_params())
    save_metadata(tmp_path, METADATA, params)
    params["head"]["bias"] = np.float32(params["head"]["bias"] + 1)
    with pytest.raises(UserError, match="is damaged: the checksum of head/bias"):
        load_metadata(tmp_path, params)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="is damaged: .*; export it again"):
        load_metadata(tmp_path, params)
