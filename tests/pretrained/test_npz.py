import io
import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax.traverse_util import flatten_dict
from reference import MICRO, flat_params, nest

from vit_jax import pretrained
from vit_jax.runtime.errors import UserError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "params.npz"


def test_load_npz_nests_keys_of_numpy_archive(path):
    np.savez(path, **{"cls": np.zeros(2), "head/bias": np.ones(3), "head/kernel": np.ones((2, 3))})
    params = pretrained.load_npz(path)
    assert set(params) == {"cls", "head"}
    assert set(params["head"]) == {"bias", "kernel"}
    np.testing.assert_array_equal(params["head"]["bias"], [1, 1, 1])


def test_load_npz_reads_compressed_archive(path):
    np.savez_compressed(path, cls=np.arange(3.0))
    np.testing.assert_array_equal(pretrained.load_npz(path)["cls"], [0, 1, 2])


def test_save_npz_round_trip_is_bit_exact(path):
    flat = flat_params(representation_size=4)
    flat["head/bias"] = np.array([np.nan, -0.0, np.inf, 1e-45, 1], np.float32)
    flat["embedding/kernel"] = np.asfortranarray(flat["embedding/kernel"])
    pretrained.save_npz(path, nest(flat))
    loaded = flatten_dict(pretrained.load_npz(path), sep="/")
    assert list(loaded) == list(flat)
    for key, leaf in flat.items():
        assert loaded[key].dtype == leaf.dtype and loaded[key].shape == leaf.shape
        assert loaded[key].tobytes() == leaf.tobytes()


def test_save_npz_keeps_dtypes_and_scalars(path):
    flat = {"step": np.int64(7), "half": np.array([0.5], np.float16), "empty": np.zeros((0, 3))}
    pretrained.save_npz(path, flat)
    loaded = pretrained.load_npz(path)
    assert {key: (leaf.dtype.name, leaf.shape) for key, leaf in loaded.items()} == {
        "step": ("int64", ()),
        "half": ("float16", (1,)),
        "empty": ("float64", (0, 3)),
    }


def test_load_npz_returns_bfloat16_as_float32(path):
    pretrained.save_npz(path, {"cls": jnp.array([[1.5, -2.0, 3e38]], jnp.bfloat16)})
    loaded = pretrained.load_npz(path)["cls"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, np.array([[1.5, -2.0, jnp.bfloat16(3e38)]], np.float32))


def test_save_npz_matches_bytes_of_numpy_savez(path, tmp_path):
    flat = flat_params()
    np.savez(tmp_path / "numpy.npz", **flat)
    pretrained.save_npz(path, jax.tree.map(jnp.asarray, nest(flat)))
    pretrained.save_npz(tmp_path / "again.npz", nest(dict(sorted(flat.items()))))
    assert path.read_bytes() == (tmp_path / "again.npz").read_bytes()  # JAX sorts keys
    pretrained.save_npz(path, nest(flat))
    assert path.read_bytes() == (tmp_path / "numpy.npz").read_bytes()


def test_save_npz_matches_published_file_size(path):
    shapes = reference.released_shapes(**reference.B_16, representation_size=768, num_classes=21843, num_tokens=197)
    pretrained.save_npz(path, nest({key: np.zeros(shape, np.float32) for key, shape in shapes.items()}))
    assert path.stat().st_size == 412_815_506
    path.unlink()


def test_save_npz_keeps_old_file_after_failure(path, tmp_path):
    pretrained.save_npz(path, {"cls": np.zeros(2)})
    with pytest.raises(ValueError, match="Object arrays"):
        pretrained.save_npz(path, {"cls": np.ones(2), "head": np.array([None])})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    np.testing.assert_array_equal(pretrained.load_npz(path)["cls"], [0, 0])


def test_save_npz_rejects_missing_directory(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*/missing/params.npz: No such file or directory"):
        pretrained.save_npz(tmp_path / "missing" / "params.npz", {"cls": np.zeros(2)})


def many_class_names():
    """Returns long, non-ASCII class names, as many as ImageNet-21k has."""
    return [f"{i:05}: a rather long name of a class, with a synonym or two, and more: é, 中" for i in range(21_843)]


def metadata_with(class_names):
    return pretrained.ModelMetadata(
        "vit", {**MICRO, "num_classes": len(class_names)}, image_size=8, class_names=tuple(class_names)
    )


@pytest.mark.parametrize("num_names", [0, 1, 800, 21_843])
def test_save_npz_stores_metadata_of_any_length_outside_arrays(path, num_names):
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


def test_save_npz_stores_short_metadata_in_archive_comment(path):
    metadata = metadata_with(["cat", "dog"])
    pretrained.save_npz(path, nest(flat_params()), metadata)
    value = json.loads(zipfile.ZipFile(path).comment)
    assert value.keys() == {"crc32", "metadata"} and value["metadata"] == metadata.to_json()


def test_save_npz_rejects_metadata_too_long_for_comments(path):
    pretrained.save_npz(path, {"cls": np.zeros(2)}, metadata_with(["x" * 130_000]))
    with pytest.raises(UserError, match="metadata of 132,[0-9]* bytes is too long for the comments of 1 arrays"):
        pretrained.save_npz(path, {"cls": np.zeros(2)}, metadata_with(["x" * 132_000]))
    assert len(pretrained.read_metadata(path).class_names[0]) == 130_000


@pytest.mark.parametrize("target", [b'["00000', b'"21842'])
def test_read_metadata_rejects_damaged_metadata(path, target):
    pretrained.save_npz(path, nest(flat_params()), metadata_with(many_class_names()))
    content = path.read_bytes()
    assert content.count(target) == 1
    path.write_bytes(content.replace(target, b"\x00" * len(target)))
    with pytest.raises(UserError, match="params.npz has damaged metadata: .*; export or copy it again"):
        pretrained.read_metadata(path)


def test_read_metadata_rejects_any_flipped_bit(path):
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
def test_read_metadata_returns_none_for_comments_of_other_tools(path, comment):
    pretrained.save_npz(path, nest(flat_params()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment
    assert pretrained.read_metadata(path) is None


def test_read_metadata_reads_files_of_version_0_1(path):
    """Version 0.1 has no checksum, no dtype, and other keys for mean and std."""
    value = metadata_with(["cat", "dog"]).to_json()
    old = {"vit_jax": "0.1.0", **value, "pixel_mean": [0.25] * 3, "pixel_deviation": [0.125] * 3, "command": "python"}
    for key in ("image_mean", "image_std", "dtype"):
        del old[key]
    pretrained.save_npz(path, nest(flat_params()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = json.dumps(old).encode()
    metadata = pretrained.read_metadata(path)
    assert (metadata.image_mean, metadata.image_std, metadata.dtype) == ((0.25,) * 3, (0.125,) * 3, "float32")
    assert metadata.class_names == ("cat", "dog")


def test_read_metadata_rejects_renamed_array(path):
    pretrained.save_npz(path, {"cls": np.zeros(2)}, metadata_with(["cat"]))
    path.write_bytes(path.read_bytes().replace(b"cls.npy", b"cla.npy"))
    assert pretrained.load_npz(path).keys() == {"cla"}
    with pytest.raises(UserError, match="damaged metadata: the checksum of the metadata is wrong"):
        pretrained.read_metadata(path)


def load_error(path):
    """Returns the message of the error, one line that contains the path."""
    with pytest.raises(UserError) as caught:
        pretrained.load_npz(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize(("name", "reason"), [("missing.npz", "No such file or directory"), ("", "Is a directory")])
def test_load_npz_rejects_unreadable_file(tmp_path, name, reason):
    assert f"cannot be read: {reason}; give the path of an .npz file" in load_error(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>", b"\x80\x04\x95pickle", b"\x93NUMPY\x01\x00", b"x"])
def test_load_npz_rejects_other_file_formats(path, content):
    path.write_bytes(content)
    assert f"or not an .npz file: File is not a zip file (it has {len(content)} bytes)" in load_error(path)


def test_load_npz_rejects_zip_with_other_members(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "text")
    assert "not an .npz file: word/document.xml: " in load_error(path)


@pytest.mark.parametrize("num_bytes", [4, 100, 1000, -1])
def test_load_npz_rejects_truncated_file(path, num_bytes):
    pretrained.save_npz(path, nest(flat_params()))
    path.write_bytes(path.read_bytes()[:num_bytes])
    message = load_error(path)
    assert "is truncated, damaged or not an .npz file" in message
    assert f"(it has {path.stat().st_size:,} bytes); download or copy it again" in message


def test_load_npz_names_damaged_member(path):
    pretrained.save_npz(path, {"cls": np.zeros(100), "embedding": {"bias": np.full(100, 7.0)}})
    content = path.read_bytes()
    path.write_bytes(content.replace(np.full(50, 7.0).tobytes(), np.full(50, 8.0).tobytes(), 1))
    assert "not an .npz file: embedding/bias.npy: Bad CRC-32" in load_error(path)


def test_load_npz_rejects_header_with_smaller_shape(path):
    pretrained.save_npz(path, {"cls": np.zeros(96, np.float32)})
    path.write_bytes(path.read_bytes().replace(b"'shape': (96,)", b"'shape': (32,)", 1))
    assert "not an .npz file: cls.npy: " in load_error(path)


def test_load_npz_never_unpickles(path):
    calls = []

    class Trap:
        def __reduce__(self):
            return calls.append, (1,)

    np.savez(path, cls=np.array([Trap()], object))
    assert "cls.npy: Object arrays cannot be loaded" in load_error(path)
    assert not calls


@pytest.mark.parametrize("shape", [(10**15,), (10**9, 3), (-24,), (-4, -6), (2**32, 2**32, 4)])
def test_load_npz_rejects_header_with_invalid_shape(path, shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cls.npy", header.getvalue() + bytes(96))
    assert "not an .npz file: cls.npy: " in load_error(path)


@pytest.mark.parametrize(
    "array", [np.array("1.0"), np.zeros(2, "M8[s]"), np.ones(2, complex), np.zeros(2, [("a", "f4")]), np.zeros(2, "V4")]
)
def test_load_npz_rejects_non_numeric_dtypes(path, array):
    np.savez(path, cls=array)
    assert f"cls.npy: {array.dtype} {list(array.shape)}; expected real numbers" in load_error(path)


def test_load_npz_names_member_that_fails_to_decompress(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cls.npy", bytes(2000))
    content = bytearray(path.read_bytes())
    content[45:60] = b"\xff" * 15
    path.write_bytes(content)
    assert "not an .npz file: cls.npy: " in load_error(path)


def test_load_npz_returns_writable_arrays(path):
    pretrained.save_npz(path, {"cls": np.zeros(2), "half": np.zeros(2, jnp.bfloat16)})
    for leaf in pretrained.load_npz(path).values():
        leaf += 1
