"""Tests of every format of Google's checkpoints at micro size: logits and fine-tuning."""

import re

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
import reference_resnet
from flax.traverse_util import flatten_dict, unflatten_dict

import vit_jax
from configs import digits
from vit_jax import export, models, pretrained, trainer, visualize
from vit_jax.pretrained.formats import CONVERSIONS
from vit_jax.run import load_run
from vit_jax.runtime.errors import UserError
from vit_jax.training import initialize
from vit_jax.training.experiment import create_model

SIZES = {"patch_size": 4, "hidden_size": 24, "num_layers": 2, "num_heads": 3, "mlp_dim": 40}
HYBRID = SIZES | {"patch_size": 1, "stem_units": (1, 2), "stem_width": 32}
POSITIONS = "Transformer/posembed_input/pos_embedding"
CLASSES = 7
IMAGES = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)


def original(*, representation_size=None, num_tokens=None, **sizes):
    """Returns random parameters in the original ViT checkpoint format, for 16-pixel images."""
    sizes = SIZES | sizes
    has_class_token = sizes.get("pool", "cls") == "cls"
    num_tokens = num_tokens or has_class_token + 16
    shapes = reference.released_shapes(
        **sizes, representation_size=representation_size, num_classes=CLASSES, num_tokens=num_tokens
    )
    rng = np.random.default_rng(0)
    return {key: rng.normal(scale=0.3, size=shape).astype(np.float32) for key, shape in shapes.items()}


def hybrid(**sizes):
    """Returns random parameters of a hybrid for 32-pixel images; its stem outputs a 4 × 4 grid."""
    return original(**HYBRID | sizes)


def big_vision(flat):
    """Renames parameters to big_vision's keys."""
    names = {
        "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
        "LayerNorm_2": "LayerNorm_1",
        "MlpBlock_3": "MlpBlock_0",
    }
    renamed = {re.sub("|".join(names), lambda match: names[match[0]], key): leaf for key, leaf in flat.items()}
    positions = renamed.pop(POSITIONS)
    return renamed | {"pos_embedding": positions[:, 1:] if "cls" in flat else positions}


def stacked(flat):
    """Stacks the parameters of all blocks on axis 0."""
    first = "Transformer/encoderblock_0/"
    names = [key.removeprefix(first) for key in flat if key.startswith(first)]
    others = {key: leaf for key, leaf in flat.items() if "encoderblock_" not in key}
    return others | {
        f"Transformer/encoderblock/{name}": np.stack([flat[f"Transformer/encoderblock_{i}/{name}"] for i in range(2)])
        for name in names
    }


def as_void(flat):
    """Casts to bfloat16, which NumPy saves as two raw bytes."""
    return {key: leaf.astype(ml_dtypes.bfloat16).view("V2") for key, leaf in flat.items()}


def prefixed(flat, prefix, **others):
    return {f"{prefix}{key}": leaf for key, leaf in flat.items()} | others


def in_old_map_format(flat):
    """Moves the MAP head to the top level, as in old big_vision checkpoints."""
    return {key.removeprefix("MAPHead_0/"): leaf for key, leaf in flat.items()}


def unsqueezed(flat):
    """Reshapes GroupNorm parameters to [1 1 1 c]."""
    return {key: leaf[None, None, None] if re.search(r"gn\w+/", key) else leaf for key, leaf in flat.items()}


def in_optimizer(flat):
    return prefixed(flat, "opt/target/", **{"opt/state/step": np.int32(3), "epoch": np.int32(1)})


def in_train_state(flat):
    return prefixed(flat, "params/", **{"opt/0": np.zeros(2)})


def with_text_tower(flat):
    return prefixed(flat, "params/img/", **{"params/txt/head/bias": np.zeros(3), "params/t": np.zeros(1)})


def without_class_position(flat):
    """Zeroes the position embedding of the class token: big_vision adds positions before it concatenates the token."""
    flat[POSITIONS][:, 0] = 0
    return flat


# name -> (parameters in the original format, conversion to the format of the file)
FILES = {
    "original, 21k": (original(representation_size=12), lambda flat: flat),
    "original, 21k+1k, augreg": (original(), lambda flat: flat),
    "SAM": (original(), in_optimizer),
    "GSAM": (original(), lambda flat: prefixed(flat, "optimizer/target/")),
    "LiT": (original(), lambda flat: prefixed(flat, "img/", **{"txt/embedding": np.zeros(3), "t": np.zeros(1)})),
    "big_vision, class token": (without_class_position(original()), lambda flat: in_train_state(big_vision(flat))),
    "big_vision, bare, pre_logits": (without_class_position(original(representation_size=12)), big_vision),
    "big_vision, stacked": (without_class_position(original()), lambda flat: in_train_state(stacked(big_vision(flat)))),
    "big_vision, image tower": (without_class_position(original()), lambda flat: with_text_tower(big_vision(flat))),
    "big_vision, mean": (original(pool="mean"), lambda flat: in_train_state(big_vision(flat))),
    "big_vision, mean, pre_logits, stacked": (
        original(pool="mean", representation_size=12),
        lambda flat: in_train_state(stacked(big_vision(flat))),
    ),
    "big_vision, MAP": (original(pool="map"), lambda flat: with_text_tower(stacked(big_vision(flat)))),
    "big_vision, old MAP": (original(pool="map"), lambda flat: in_old_map_format(big_vision(flat))),
    "original, mean": (original(pool="mean"), lambda flat: flat),
    "hybrid": (hybrid(), unsqueezed),
    "hybrid, 21k": (hybrid(representation_size=12), unsqueezed),
    "hybrid, squeezed": (hybrid(), lambda flat: flat),
    "hybrid, root only": (hybrid(stem_units=(), patch_size=2), unsqueezed),
}


def save(path, flat):
    pretrained.save_npz(path, unflatten_dict(flat, sep="/"))
    return path


def images_for(flat):
    """Returns images of the size that matches the position embeddings."""
    return (
        np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
        if "conv_root/kernel" in flat
        else IMAGES
    )


@pytest.mark.parametrize("name", FILES)
def test_load_matches_reference_logits_of_every_format(name, tmp_path):
    flat, to_format = FILES[name]
    model = vit_jax.load(save(tmp_path / "file.npz", to_format(flat)))
    found = flatten_dict(model.params, sep="/")
    assert found.keys() == flat.keys()
    for key, leaf in flat.items():
        np.testing.assert_array_equal(found[key], leaf)
    images = images_for(flat)
    assert model.image_size == images.shape[1]
    expected = reference.forward(unflatten_dict(flat, sep="/"), images / 127.5 - 1)
    np.testing.assert_allclose(model.logits(images), expected, atol=2e-4)


@pytest.mark.parametrize("name", ["big_vision, MAP", "hybrid"])
def test_read_model_decodes_bfloat16_saved_as_raw_bytes(name, tmp_path):
    flat, to_format = FILES[name]
    params, _ = pretrained.read_model(str(save(tmp_path / "file.npz", as_void(to_format(flat)))))
    for key, leaf in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(leaf, flat[key].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_load_matches_reference_logits_of_bit_resnet(tmp_path):
    flat = reference_resnet.flat_params()
    images = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    logits = vit_jax.load(save(tmp_path / "file.npz", flat)).logits(images)
    expected = reference_resnet.forward(unflatten_dict(flat, sep="/"), images / 127.5 - 1)
    np.testing.assert_allclose(logits, expected, atol=1e-3 * np.abs(expected).max())


def test_read_model_computes_missing_sincos_position_embeddings(tmp_path):
    """Checks row 2, column 1 of a 4 × 4 grid: sine and cosine of the column, then of the row, at 6 frequencies."""
    flat = big_vision(original(pool="mean", patch_size=56))
    del flat["pos_embedding"]
    params, _ = pretrained.read_model(str(save(tmp_path / "file.npz", in_train_state(flat))))
    positions = flatten_dict(params, sep="/")[POSITIONS]
    assert positions.shape == (1, 16, 24)
    frequencies = [10_000 ** -(i / 5) for i in range(6)]
    waves = ((1, np.sin), (1, np.cos), (2, np.sin), (2, np.cos))
    expected = [wave(position * frequency) for position, wave in waves for frequency in frequencies]
    np.testing.assert_allclose(positions[0, 2 * 4 + 1], expected, atol=1e-6)


def test_read_model_keeps_position_embedding_of_class_token(tmp_path):
    flat = original()
    file = {key: leaf for key, leaf in flat.items() if key != POSITIONS} | {"pos_embedding": flat[POSITIONS]}
    params, _ = pretrained.read_model(str(save(tmp_path / "file.npz", file)))
    np.testing.assert_array_equal(flatten_dict(params, sep="/")[POSITIONS], flat[POSITIONS])


def shapes_of(flat):
    return {key: leaf.shape for key, leaf in flat.items()}


def test_conversions_are_all_needed_and_keep_original_format():
    needed = set()
    bare = big_vision(original(pool="mean"))
    del bare["pos_embedding"]
    for flat in [*(to_format(flat) for flat, to_format in FILES.values()), bare, reference_resnet.flat_params()]:
        for convert in CONVERSIONS:
            converted = convert(flat)
            if shapes_of(converted) != shapes_of(flat):
                needed.add(convert)
            flat = converted
    assert needed == set(CONVERSIONS)
    for flat in (original(), original(pool="mean"), original(pool="map")):
        assert all(shapes_of(convert(flat)) == shapes_of(flat) for convert in CONVERSIONS)


@pytest.mark.parametrize("name", ["big_vision, stacked", "big_vision, mean", "big_vision, old MAP", "hybrid"])
def test_from_params_rejects_wrong_shape_of_any_array(name):
    """Replaces each array by a scalar and by an empty array; the error is one line."""
    flat, to_format = FILES[name]
    file = to_format(flat)
    for key in file.keys() - {"opt/0"}:
        for other in (np.float32(1), np.zeros((0, 2), np.float32)):
            with pytest.raises(UserError) as caught:
                pretrained.ModelMetadata.from_params(
                    pretrained.to_original(unflatten_dict(file | {key: np.asarray(other)}, sep="/"))
                )
            assert "\n" not in str(caught.value)


def test_infer_sizes_rejects_missing_class_token():
    flat = {key: leaf for key, leaf in original().items() if key != "cls"}
    with pytest.raises(UserError, match="complete VisionTransformer: missing: cls"):
        pretrained.infer_sizes(unflatten_dict(flat, sep="/"))


def test_infer_sizes_reports_missing_keys_of_hybrid():
    flat = {key: leaf for key, leaf in hybrid().items() if "block2/unit1/gn_proj" not in key}
    with pytest.raises(UserError, match="missing: block2/unit1/gn_proj/bias, block2/unit1/gn_proj/scale"):
        pretrained.infer_sizes(unflatten_dict(flat, sep="/"))


@pytest.mark.parametrize("pool", models.POOLS)
def test_vision_transformer_params_match_checkpoint_keys_and_shapes(pool):
    sizes = HYBRID | {"pool": pool}
    model = models.VisionTransformer(CLASSES, **sizes, representation_size=12)
    tree = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 32, 32, 3))))["params"]
    expected = reference.released_shapes(
        **sizes, representation_size=12, num_classes=CLASSES, num_tokens=16 + (pool == "cls")
    )
    assert {key: leaf.shape for key, leaf in flatten_dict(tree, sep="/").items()} == expected


def config_from(file, **changes):
    config = digits.get_config()
    config.model = {}
    config.update(pretrained=str(file), num_steps=3, warmup_steps=1, eval_every_steps=3, checkpoint_every_steps=3)
    config.update(dict(batch_size=16, dtype="float32") | changes)
    config.dataset.update(train_split="train[:64]", test_split="test[:32]")
    return config


@pytest.mark.slow
@pytest.mark.parametrize(("name", "image_size"), [("hybrid, root only", 16), ("big_vision, MAP", 32)])
def test_train_visualize_and_export_accept_other_formats(name, image_size, tmp_path):
    """Position embeddings are resampled; figures and exports are of the fine-tuned model."""
    flat, to_format = FILES[name]
    config = config_from(save(tmp_path / "file.npz", to_format(flat)), image_size=image_size)
    trainer.train_and_evaluate(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    params = flatten_dict(jax.device_get(run.params), sep="/")
    assert params.keys() == flat.keys() and not np.array_equal(params["embedding/kernel"], flat["embedding/kernel"])
    names = [name for name, _ in visualize.draw_all(run, num_images=2)]
    assert {"patch_filters", "position_similarity", "attention_rollout", "attention_heads"} <= set(names)

    export.export_npz(run, tmp_path / "out.npz")
    images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_array_equal(vit_jax.load(tmp_path / "out.npz").logits(images), run.logits(images))
    export.export_stablehlo(run, tmp_path / "program")
    program = jax.export.deserialize(bytearray((tmp_path / "program/model.stablehlo").read_bytes()))
    inputs = np.random.default_rng(1).integers(0, 256, (3, image_size, image_size, 3)).astype(np.uint8)
    np.testing.assert_allclose(program.call(inputs), run.logits(inputs), atol=1e-4)
    with pytest.raises(UserError, match="unlike any ViTForImageClassification; give another --format"):
        export.export_safetensors(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_train_and_evaluate_with_zero_steps_keeps_pretrained_params(tmp_path):
    flat, to_format = FILES["hybrid, root only"]
    file = save(tmp_path / "file.npz", to_format(flat))
    trainer.train_and_evaluate(config_from(file, num_steps=0, warmup_steps=0, image_size=32), tmp_path / "run")
    params = flatten_dict(jax.device_get(load_run(tmp_path / "run").params), sep="/")
    assert params.keys() == flat.keys()
    for key, leaf in params.items():
        if not key.startswith("head/"):
            np.testing.assert_array_equal(leaf, flat[key], err_msg=key)


def test_resample_position_embeddings_without_class_token_interpolates_linearly():
    positions = np.array([0.0, 2.0, 4.0, 6.0], np.float32).reshape(1, 4, 1)
    new = pretrained.resample_position_embeddings(positions, (2, 2), (3, 3), class_token=False)
    np.testing.assert_allclose(new[0, :, 0], [0, 1, 2, 2, 3, 4, 4, 5, 6], atol=1e-6)


def test_create_params_accepts_and_load_rejects_checkpoint_without_head(tmp_path):
    flat = {key: leaf for key, leaf in original(pool="map").items() if not key.startswith("head/")}
    file = save(tmp_path / "file.npz", with_text_tower(big_vision(flat)))
    config = config_from(file, image_size=16)
    source = initialize.load_pretrained(config.pretrained)
    model = create_model(config, source, num_classes=10)
    params = initialize.create_params(model, source, image_size=16, seed=0)
    assert params["head"]["kernel"].shape == (24, 10)
    with pytest.raises(UserError, match="file.npz: it has no trained classification head; fine-tune it first"):
        vit_jax.load(file)
