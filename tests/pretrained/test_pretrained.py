import contextlib
import importlib.resources
import io
import json
import os
import pathlib
import tracemalloc
import urllib.parse
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.ndimage
from flax.traverse_util import flatten_dict, unflatten_dict
from test_download import serve

from vit_jax import pretrained
from vit_jax.runtime import download
from vit_jax.runtime.errors import UsageError, UserError

MICRO = {"patch_size": 4, "hidden_size": 6, "num_layers": 3, "num_heads": 2, "mlp_dim": 8}
POSITIONS = "Transformer/posembed_input/pos_embedding"
QUERY = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"


def flat_params(*, representation_size=None, num_classes=5, num_tokens=5, seed=0, **sizes):
    """A micro ViT of random numbers: joined key -> array."""
    shapes = reference.released_shapes(
        **MICRO | sizes, representation_size=representation_size, num_classes=num_classes, num_tokens=num_tokens
    )
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def nest(flat):
    return unflatten_dict(flat, sep="/")


def adapt(source, target, **kwargs):
    """Adapts flat dictionaries."""
    params, report = pretrained.adapt_params(nest(source), nest(target), **kwargs)
    return flatten_dict(params, sep="/"), report


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.npz"


# ---- load_npz, save_npz


def test_load_npz_nests_the_keys_of_a_file_by_numpy(path):
    np.savez(path, **{"cls": np.zeros(2), "head/bias": np.ones(3), "head/kernel": np.ones((2, 3))})
    params = pretrained.load_npz(path)
    assert set(params) == {"cls", "head"}
    assert set(params["head"]) == {"bias", "kernel"}
    np.testing.assert_array_equal(params["head"]["bias"], [1, 1, 1])


def test_load_npz_reads_compressed_files(path):
    np.savez_compressed(path, cls=np.arange(3.0))
    np.testing.assert_array_equal(pretrained.load_npz(path)["cls"], [0, 1, 2])


def test_round_trip_is_bit_equal(path):
    flat = flat_params(representation_size=4)
    flat["head/bias"] = np.array([np.nan, -0.0, np.inf, 1e-45, 1], np.float32)
    flat["embedding/kernel"] = np.asfortranarray(flat["embedding/kernel"])
    pretrained.save_npz(path, nest(flat))
    loaded = flatten_dict(pretrained.load_npz(path), sep="/")
    assert list(loaded) == list(flat)
    for key, leaf in flat.items():
        assert loaded[key].dtype == leaf.dtype and loaded[key].shape == leaf.shape
        assert loaded[key].tobytes() == leaf.tobytes()


def test_round_trip_keeps_dtypes_and_scalars(path):
    flat = {"step": np.int64(7), "half": np.array([0.5], np.float16), "empty": np.zeros((0, 3))}
    pretrained.save_npz(path, flat)
    loaded = pretrained.load_npz(path)
    assert {key: (leaf.dtype.name, leaf.shape) for key, leaf in loaded.items()} == {
        "step": ("int64", ()),
        "half": ("float16", (1,)),
        "empty": ("float64", (0, 3)),
    }


def test_round_trip_of_bfloat16_comes_back_as_float32(path):
    pretrained.save_npz(path, {"cls": jnp.array([[1.5, -2.0, 3e38]], jnp.bfloat16)})
    loaded = pretrained.load_npz(path)["cls"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, np.array([[1.5, -2.0, jnp.bfloat16(3e38)]], np.float32))


def test_save_npz_writes_the_bytes_of_numpy_savez(path, tmp_path):
    flat = flat_params()
    np.savez(tmp_path / "numpy.npz", **flat)
    pretrained.save_npz(path, jax.tree.map(jnp.asarray, nest(flat)))
    pretrained.save_npz(tmp_path / "again.npz", nest(dict(sorted(flat.items()))))
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes()  # JAX sorts keys
    pretrained.save_npz(path, nest(flat))
    assert path.read_bytes() == (tmp_path / "numpy.npz").read_bytes()


def test_save_npz_of_the_released_layout_has_the_released_size(path):
    shapes = reference.released_shapes(**reference.B_16, representation_size=768, num_classes=21843, num_tokens=197)
    pretrained.save_npz(path, nest({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}))
    assert path.stat().st_size == 412_815_506
    path.unlink()


def test_save_npz_leaves_nothing_beside_and_the_old_file_after_a_failure(path, tmp_path):
    pretrained.save_npz(path, {"cls": np.zeros(2)})
    with pytest.raises(ValueError, match="Object arrays"):
        pretrained.save_npz(path, {"cls": np.ones(2), "head": np.array([None])})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    np.testing.assert_array_equal(pretrained.load_npz(path)["cls"], [0, 0])


def test_save_npz_refuses_a_missing_folder(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*/nowhere/params.npz: No such file or directory"):
        pretrained.save_npz(tmp_path / "nowhere" / "params.npz", {"cls": np.zeros(2)})


def many_class_names():
    """As many as ImageNet-21k has, longer than its own, some of them not ASCII."""
    return [f"{i:05}: a rather long name of a class, with a synonym or two, and more: é, 中" for i in range(21_843)]


def metadata_with(class_names):
    return pretrained.ModelMetadata(
        "vit", {**MICRO, "num_classes": len(class_names)}, image_size=8, class_names=tuple(class_names)
    )


@pytest.mark.parametrize("num_names", [0, 1, 800, 21_843])
def test_save_npz_keeps_metadata_of_any_length_out_of_the_arrays(path, num_names):
    flat, metadata = flat_params(), metadata_with(many_class_names()[:num_names])
    pretrained.save_npz(path, nest(flat), metadata)
    assert pretrained.read_metadata(path) == metadata
    assert zipfile.ZipFile(path).testzip() is None
    assert list(np.load(path).files) == list(flat)
    assert list(flatten_dict(pretrained.load_npz(path), sep="/")) == list(flat)
    for key, leaf in flat.items():
        np.testing.assert_array_equal(np.load(path)[key], leaf)
    again = path.with_name("again.npz")
    pretrained.save_npz(again, nest(flat), metadata)
    assert again.read_bytes() == path.read_bytes()


def test_save_npz_keeps_short_metadata_in_the_comment_of_the_archive(path):
    metadata = metadata_with(["cat", "dog"])
    pretrained.save_npz(path, nest(flat_params()), metadata)
    value = json.loads(zipfile.ZipFile(path).comment)
    assert value.keys() == {"crc32", "metadata"} and value["metadata"] == metadata.to_json()


def test_save_npz_refuses_metadata_that_its_comments_cannot_hold(path):
    pretrained.save_npz(path, {"cls": np.zeros(2)}, metadata_with(["x" * 130_000]))
    with pytest.raises(UserError, match="the metadata has 132,[0-9]* bytes; expected at most 131,070"):
        pretrained.save_npz(path, {"cls": np.zeros(2)}, metadata_with(["x" * 132_000]))
    assert len(pretrained.read_metadata(path).class_names[0]) == 130_000


@pytest.mark.parametrize("place", [b'["00000', b'"21842'])
def test_read_metadata_refuses_damaged_metadata(path, place):
    pretrained.save_npz(path, nest(flat_params()), metadata_with(many_class_names()))
    content = path.read_bytes()
    assert content.count(place) == 1
    path.write_bytes(content.replace(place, b"\x00" * len(place)))
    with pytest.raises(UserError, match="params.npz has damaged metadata: .*; export or copy it again"):
        pretrained.read_metadata(path)


def test_read_metadata_notices_every_flipped_bit(path):
    metadata = metadata_with(["cat", "dog"])
    pretrained.save_npz(path, {"cls": np.zeros(2)}, metadata)
    content = path.read_bytes()
    start = content.index(b'{"crc32"')
    for bit in range(8 * start, 8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match="params.npz has damaged metadata"):
            pretrained.read_metadata(path)


@pytest.mark.parametrize("comment", [b"", b"written by another tool", b"[1]", b"\xff{"])
def test_read_metadata_is_none_for_the_comments_of_other_tools(path, comment):
    pretrained.save_npz(path, nest(flat_params()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment
    assert pretrained.read_metadata(path) is None


def refusal(path):
    """The message of the error: one line that names the file."""
    with pytest.raises(UserError) as caught:
        pretrained.load_npz(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_load_npz_says_that_a_file_is_missing(path):
    assert "does not exist; check the path" in refusal(path)


def test_load_npz_says_that_a_path_is_a_folder(tmp_path):
    assert "is a folder; give the path of the .npz file" in refusal(tmp_path)


def test_load_npz_says_that_a_file_may_not_be_read(path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "open", refuse)  # a real one does not stop root
    assert "cannot be read: Permission denied" in refusal(path)


def test_load_npz_says_that_a_file_is_empty(path):
    path.touch()
    assert "is empty; download or copy it again" in refusal(path)


@pytest.mark.parametrize("start", [b"<!DOCTYPE html><html>", b"\n <HTML>", b"<?xml version='1.0'?><Error>NoSuchKey"])
def test_load_npz_says_that_a_file_is_a_web_page(path, start):
    path.write_bytes(start)
    assert "is not an .npz file but an HTML page" in refusal(path)


@pytest.mark.parametrize("content", [b"\x80\x04\x95pickle", b"\x93NUMPY\x01\x00", b"x"])
def test_load_npz_says_that_a_file_is_no_npz(path, content):
    path.write_bytes(content)
    assert "is not an .npz file; expected a ZIP archive of arrays" in refusal(path)


def test_load_npz_says_that_a_zip_holds_other_things(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "text")
    assert "its member word/document.xml is not an array" in refusal(path)


def test_load_npz_says_that_an_archive_is_empty(path):
    np.savez(path)
    assert "holds no arrays" in refusal(path)


@pytest.mark.parametrize("num_bytes", [4, 100, 1000, -1])
def test_load_npz_says_that_a_file_is_truncated(path, num_bytes):
    pretrained.save_npz(path, nest(flat_params()))
    path.write_bytes(path.read_bytes()[:num_bytes])
    message = refusal(path)
    assert "is truncated or damaged: the directory that ends an .npz file is not to be found in its " in message
    assert f"its {path.stat().st_size:,} bytes; download or copy it again" in message


def test_load_npz_says_where_a_file_is_damaged(path):
    pretrained.save_npz(path, {"cls": np.zeros(100), "embedding": {"bias": np.full(100, 7.0)}})
    content = path.read_bytes()
    path.write_bytes(content.replace(np.full(50, 7.0).tobytes(), np.full(50, 8.0).tobytes(), 1))
    assert "is damaged at embedding/bias.npy: Bad CRC-32" in refusal(path)


def test_load_npz_sees_a_damaged_header_that_makes_an_array_shorter(path):
    pretrained.save_npz(path, {"cls": np.zeros(96, np.float32)})
    path.write_bytes(path.read_bytes().replace(b"'shape': (96,)", b"'shape': (32,)", 1))
    assert "is damaged at cls.npy" in refusal(path)


def test_load_npz_never_unpickles(path):
    ran = []

    class Trap:
        def __reduce__(self):
            return ran.append, (1,)

    np.savez(path, cls=np.array([Trap()], object))
    assert "cls.npy holds Python objects, and nothing is unpickled here" in refusal(path)
    assert not ran


@pytest.mark.parametrize("shape", [(10**15,), (10**9, 3), (-24,), (-4, -6), (2**32, 2**32, 4)])
def test_load_npz_takes_no_memory_for_what_a_header_only_promises(path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", header.getvalue() + bytes(96))
    tracemalloc.start()
    assert "is damaged at cls.npy: an array" in refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_load_npz_unpacks_no_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("cls.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (300 << 20,)})
        for _ in range(300):
            member.write(bytes(1 << 20))
    assert "would unpack to 314,572,928: parameters do not compress so well" in refusal(path)


@pytest.mark.parametrize(
    "array", [np.array("1.0"), np.zeros(2, "M8[s]"), np.ones(2, complex), np.zeros(2, [("a", "f4")]), np.zeros(2, "V4")]
)
def test_load_npz_refuses_what_are_no_numbers(path, array):
    np.savez(path, cls=array)
    assert f"cls.npy holds {array.dtype}; expected real numbers" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_load_npz_refuses_a_key_that_is_there_twice(path):
    np.savez(path, cls=np.zeros(2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("cls.npy", b"")
    assert "holds cls.npy more than once" in refusal(path)


def test_load_npz_names_a_member_that_no_decompressor_can_read(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cls.npy", bytes(2000))
    content = bytearray(path.read_bytes())
    content[45:60] = b"\xff" * 15
    path.write_bytes(content)
    assert "is damaged at cls.npy" in refusal(path)


def test_load_npz_does_not_wait_for_a_pipe(path):
    os.mkfifo(path)
    assert "is no regular file" in refusal(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_read_model_refuses_numbers_that_float32_cannot_hold(path, value):
    flat = flat_params()
    flat["head/bias"] = np.full(5, value)
    pretrained.save_npz(path, nest(flat))
    with pytest.raises(UserError, match="params.npz: head/bias holds numbers that float32 cannot"):
        pretrained.read_model(str(path))


def test_load_npz_says_which_keys_are_at_odds(path):
    np.savez(path, **{"a/b/c": np.zeros(1), "a": np.zeros(1)})
    assert "holds both a and a/b/c" in refusal(path)


# ---- infer_architecture


@pytest.mark.parametrize("representation_size", [None, 4])
def test_infer_architecture_reads_the_sizes_off_the_shapes(representation_size):
    params = nest(flat_params(representation_size=representation_size))
    expected = {**MICRO, "representation_size": representation_size, "num_classes": 5}
    assert pretrained.infer_architecture(params) == expected
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    assert pretrained.infer_architecture(abstract) == expected


def not_inferred(flat):
    with pytest.raises(UserError) as caught:
        pretrained.infer_architecture(nest(flat))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("key", flat_params(representation_size=4))
def test_infer_architecture_names_a_missing_key(key):
    flat = flat_params(representation_size=4)
    del flat[key]
    message = not_inferred(flat)
    assert "this is not a whole ViT: " in message
    assert f"missing: {key}" in message or f"{key} is missing" in message


def test_infer_architecture_names_a_missing_block():
    flat = {key: leaf for key, leaf in flat_params().items() if "encoderblock_1/" not in key}
    message = not_inferred(flat)
    assert "missing: Transformer/encoderblock_1/LayerNorm_0/scale" in message and "and 13 more" in message


def test_infer_architecture_names_a_block_of_another_shape():
    message = not_inferred({**flat_params(), QUERY: np.zeros((6, 3, 2))})
    assert f"of another shape: {QUERY} (6, 3, 2) instead of (6, 2, 3)" in message


def test_infer_architecture_names_an_unexpected_key():
    assert "unexpected: extra/scale" in not_inferred({**flat_params(), "extra/scale": np.zeros(6)})


def test_infer_architecture_wants_heads_that_divide_the_width():
    message = not_inferred(flat_params(num_heads=4))
    assert message == "this is not a whole ViT: its width, 6, does not divide into 4 heads"


@pytest.mark.parametrize(
    ("key", "shape"), [("embedding/kernel", (48, 6)), ("head/kernel", (1, 1, 6, 5)), (POSITIONS, (5, 6))]
)
def test_infer_architecture_wants_the_right_number_of_axes(key, shape):
    message = not_inferred({**flat_params(), key: np.zeros(shape)})
    assert f"{key} is of shape {shape}" in message


FOREIGN = {
    "its parameters lie below params/; pretrained.read_model, or to_original, takes them out": {
        f"params/{key}": leaf for key, leaf in flat_params().items()
    },
    "its parameters lie below opt/": {f"opt/target/{key}": leaf for key, leaf in flat_params().items()},
    "ResNet (BiT)": {"resnet/root_block/standardized_conv2d/kernel": np.zeros(1)},
    "not a ViT file, for it holds layer1/weight; give a ViT": {"layer1/weight": np.zeros(1)},
    "not a ViT file, for it holds nothing": {},
}


@pytest.mark.parametrize("cause", FOREIGN)
def test_infer_architecture_recognises_other_files(cause):
    assert cause in not_inferred(FOREIGN[cause])


# ---- adapt_params


def test_adapt_params_keeps_the_target_head_and_loads_the_rest():
    source, target = flat_params(representation_size=4, num_classes=9), flat_params(seed=1)
    params, report = adapt(source, target)
    assert list(params) == list(target)
    for key, leaf in params.items():
        expected = target if key.startswith("head/") else source
        assert leaf.dtype == np.float32 and isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, expected[key])
    assert report.new == ("head/kernel", "head/bias")
    assert report.dropped == ("pre_logits/kernel", "pre_logits/bias", "head/kernel", "head/bias")
    assert report.resampled == ()
    assert set(report.loaded) == set(target) - set(report.new)


def test_adapt_params_reads_values_of_new_leaves_only():
    source, target = flat_params(), flat_params(seed=1)
    abstract = {
        key: leaf if key.startswith("head/") else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for key, leaf in target.items()
    }
    params, _ = adapt(source, abstract)
    np.testing.assert_array_equal(params["head/bias"], target["head/bias"])


def test_adapt_params_keeps_the_head_of_the_file():
    source = flat_params()
    params, report = adapt(source, flat_params(seed=1), keep_head=True)
    assert report.new == report.dropped == ()
    for key, leaf in source.items():
        assert params[key].tobytes() == leaf.tobytes()


def test_adapt_params_keeps_pre_logits_that_the_model_has():
    source = flat_params(representation_size=4)
    params, report = adapt(source, flat_params(representation_size=4, seed=1))
    np.testing.assert_array_equal(params["pre_logits/kernel"], source["pre_logits/kernel"])
    assert report.dropped == ("head/kernel", "head/bias")


def test_adapt_params_takes_a_file_without_head():
    source = {key: leaf for key, leaf in flat_params().items() if not key.startswith("head/")}
    _, report = adapt(source, flat_params(seed=1))
    assert report.new == ("head/kernel", "head/bias") and report.dropped == ()


def test_adapt_params_returns_arrays_of_its_own():
    source, target = flat_params(), flat_params(seed=1)
    params, _ = adapt(source, target)
    for key, leaf in params.items():
        assert not np.shares_memory(leaf, source[key]) and not np.shares_memory(leaf, target[key])
        leaf += 1  # writable


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_adapt_params_casts_to_float32(dtype):
    source = {key: np.ones_like(leaf, dtype) for key, leaf in flat_params().items()}
    params, _ = adapt(source, flat_params())
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}
    assert not np.any(params["cls"] - 1)


def test_adapt_params_reads_bfloat16_that_numpy_stored_as_raw_bytes():
    source = {key: np.full(leaf.shape, 1.5, jnp.bfloat16).view("V2") for key, leaf in flat_params().items()}
    params, _ = adapt(source, flat_params())
    assert not np.any(params["cls"] - 1.5)


def test_adapt_params_resamples_position_embeddings():
    source, target = flat_params(num_tokens=1 + 4), flat_params(num_tokens=1 + 9)
    params, report = adapt(source, target)
    expected = pretrained.resample_position_embeddings(source[POSITIONS], (2, 2), (3, 3))
    np.testing.assert_array_equal(params[POSITIONS], expected)
    assert report.resampled == (POSITIONS,)
    assert (report.old_grid, report.new_grid) == ((2, 2), (3, 3))
    assert POSITIONS not in report.loaded


def test_adapt_params_resamples_between_grids_of_equal_count():
    source, target = flat_params(num_tokens=1 + 16), flat_params(num_tokens=1 + 16)
    params, report = adapt(source, target, grid=(2, 8))
    assert report.resampled == (POSITIONS,)
    expected = pretrained.resample_position_embeddings(source[POSITIONS], (4, 4), (2, 8))
    np.testing.assert_array_equal(params[POSITIONS], expected)


def test_adapt_params_loads_position_embeddings_of_the_same_oblong_grid():
    source = flat_params(num_tokens=1 + 6)
    params, report = adapt(source, flat_params(num_tokens=1 + 6), grid=(2, 3), pretrained_grid=(2, 3))
    assert report.resampled == ()
    np.testing.assert_array_equal(params[POSITIONS], source[POSITIONS])


def test_adapt_params_asks_for_the_grid_of_an_oblong_model():
    with pytest.raises(ValueError, match=r"6 patches, which is not a square; give grid=\(rows, columns\)"):
        adapt(flat_params(), flat_params(num_tokens=1 + 6))


def test_adapt_params_asks_for_the_grid_of_an_oblong_file():
    with pytest.raises(UserError, match=r"6 patches, which is not a square; give pretrained_grid=\(rows, columns\)"):
        adapt(flat_params(num_tokens=1 + 6), flat_params())


def test_adapt_params_refuses_a_grid_that_does_not_match():
    with pytest.raises(UserError, match="grid is 2 × 3, but the position embeddings are of 4 patches"):
        adapt(flat_params(), flat_params(), grid=(2, 3))


def not_adapted(source, target, **kwargs):
    with pytest.raises(UserError) as caught:
        adapt(source, target, **kwargs)
    message = str(caught.value)
    assert message.startswith("the file's parameters do not fit the model: ") and "\n" not in message
    return message


def test_adapt_params_names_missing_keys():
    source = {key: leaf for key, leaf in flat_params().items() if "encoder_norm" not in key}
    message = not_adapted(source, flat_params())
    assert message.endswith("missing: Transformer/encoder_norm/scale, Transformer/encoder_norm/bias")


def test_adapt_params_names_unexpected_keys():
    message = not_adapted({**flat_params(), "extra/bias": np.zeros(1)}, flat_params())
    assert message.endswith("unexpected: extra/bias")


def test_adapt_params_names_keys_of_another_shape():
    message = not_adapted({**flat_params(), QUERY: np.zeros((6, 3, 2))}, flat_params())
    assert message.endswith(f"of another shape: {QUERY} (6, 3, 2) instead of (6, 2, 3)")


def test_adapt_params_wants_the_pre_logits_that_the_model_has():
    assert "missing: pre_logits/kernel, pre_logits/bias" in not_adapted(
        flat_params(), flat_params(representation_size=4)
    )


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        ({"patch_size": 8}, "patch is 8 in the file, 4 in the model"),
        ({"hidden_size": 8}, "hidden_size is 8 in the file, 6 in the model"),
        ({"num_layers": 5}, "num_layers is 5 in the file, 3 in the model"),
        ({"num_layers": 2}, "num_layers is 2 in the file, 3 in the model"),
        ({"num_heads": 3}, "num_heads is 3 in the file, 2 in the model"),
        ({"mlp_dim": 9}, "mlp_dim is 9 in the file, 8 in the model"),
    ],
)
def test_adapt_params_names_the_sizes_of_another_variant(other, cause):
    message = not_adapted(flat_params(**other), flat_params())
    assert f"{cause}: another variant; " in message


def test_adapt_params_names_several_sizes_and_the_first_keys():
    message = not_adapted(flat_params(patch_size=8, num_layers=5), flat_params())
    assert "num_layers is 5 in the file, 3 in the model, patch is 8 in the file, 4 in the model" in message
    assert "embedding/kernel (8, 8, 3, 6) instead of (4, 4, 3, 6)" in message
    assert "Transformer/encoderblock_3/LayerNorm_0/scale" in message and "and 29 more" in message


def test_adapt_params_wants_a_kept_head_to_fit():
    message = not_adapted(flat_params(num_classes=9), flat_params(), keep_head=True)
    assert "num_classes is 9 in the file, 5 in the model" in message
    assert "head/kernel (6, 9) instead of (6, 5)" in message


def test_adapt_params_wants_a_kept_head_to_be_there():
    source = {key: leaf for key, leaf in flat_params().items() if not key.startswith("head/")}
    assert "missing: head/kernel, head/bias" in not_adapted(source, flat_params(), keep_head=True)


@pytest.mark.parametrize("cause", FOREIGN)
def test_adapt_params_recognises_other_files(cause):
    assert cause in not_adapted(FOREIGN[cause], flat_params())


def test_report_prints_a_line_for_each_group():
    source = flat_params(representation_size=4, num_classes=9)
    _, report = adapt(source, flat_params(num_tokens=1 + 9))
    assert str(report).splitlines() == [
        "loaded     cls                                          1 array              6",
        "           embedding/…                                  2 arrays           294",
        "           Transformer/encoderblock_{0..2}/…           48 arrays           906",
        "           Transformer/encoder_norm/…                   2 arrays            12",
        "resampled  Transformer/posembed_input/pos_embedding     1 array             60",
        "new        head/…                                       2 arrays            35",
        "dropped    pre_logits/…                                 2 arrays            28",
        "           head/…                                       2 arrays            45",
        "position embeddings: 2 × 2 → 3 × 3 patches",
    ]


# ---- resample_position_embeddings


def resample(values, grid, new_grid):
    """One number a position, class token first."""
    embeddings = np.array(values, np.float32).reshape(1, -1, 1)
    return pretrained.resample_position_embeddings(embeddings, grid, new_grid).ravel().tolist()


def test_resampling_two_by_two_to_three_by_three_puts_means_between():
    assert resample([9, 0, 2, 4, 6], (2, 2), (3, 3)) == [9, 0, 1, 2, 2, 3, 4, 4, 5, 6]


def test_resampling_down_keeps_the_corners():
    assert resample([9, 0, 1, 2, 3, 4, 5, 6, 7, 8], (3, 3), (2, 2)) == [9, 0, 2, 6, 8]


def test_resampling_treats_rows_and_columns_apart():
    assert resample([9, 0, 2, 10, 12], (2, 2), (2, 3)) == [9, 0, 1, 2, 10, 11, 12]
    assert resample([9, 0, 2, 10, 12], (2, 2), (3, 2)) == [9, 0, 2, 5, 7, 10, 12]


def test_resampling_to_the_same_grid_changes_nothing():
    assert resample([9, 1, 2, 3, 4, 5, 6], (2, 3), (2, 3)) == [9, 1, 2, 3, 4, 5, 6]


def test_resampling_keeps_the_width_and_the_dtype():
    embeddings = np.random.default_rng(0).standard_normal((1, 1 + 196, 7)).astype(np.float32)
    new = pretrained.resample_position_embeddings(embeddings, (14, 14), (24, 24))
    assert new.shape == (1, 577, 7) and new.dtype == np.float32
    np.testing.assert_array_equal(new[:, 0], embeddings[:, 0])
    zoomed = scipy.ndimage.zoom(embeddings[0, 1:].reshape(14, 14, 7), (24 / 14, 24 / 14, 1), order=1)
    np.testing.assert_array_equal(new[0, 1:], zoomed.reshape(576, 7))


def test_resampling_gives_every_wanted_grid_exactly():
    """Ones stay ones: for some pairs, 28 → 14 among them, scipy's default rounds past the edge and fills in zeros."""
    for old in range(1, 33):
        for new in range(1, 33):
            ones = np.ones((1, 1 + old, 1), np.float32)
            resampled = pretrained.resample_position_embeddings(ones, (old, 1), (new, 1))
            assert resampled.shape == (1, 1 + new, 1)
            np.testing.assert_allclose(resampled, 1, rtol=1e-6)


def test_resampling_refuses_a_grid_of_another_count():
    with pytest.raises(UserError, match="grid is 2 × 2, but the position embeddings are of 6 patches"):
        resample([9, 1, 2, 3, 4, 5, 6], (2, 2), (3, 3))


# ---- resolve


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Catches what would be downloaded; `fetched["params"]` is then checked as the downloaded file."""
    calls = {}

    def fetch(url, path, *, num_bytes=None, sha256=None, check=None):
        calls.update(url=url, path=path, num_bytes=num_bytes)
        if "params" in calls:
            part = tmp_path / "fetched.part"
            pretrained.save_npz(part, nest(calls["params"]))
            check(part)
        return path

    monkeypatch.setattr(download, "fetch", fetch)
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    return calls


def test_resolve_fetches_a_released_file_into_the_cache(fetched, tmp_path):
    assert pretrained.resolve("imagenet21k/ViT-B_16") == tmp_path / "cache" / "imagenet21k" / "ViT-B_16.npz"
    assert fetched["url"] == "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz"
    assert fetched["num_bytes"] == 412_815_506


@pytest.mark.parametrize("name", pretrained.RELEASED)
def test_resolve_quotes_the_address(fetched, name):
    pretrained.resolve(name)
    assert "+" not in fetched["url"]
    address = urllib.parse.unquote(fetched["url"]).removeprefix("https://storage.googleapis.com/")
    assert address == f"{'' if name.startswith(('bit_models/', 'big_vision/')) else 'vit_models/'}{name}.npz"


def thin_params(**sizes):
    """A whole ViT with the width and depth of B/16, all else as small as can be."""
    arguments = {"patch_size": 16, "hidden_size": 768, "num_layers": 12, "num_heads": 1, "mlp_dim": 1} | sizes
    shapes = reference.released_shapes(**arguments, representation_size=None, num_classes=1, num_tokens=2)
    return {key: np.zeros(shape, np.int8) for key, shape in shapes.items()}


def test_resolve_accepts_the_variant_of_the_name(fetched):
    fetched["params"] = thin_params()
    assert pretrained.resolve("imagenet21k/ViT-B_16")


@pytest.mark.parametrize(
    ("sizes", "cause"),
    [
        ({"patch_size": 32}, "patch_size 32 instead of 16"),
        ({"hidden_size": 192}, "hidden_size 192 instead of 768"),
        ({"num_layers": 11}, "num_layers 11 instead of 12"),
    ],
)
def test_resolve_refuses_another_variant_than_the_name(fetched, sizes, cause):
    fetched["params"] = thin_params(**sizes)
    with pytest.raises(UserError, match=f"the file is not imagenet21k/ViT-B_16: {cause}"):
        pretrained.resolve("imagenet21k/ViT-B_16")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("imagenet21k+imagenet2012/ViT-L_16-224", {"hidden_size": 1024, "num_layers": 24}),
        ("imagenet21k/ViT-H_14", {"hidden_size": 1280, "num_layers": 32, "patch_size": 14}),
        ("sam/ViT-S_32", {"hidden_size": 384, "patch_size": 32}),
        ("imagenet21k/R50+ViT-B_16", {"patch_size": 1, "stem_units": (3, 4, 9), "stem_width": 32}),
        ("imagenet21k/R26+ViT-B_32", {"patch_size": 1, "stem_units": (2, 2, 2, 2), "stem_width": 32}),
        ("augreg/B_8-i21k-300ep", {"patch_size": 8}),
        ("augreg/R_Ti_16-i21k-300ep", {"hidden_size": 192, "patch_size": 8, "stem_units": (), "stem_width": 32}),
        ("augreg/of-another-form", {"num_layers": 1}),
    ],
)
def test_resolve_knows_the_sizes_of_every_kind_of_name(fetched, name, sizes):
    fetched["params"] = thin_params(**sizes)
    assert pretrained.resolve(name)


def test_resolve_refuses_another_hybrid_than_the_name(fetched):
    fetched["params"] = thin_params(patch_size=1, stem_units=(3, 4, 6, 3), stem_width=32)
    with pytest.raises(
        UserError, match=r"is not imagenet21k/R50\+ViT-B_16: stem_units \(3, 4, 6, 3\) instead of \(3, 4, 9"
    ):
        pretrained.resolve("imagenet21k/R50+ViT-B_16")


INDEX = """name,ds,lr,aug,wd,do,sd,best_val,final_val,final_test,adapt_ds,adapt_final_val,params,filename,adapt_filename
B/16,i21k,0.001,none,0.1,0.0,0.0,0.49,0.44,0.43,cifar100,0.9,86,B_16-i21k-a,B_16-i21k-a--cifar100
B/16,i21k,0.001,light1,0.1,0.0,0.0,0.48,0.4650,0.45,cifar100,0.9,86,B_16-i21k-b,B_16-i21k-b--cifar100
B/16,i21k,0.001,light1,0.1,0.0,0.0,0.48,0.4650,0.45,pets,0.99,86,B_16-i21k-b,B_16-i21k-b--pets
B/16,i1k,0.001,none,0.1,0.0,0.0,0.8,0.79,0.78,pets,0.9,86,B_16-i1k-c,B_16-i1k-c--pets
R26+S/32,i21k,0.001,none,0.1,0.0,0.0,0.6,0.55,0.5,pets,0.9,36,R26_S_32-i21k-d,R26_S_32-i21k-d--pets
"""


@pytest.fixture
def mirror(monkeypatch, tmp_path):
    """`with mirror(content, …) as server`: what the server answers, one after the other."""

    @contextlib.contextmanager
    def answer(*contents):
        monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
        with serve(*({"content": content} for content in contents)) as server:
            monkeypatch.setenv("VIT_JAX_MIRROR", server.url.removesuffix("/file.bin"))
            yield server

    return answer


def test_resolve_takes_the_best_augreg_file_of_a_variant(mirror, tmp_path, capsys):
    """By final accuracy in validation, of those that saw ImageNet-21k; the index is fetched once."""
    pretrained.save_npz(tmp_path / "thin.npz", nest(thin_params()))
    content = (tmp_path / "thin.npz").read_bytes()
    with mirror(INDEX.encode(), content) as server:
        assert pretrained.resolve("augreg/B_16") == tmp_path / "cache/augreg/B_16-i21k-b.npz"
        assert pretrained.resolve("augreg/B_16-i21k-b").read_bytes() == content
        assert pretrained.resolve("augreg/B_16").exists()
    bucket = "/storage.googleapis.com/vit_models/augreg"
    assert server.asked_paths == [f"{bucket}/index.csv", f"{bucket}/B_16-i21k-b.npz"]
    assert capsys.readouterr().err.splitlines()[-1] == "augreg/B_16 is augreg/B_16-i21k-b"


def test_resolve_lists_the_variants_that_augreg_has(mirror):
    with mirror(INDEX.encode()), pytest.raises(UsageError, match="no variant augreg/B_7; .* one of B_16, R26_S_32"):
        pretrained.resolve("augreg/B_7")


def test_resolve_refuses_an_index_of_other_columns(mirror, tmp_path):
    with mirror(b"name,file\nB/16,a\n"), pytest.raises(UserError, match="expected the columns filename, ds, final_val"):
        pretrained.resolve("augreg/B_16")
    assert not (tmp_path / "cache/augreg/index.csv").exists()


def test_resolve_refuses_a_fetched_file_that_is_no_vit(fetched):
    fetched["params"] = {"layer1/weight": np.zeros(1)}
    with pytest.raises(UserError, match="not a ViT file"):
        pretrained.resolve("imagenet21k/ViT-L_32")


def test_resolve_takes_a_path(path, monkeypatch):
    path.touch()
    assert pretrained.resolve(str(path)) == path
    monkeypatch.setenv("HOME", str(path.parent))
    assert pretrained.resolve("~/params.npz") == path


def test_resolve_finds_the_shipped_file(monkeypatch, tmp_path):
    shipped = tmp_path / "assets" / "ViT-micro_4.npz"
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match="comes with the package, is missing; install vit_jax again"):
        pretrained.resolve("micro")
    os.makedirs(shipped.parent)
    shipped.touch()
    assert pretrained.resolve("micro") == shipped


def test_resolve_says_that_a_path_is_missing(path):
    with pytest.raises(UserError, match="params.npz does not exist; check the path") as caught:
        pretrained.resolve(str(path))
    assert caught.value.exit_code == 1


def test_resolve_names_the_nearest_names():
    with pytest.raises(UsageError, match="'ViT-L_32': it is neither a file nor a known name.*imagenet21k/ViT-L_32"):
        pretrained.resolve("ViT-L_32")
