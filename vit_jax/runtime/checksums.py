"""Checksums of the arrays in a tree, computed before they are written and verified after they are read."""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_jax.runtime import resources

_ROW_BYTES = 8192
_BLOCK_ROWS = 512


def checksum(array: Any) -> str:
    """Returns the checksum of an array's bytes as eight hexadecimal digits.

    For small arrays, it is the CRC-32 of the bytes in row-major order. For large arrays, it is the CRC-32 of the row
    and column sums of 64-bit integers in blocks of 8 KiB rows: three times as fast, and it still detects any flipped
    bit, any swap of two values and any change within one row or one column.
    """
    # As uint8: NumPy exports no buffer of bfloat16.
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    rows = content[: len(content) // _ROW_BYTES * _ROW_BYTES].view(np.uint64).reshape(-1, _ROW_BYTES // 8)
    crc32 = zlib.crc32(content[rows.nbytes :].data)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        crc32 = zlib.crc32(np.add.reduce(block, axis=0).data, crc32)
        crc32 = zlib.crc32(np.add.reduce(block, axis=1).data, crc32)
    return f"{crc32:08x}"


def checksums(tree: Any) -> dict[str, str]:
    """Returns {path joined by "/": checksum} for every array of a tree, independent of the sharding."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    with ThreadPoolExecutor(resources.available_cpus()) as pool:
        return dict(zip(names, pool.map(checksum, [_addressable(leaf) for _, leaf in leaves]), strict=True))


def _addressable(array: Any) -> Any:
    """Returns the full array, addressable by this process; a collective call for arrays that are not."""
    if isinstance(array, jax.Array) and array.is_fully_replicated:
        return array.addressable_data(0)  # unlike the full array, it does not cache a host copy
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return array


def mismatches(tree: Any, expected: dict[str, str]) -> list[str]:
    """Returns the paths whose checksums differ, or that are only in the tree or only in the checksums."""
    found = checksums(tree)
    return [path for path in {**found, **expected} if found.get(path) != expected.get(path)]


def checksum_json(value: object) -> str:
    """Returns the CRC-32 of a JSON value, independent of the order of keys."""
    return f"{zlib.crc32(json.dumps(value, separators=(',', ':'), sort_keys=True).encode()):08x}"
