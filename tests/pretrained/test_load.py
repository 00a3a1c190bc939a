import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference import MICRO, flat_params, nest

from vit_jax import pretrained
from vit_jax.models import VisionTransformer
from vit_jax.pretrained import ModelMetadata, huggingface
from vit_jax.runtime.errors import UserError

METADATA = ModelMetadata.from_model(VisionTransformer(5, **MICRO), image_size=8, class_names=tuple("abcde"))


def assert_equal(params, expected):
    found = flatten_dict(params, sep="/")
    assert found.keys() == expected.keys()
    for key, leaf in expected.items():
        np.testing.assert_array_equal(found[key], leaf)


SAVE = {
    "npz": lambda path, params: pretrained.save_npz(path, params, METADATA),
    "orbax": lambda path, params: pretrained.save_orbax(path, params, METADATA),
    "huggingface": lambda path, params: huggingface.save_huggingface(path, params, METADATA),
}


def save(kind, path, flat):
    """Saves a model and returns its path: a file for npz, a directory otherwise."""
    if kind != "npz":
        path.mkdir()
    SAVE[kind](path, nest(flat))
    return str(path)


@pytest.mark.parametrize("kind", SAVE)
def test_read_model_returns_saved_params_and_metadata(tmp_path, kind):
    params, metadata = pretrained.read_model(save(kind, tmp_path / "model", flat_params()))
    assert_equal(params, flat_params())
    assert metadata.class_names == tuple("abcde") and metadata.image_size == 8


def test_read_model_returns_none_for_missing_metadata(tmp_path):
    pretrained.save_npz(tmp_path / "micro.npz", pretrained.load_npz(pretrained.resolve("micro")))
    params, metadata = pretrained.read_model(str(tmp_path / "micro.npz"))
    assert metadata is None and params["head"]["kernel"].shape == (96, 10)


@pytest.mark.parametrize("kind", SAVE)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_read_model_rejects_nonfinite_values(tmp_path, kind, value):
    flat = flat_params()
    flat["head/bias"][3] = value
    with pytest.raises(UserError, match="model: head/bias has values that float32 cannot hold"):
        pretrained.read_model(save(kind, tmp_path / "model", flat))


def test_read_model_rejects_values_beyond_float32(tmp_path):
    flat = flat_params()
    pretrained.save_npz(tmp_path / "model.npz", nest(flat | {"head/bias": np.full(5, 1e39)}))
    with pytest.raises(UserError, match="model.npz: head/bias has values that float32 cannot hold"):
        pretrained.read_model(str(tmp_path / "model.npz"))


@pytest.mark.parametrize("kind", ["npz", "orbax"])
def test_read_model_rejects_metadata_of_other_params(tmp_path, kind):
    path = save(kind, tmp_path / "model", flat_params(num_classes=4))
    with pytest.raises(UserError, match="model: its metadata does not match its parameters: "):
        pretrained.read_model(path)


def test_load_orbax_rejects_damaged_directory(tmp_path):
    path = save("orbax", tmp_path / "model", flat_params())
    for file in (tmp_path / "model/params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match="model/params cannot be read: .*; export it again"):
        pretrained.read_model(path)
