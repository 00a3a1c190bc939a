import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.runtime.checksums import checksum, checksums, mismatches


def test_checksum_of_small_array_equals_crc32():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert checksum(array) == f"{zlib.crc32(array.tobytes()):08x}"
    assert checksum(array.T) == f"{zlib.crc32(array.T.tobytes()):08x}"
    assert checksum(jnp.asarray(array)) == checksum(array)


@pytest.mark.parametrize("array", [jnp.ones(3, jnp.bfloat16), np.float32(2), np.zeros((0, 3)), np.array(True)])
def test_checksum_accepts_any_dtype_and_shape(array):
    assert checksum(array) == f"{zlib.crc32(np.asarray(array).tobytes()):08x}"


def test_checksum_of_large_array_changes_with_flipped_bits_and_swapped_values():
    array = np.random.default_rng(0).standard_normal((1100, 2050), dtype=np.float32)  # size is not a multiple of a row
    expected = checksum(array)
    assert checksum(array.copy()) == expected
    rng = np.random.default_rng(1)
    for _ in range(50):
        changed = array.copy()
        changed.reshape(-1).view(np.uint8)[rng.integers(array.nbytes)] ^= 1 << rng.integers(8)
        assert checksum(changed) != expected
    for i, j in ((0, 1), (0, 2048), (5, 5 + 2048 * 512), (3, array.size - 1)):
        changed = array.copy().reshape(-1)
        changed[[i, j]] = changed[[j, i]]
        assert checksum(changed) != expected
    rows = array.copy().reshape(-1)
    rows[:2048], rows[2048:4096] = array.reshape(-1)[2048:4096], array.reshape(-1)[:2048]
    assert checksum(rows) != expected


def test_checksums_are_keyed_by_joined_paths():
    tree = {"head": {"kernel": np.ones(2), "bias": np.zeros(1)}, "opt_state": (np.zeros(3), None)}
    assert checksums(tree).keys() == {"head/kernel", "head/bias", "opt_state/0"}


def test_mismatches_list_changed_missing_and_unexpected_arrays():
    expected = checksums({"a": np.ones(2), "b": {"c": np.ones(2)}, "d": np.ones(1)})
    assert mismatches({"a": np.ones(2), "b": {"c": np.ones(2)}, "d": np.ones(1)}, expected) == []
    flipped = np.ones(2)
    flipped.view(np.uint8)[0] ^= 1
    assert mismatches({"a": np.ones(2), "b": {"c": flipped}, "e": np.ones(1)}, expected) == ["b/c", "e", "d"]
