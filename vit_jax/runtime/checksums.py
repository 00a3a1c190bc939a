"""CRC-32 checksums of arrays and of JSON, computed before they are written and verified after they are read."""

import json
import zlib
from typing import Any

import jax
import numpy as np


def checksum(array: Any) -> str:
    """Returns the CRC-32 of an array's bytes in row-major order, eight hexadecimal digits; copies device arrays."""
    # As uint8: NumPy exports no buffer of bfloat16.
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{zlib.crc32(content.data):08x}"


def checksums(tree: Any) -> dict[str, str]:
    """Returns {path joined by "/": checksum} for every array of a tree, such as nested dictionaries."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): checksum(leaf) for path, leaf in leaves}


def mismatches(tree: Any, expected: dict[str, str]) -> list[str]:
    """Returns the paths of a tree whose checksum is not the expected one, and those that only one of the two has."""
    found = checksums(tree)
    return [path for path in {**found, **expected} if found.get(path) != expected.get(path)]


def checksum_json(value: object) -> str:
    """Returns the CRC-32 of a JSON value, whatever the order of its keys."""
    return f"{zlib.crc32(json.dumps(value, separators=(',', ':'), sort_keys=True).encode()):08x}"
