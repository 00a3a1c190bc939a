"""Every format of Google's checkpoints: each, at micro width, gives its model's logits, and starts a run."""

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
    """Key -> random numbers, of the original layout, for 16-pixel pictures."""
    sizes = SIZES | sizes
    has_class_token = sizes.get("pool", "cls") == "cls"
    num_tokens = num_tokens or has_class_token + 16
    shapes = reference.released_shapes(
        **sizes, representation_size=representation_size, num_classes=CLASSES, num_tokens=num_tokens
    )
    rng = np.random.default_rng(0)
    return {key: rng.normal(scale=0.3, size=shape).astype(np.float32) for key, shape in shapes.items()}


def hybrid(**sizes):
    """Of 32-pixel pictures: the stem makes 4 × 4 places of them."""
    return original(**HYBRID | sizes)


def big_vision(flat):
    """The same numbers under big_vision's names."""
    names = {
        "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
        "LayerNorm_2": "LayerNorm_1",
        "MlpBlock_3": "MlpBlock_0",
    }
    renamed = {re.sub("|".join(names), lambda match: names[match[0]], key): leaf for key, leaf in flat.items()}
    positions = renamed.pop(POSITIONS)
    return renamed | {"pos_embedding": positions[:, 1:] if "cls" in flat else positions}


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


def inlined(flat):
    """The parts of the pooling head at the top, as they once lay."""
    return {key.removeprefix("MAPHead_0/"): leaf for key, leaf in flat.items()}


def with_axes(flat):
    """GroupNorm's vectors as [1 1 1 c]."""
    return {key: leaf[None, None, None] if re.search(r"gn\w+/", key) else leaf for key, leaf in flat.items()}


def in_adam(flat):
    return prefixed(flat, "opt/target/", **{"opt/state/step": np.int32(3), "epoch": np.int32(1)})


def in_state(flat):
    return prefixed(flat, "params/", **{"opt/0": np.zeros(2)})


def beside_text(flat):
    return prefixed(flat, "params/img/", **{"params/txt/head/bias": np.zeros(3), "params/t": np.zeros(1)})


def no_class_position(flat):
    """The class token joins after the positions were added."""
    flat[POSITIONS][:, 0] = 0
    return flat


# name -> (the numbers in the original layout, as the file has them)
FILES = {
    "original, 21k": (original(representation_size=12), lambda flat: flat),
    "original, 21k+1k, augreg": (original(), lambda flat: flat),
    "SAM": (original(), in_adam),
    "GSAM": (original(), lambda flat: prefixed(flat, "optimizer/target/")),
    "LiT": (original(), lambda flat: prefixed(flat, "img/", **{"txt/embedding": np.zeros(3), "t": np.zeros(1)})),
    "big_vision, class token": (no_class_position(original()), lambda flat: in_state(big_vision(flat))),
    "big_vision, bare, pre_logits": (no_class_position(original(representation_size=12)), big_vision),
    "big_vision, stacked": (no_class_position(original()), lambda flat: in_state(stacked(big_vision(flat)))),
    "big_vision, one of two towers": (no_class_position(original()), lambda flat: beside_text(big_vision(flat))),
    "big_vision, mean": (original(pool="mean"), lambda flat: in_state(big_vision(flat))),
    "big_vision, mean, pre_logits, stacked": (
        original(pool="mean", representation_size=12),
        lambda flat: in_state(stacked(big_vision(flat))),
    ),
    "big_vision, MAP": (original(pool="map"), lambda flat: beside_text(stacked(big_vision(flat)))),
    "big_vision, MAP, inlined": (original(pool="map"), lambda flat: inlined(big_vision(flat))),
    "mean in the original layout": (original(pool="mean"), lambda flat: flat),
    "hybrid": (hybrid(), with_axes),
    "hybrid, 21k": (hybrid(representation_size=12), with_axes),
    "hybrid, squeezed already": (hybrid(), lambda flat: flat),
    "hybrid, root alone": (hybrid(stem_units=(), patch_size=2), with_axes),
}


def write(path, flat):
    pretrained.save_npz(path, unflatten_dict(flat, sep="/"))
    return path


def pictures(flat):
    """Of the size that the positions are for."""
    return (
        np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
        if "conv_root/kernel" in flat
        else IMAGES
    )


@pytest.mark.parametrize("name", FILES)
def test_every_file_gives_its_models_logits(name, tmp_path):
    """Against a float64 pass over the original's numbers; its keys and no other are what is loaded."""
    flat, layout = FILES[name]
    model = vit_jax.load(write(tmp_path / "file.npz", layout(flat)))
    found = flatten_dict(model.params, sep="/")
    assert found.keys() == flat.keys()
    for key, leaf in flat.items():
        np.testing.assert_array_equal(found[key], leaf)
    images = pictures(flat)
    assert model.image_size == images.shape[1]
    wanted = reference.forward(unflatten_dict(flat, sep="/"), images / 127.5 - 1)
    np.testing.assert_allclose(model.logits(images), wanted, atol=2e-4)


@pytest.mark.parametrize("name", ["big_vision, MAP", "hybrid"])
def test_bfloat16_as_raw_bytes(name, tmp_path):
    flat, layout = FILES[name]
    params, _ = pretrained.read_model(str(write(tmp_path / "file.npz", as_void(layout(flat)))))
    for key, leaf in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(leaf, flat[key].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_bit_file_gives_its_models_logits(tmp_path):
    flat = reference_resnet.flat_params()
    images = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3)).astype(np.uint8)
    logits = vit_jax.load(write(tmp_path / "file.npz", flat)).logits(images)
    wanted = reference_resnet.forward(unflatten_dict(flat, sep="/"), images / 127.5 - 1)
    np.testing.assert_allclose(logits, wanted, atol=1e-3 * np.abs(wanted).max())


def test_positions_that_are_not_stored_are_computed(tmp_path):
    """Column 1, row 2 of a 2 × 4 … grid of 56-pixel patches, by hand: sin and cos of the column, then of the row."""
    flat = big_vision(original(pool="mean", patch_size=56))
    del flat["pos_embedding"]
    params, _ = pretrained.read_model(str(write(tmp_path / "file.npz", in_state(flat))))
    positions = flatten_dict(params, sep="/")[POSITIONS]
    assert positions.shape == (1, 16, 24)
    frequencies = [10_000 ** -(i / 5) for i in range(6)]
    waves = [f(place * w) for place, f in ((1, np.sin), (1, np.cos), (2, np.sin), (2, np.cos)) for w in frequencies]
    np.testing.assert_allclose(positions[0, 2 * 4 + 1], waves, atol=1e-6)


def test_positions_that_were_added_after_the_class_token_joined_keep_its_row(tmp_path):
    flat = original()
    file = {key: leaf for key, leaf in flat.items() if key != POSITIONS} | {"pos_embedding": flat[POSITIONS]}
    params, _ = pretrained.read_model(str(write(tmp_path / "file.npz", file)))
    np.testing.assert_array_equal(flatten_dict(params, sep="/")[POSITIONS], flat[POSITIONS])


def shapes(flat):
    return {key: leaf.shape for key, leaf in flat.items()}


def test_every_conversion_is_needed_by_some_file():
    """And none changes a file of the original layout."""
    needed = set()
    bare = big_vision(original(pool="mean"))
    del bare["pos_embedding"]
    for flat in [*(layout(flat) for flat, layout in FILES.values()), bare, reference_resnet.flat_params()]:
        for convert in CONVERSIONS:
            converted = convert(flat)
            if shapes(converted) != shapes(flat):
                needed.add(convert)
            flat = converted
    assert needed == set(CONVERSIONS)
    for flat in (original(), original(pool="mean"), original(pool="map")):
        assert all(shapes(convert(flat)) == shapes(flat) for convert in CONVERSIONS)


@pytest.mark.parametrize("name", ["big_vision, stacked", "big_vision, mean", "big_vision, MAP, inlined", "hybrid"])
def test_an_array_of_another_shape_is_one_line(name):
    """Whichever it is, a number in its place, or nothing of two axes, is no model and no traceback."""
    flat, layout = FILES[name]
    file = layout(flat)
    for key in file.keys() - {"opt/0"}:
        for other in (np.float32(1), np.zeros((0, 2), np.float32)):
            with pytest.raises(UserError) as caught:
                pretrained.ModelMetadata.from_params(
                    pretrained.to_original(unflatten_dict(file | {key: np.asarray(other)}, sep="/"))
                )
            assert "\n" not in str(caught.value)


def test_a_lost_class_token_is_not_taken_for_a_model_without_one():
    flat = {key: leaf for key, leaf in original().items() if key != "cls"}
    with pytest.raises(UserError, match="complete VisionTransformer: missing: cls"):
        pretrained.infer_sizes(unflatten_dict(flat, sep="/"))


def test_a_hybrid_that_is_not_whole_names_what_is_missing():
    flat = {key: leaf for key, leaf in hybrid().items() if "block2/unit1/gn_proj" not in key}
    with pytest.raises(UserError, match="missing: block2/unit1/gn_proj/bias, block2/unit1/gn_proj/scale"):
        pretrained.infer_sizes(unflatten_dict(flat, sep="/"))


@pytest.mark.parametrize("pool", models.POOLS)
def test_the_tree_of_a_model_is_its_files_key_list(pool):
    sizes = HYBRID | {"pool": pool}
    model = models.VisionTransformer(CLASSES, **sizes, representation_size=12)
    tree = jax.eval_shape(lambda: model.init(jax.random.PRNGKey(0), jnp.zeros((1, 32, 32, 3))))["params"]
    wanted = reference.released_shapes(
        **sizes, representation_size=12, num_classes=CLASSES, num_tokens=16 + (pool == "cls")
    )
    assert {key: leaf.shape for key, leaf in flatten_dict(tree, sep="/").items()} == wanted


def config_from(file, **changes):
    config = digits.get_config()
    config.model = {}
    config.update(pretrained=str(file), num_steps=3, warmup_steps=1, eval_every_steps=3, checkpoint_every_steps=3)
    config.update(dict(batch_size=16) | changes)
    config.dataset.update(train_split="train[:64]", test_split="test[:32]")
    return config


@pytest.mark.parametrize(("name", "image_size"), [("hybrid, root alone", 16), ("big_vision, MAP", 32)])
def test_a_run_starts_from_one_and_is_looked_into_and_handed_on(name, image_size, tmp_path):
    """Positions are resampled; what is drawn, exported and loaded again is the trained model."""
    flat, layout = FILES[name]
    config = config_from(write(tmp_path / "file.npz", layout(flat)), image_size=image_size)
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
    small = np.random.default_rng(1).integers(0, 256, (3, image_size, image_size, 3)).astype(np.uint8)
    np.testing.assert_allclose(program.call(small), run.logits(small), atol=1e-4)
    with pytest.raises(UserError, match="unlike any ViTForImageClassification; give another --format"):
        export.export_safetensors(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_step_a_run_is_its_file(tmp_path):
    flat, layout = FILES["hybrid, root alone"]
    file = write(tmp_path / "file.npz", layout(flat))
    trainer.train_and_evaluate(config_from(file, num_steps=0, warmup_steps=0, image_size=32), tmp_path / "run")
    params = flatten_dict(jax.device_get(load_run(tmp_path / "run").params), sep="/")
    assert params.keys() == flat.keys()
    for key, leaf in params.items():
        if not key.startswith("head/"):
            np.testing.assert_array_equal(leaf, flat[key], err_msg=key)


def test_positions_without_a_class_token_are_resampled_like_the_others():
    """A 2 × 2 grid of one number each to 3 × 3: means between."""
    positions = np.array([0.0, 2.0, 4.0, 6.0], np.float32).reshape(1, 4, 1)
    new = pretrained.resample_position_embeddings(positions, (2, 2), (3, 3), class_token=False)
    np.testing.assert_allclose(new[0, :, 0], [0, 1, 2, 2, 3, 4, 4, 5, 6], atol=1e-6)


def test_a_file_without_a_head_starts_a_run_and_answers_nothing(tmp_path):
    flat = {key: leaf for key, leaf in original(pool="map").items() if not key.startswith("head/")}
    file = write(tmp_path / "file.npz", beside_text(big_vision(flat)))
    config = config_from(file, image_size=16)
    source = initialize.load_pretrained(config.pretrained)
    model = create_model(config, source, num_classes=10)
    params = initialize.create_params(model, source, image_size=16, seed=0)
    assert params["head"]["kernel"].shape == (24, 10)
    with pytest.raises(UserError, match="file.npz: it has no trained classification head; fine-tune it first"):
        vit_jax.load(file)
