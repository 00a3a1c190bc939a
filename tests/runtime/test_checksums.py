import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.runtime.checksums import checksum, checksum_json, checksums, mismatches


def test_checksum_is_the_crc32_of_the_bytes():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert checksum(array) == f"{zlib.crc32(array.tobytes()):08x}"
    assert checksum(array.T) == f"{zlib.crc32(array.T.tobytes()):08x}"
    assert checksum(jnp.asarray(array)) == checksum(array)


@pytest.mark.parametrize("array", [jnp.ones(3, jnp.bfloat16), np.float32(2), np.zeros((0, 3)), np.array(True)])
def test_checksum_takes_any_dtype_and_shape(array):
    assert checksum(array) == f"{zlib.crc32(np.asarray(array).tobytes()):08x}"


def test_checksums_are_named_by_the_joined_keys():
    tree = {"head": {"kernel": np.ones(2), "bias": np.zeros(1)}, "opt_state": (np.zeros(3), None)}
    assert checksums(tree).keys() == {"head/kernel", "head/bias", "opt_state/0"}


def test_mismatches_names_changed_missing_and_unexpected_arrays():
    expected = checksums({"a": np.ones(2), "b": {"c": np.ones(2)}, "d": np.ones(1)})
    assert mismatches({"a": np.ones(2), "b": {"c": np.ones(2)}, "d": np.ones(1)}, expected) == []
    flipped = np.ones(2)
    flipped.view(np.uint8)[0] ^= 1
    assert mismatches({"a": np.ones(2), "b": {"c": flipped}, "e": np.ones(1)}, expected) == ["b/c", "e", "d"]


def test_checksum_json_ignores_the_order_of_keys():
    assert checksum_json({"a": 1, "b": [None, "é"]}) == checksum_json({"b": (None, "é"), "a": 1})
    assert checksum_json({"a": 1}) != checksum_json({"a": 2})
