"""The released layout of ResNets (BiT)."""

import re
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from vit_jax.pretrained.infer import differences, foreign_layout
from vit_jax.runtime.errors import UserError
from vit_jax.types import Params

_HEAD = "resnet/head/conv2d/"
_ROOT = "resnet/root_block/standardized_conv2d/kernel"


def infer_resnet(params: Params) -> dict[str, Any]:
    """Reads a ResNet's sizes off the shapes of its parameters.

    Args:
        params: nested dictionary of arrays, or of anything with a shape; the head as `to_original` leaves it.

    Returns:
        Arguments of `ResNet`: units, width, num_classes.

    Raises:
        UserError: this is not a whole BiT file; names keys and the likely cause.
    """
    shapes = {key: tuple(leaf.shape) for key, leaf in flatten_dict(params, sep="/").items()}
    cause = foreign_layout(shapes, wanted="ResNet (BiT)")
    if cause:
        raise UserError(f"these are not the parameters of a ResNet (BiT): {cause}")
    head, root = shapes.get("head/kernel", shapes.get(f"{_HEAD}kernel")), shapes.get(_ROOT)
    if head is None or len(head) != 2 or "head/kernel" not in shapes:
        raise _not_whole(f"its head, {_HEAD}kernel, is {_found(head)}; expected (1, 1, features, classes)")
    if root is None or len(root) != 4:
        raise _not_whole(f"{_ROOT} is {_found(root)}; expected (7, 7, 3, width)")
    if not root[3] or root[3] % 32:
        raise _not_whole(f"its width, {root[3]}, is not a multiple of 32, the number of groups")
    blocks: dict[str, set[str]] = {}
    for match in filter(None, (re.match(r"resnet/block(\d+)/unit(\d+)/", key) for key in shapes)):
        blocks.setdefault(match[1], set()).add(match[2])
    units = tuple(len(blocks[block]) for block in sorted(blocks, key=int))
    expected = _expected_shapes(units, width=root[3], num_classes=head[1])
    if shapes != expected:
        raise _not_whole(differences(shapes, expected))
    return {"units": units, "width": root[3], "num_classes": head[1]}


def _expected_shapes(units: Sequence[int], *, width: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Every key of a file, the head as `to_original` leaves it, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {_ROOT: (7, 7, 3, width)}
    channels = width
    for i, num_units in enumerate(units):
        middle = width * 2**i
        for j in range(num_units):
            unit = f"resnet/block{i + 1}/unit{j + 1:02}"
            sides = {"a": (1, channels, middle), "b": (3, middle, middle), "c": (1, middle, 4 * middle)}
            for name, (side, inputs, outputs) in sides.items():
                shapes |= {f"{unit}/{name}/group_norm/{leaf}": (inputs,) for leaf in ("gamma", "beta")}
                shapes[f"{unit}/{name}/standardized_conv2d/kernel"] = (side, side, inputs, outputs)
            if j == 0:
                shapes[f"{unit}/a/proj/standardized_conv2d/kernel"] = (1, 1, channels, 4 * middle)
            channels = 4 * middle
    shapes |= {f"resnet/group_norm/{leaf}": (channels,) for leaf in ("gamma", "beta")}
    return shapes | {"head/kernel": (channels, num_classes), "head/bias": (num_classes,)}


def _found(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"


def _not_whole(why: str) -> UserError:
    return UserError(f"this is not a whole ResNet (BiT): {why}")
