"""Files of the same family in other layouts: each, at micro width, becomes the original's parameters."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest
import reference
from flax.traverse_util import flatten_dict, unflatten_dict

import vit_jax
from configs import digits
from vit_jax import pretrained, trainer
from vit_jax.errors import UserError

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}
POSITIONS = "Transformer/posembed_input/pos_embedding"


def original(*, representation_size=None):
    shapes = reference.released_shapes(
        **SIZES, representation_size=representation_size, num_classes=7, num_tokens=1 + 16
    )
    rng = np.random.default_rng(0)
    flat = {key: rng.normal(scale=0.3, size=shape).astype(np.float32) for key, shape in shapes.items()}
    flat[POSITIONS][:, 0] = 0  # as where the class token has no position
    return flat


def big_vision(flat):
    """The same numbers under big_vision's names."""
    names = {
        "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
        "LayerNorm_2": "LayerNorm_1",
        "MlpBlock_3": "MlpBlock_0",
    }
    renamed = {re.sub("|".join(names), lambda match: names[match[0]], key): leaf for key, leaf in flat.items()}
    renamed["pos_embedding"] = renamed.pop(POSITIONS)[:, 1:]
    return renamed


def stacked(flat):
    """Blocks as one array each, depth on axis 0."""
    first = "Transformer/encoderblock_0/"
    rests = [key.removeprefix(first) for key in flat if key.startswith(first)]
    others = {key: leaf for key, leaf in flat.items() if "encoderblock_" not in key}
    return others | {
        f"Transformer/encoderblock/{rest}": np.stack([flat[f"Transformer/encoderblock_{i}/{rest}"] for i in range(2)])
        for rest in rests
    }


def as_void(flat):
    """bfloat16 as NumPy writes it: two raw bytes."""
    return {key: leaf.astype(ml_dtypes.bfloat16).view("V2") for key, leaf in flat.items()}


def prefixed(flat, prefix, **others):
    return {f"{prefix}{key}": leaf for key, leaf in flat.items()} | others


LAYOUTS = {
    "original": lambda flat: flat,
    "SAM": lambda flat: prefixed(flat, "opt/target/", **{"opt/state/step": np.int32(3), "epoch": np.int32(1)}),
    "big_vision": lambda flat: prefixed(big_vision(flat), "params/"),
    "big_vision, bare": big_vision,
    "big_vision, one of two towers": lambda flat: prefixed(
        big_vision(flat), "params/img/", **{"params/txt/head/bias": np.zeros(3, np.float32), "params/t": np.zeros(1)}
    ),
    "big_vision, stacked": lambda flat: prefixed(stacked(big_vision(flat)), "params/", **{"opt/0": np.zeros(2)}),
}


def write(path, flat):
    pretrained.save_npz(path, unflatten_dict(flat, sep="/"))
    return path


@pytest.mark.parametrize("representation_size", [None, 12])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_becomes_the_original(name, representation_size, tmp_path):
    flat = original(representation_size=representation_size)
    params, _ = pretrained.read_model(str(write(tmp_path / "file.npz", LAYOUTS[name](flat))))
    found = flatten_dict(params, sep="/")
    assert found.keys() == flat.keys()
    for key, leaf in flat.items():
        np.testing.assert_array_equal(found[key], leaf)


def test_bfloat16_as_raw_bytes(tmp_path):
    flat = original()
    params, _ = pretrained.read_model(str(write(tmp_path / "file.npz", prefixed(as_void(big_vision(flat)), "params/"))))
    for key, leaf in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(leaf, flat[key].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_big_vision_file_gives_its_models_logits(tmp_path):
    """Against a float64 pass in which the class token joins after the positions were added."""
    flat = original()
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    logits = vit_jax.load(write(tmp_path / "file.npz", prefixed(stacked(big_vision(flat)), "params/"))).logits(images)
    wanted = reference.forward(unflatten_dict(flat, sep="/"), images / 127.5 - 1)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


def test_a_run_starts_from_one(tmp_path):
    config = digits.get_config()
    config.model = {}
    file = write(tmp_path / "file.npz", prefixed(stacked(big_vision(original())), "params/"))
    config.update(pretrained=str(file), num_steps=0, warmup_steps=0)
    trainer.train_and_evaluate(config, tmp_path / "run")
    params = flatten_dict(jax.device_get(trainer.load_run(tmp_path / "run").params), sep="/")
    np.testing.assert_array_equal(params[POSITIONS], original()[POSITIONS])


def test_a_model_that_pools_otherwise_is_refused(tmp_path):
    flat = {key: leaf for key, leaf in big_vision(original()).items() if key != "cls"}
    with pytest.raises(UserError, match="has no class token but pools by the mean; give one with a class token"):
        pretrained.read_model(str(write(tmp_path / "gap.npz", prefixed(flat, "params/"))))
    flat["MAPHead_0/probe"] = np.zeros((1, 1, 24), np.float32)
    with pytest.raises(UserError, match=r"pools by attention \(MAPHead_0\)"):
        pretrained.read_model(str(write(tmp_path / "map.npz", prefixed(flat, "params/"))))
