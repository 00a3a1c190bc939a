"""The released layout of ResNets (BiT)."""

import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError
from vit_jax.pretrained.npz import decode_bfloat16
from vit_jax.types import Params

_HEAD = "resnet/head/conv2d/"


def squeeze_head(params: Params) -> Params:
    """Gives a BiT file's head, a 1 × 1 convolution [1 1 d classes], the name and shape that every head has here.

    Other files are returned as they are.
    """
    flat = flatten_dict(params, sep="/")
    kernel = flat.get(f"{_HEAD}kernel")
    if kernel is None or kernel.shape[:2] != (1, 1):
        return params
    flat[f"{_HEAD}kernel"] = decode_bfloat16(kernel)[0, 0]
    return unflatten_dict({key.replace(_HEAD, "head/"): leaf for key, leaf in flat.items()}, sep="/")


def infer_resnet(params: Params) -> dict[str, Any]:
    """Reads a ResNet's sizes off the shapes of its parameters.

    Args:
        params: nested dictionary of arrays, or of anything with a shape; the head as `squeeze_head` leaves it.

    Returns:
        Arguments of `ResNet`: units, width, num_classes.

    Raises:
        UserError: this is not a whole BiT file.
    """
    shapes = {key: tuple(leaf.shape) for key, leaf in flatten_dict(params, sep="/").items()}
    units: dict[int, set[int]] = {}
    for match in filter(None, (re.match(r"resnet/block(\d+)/unit(\d+)/", key) for key in shapes)):
        units.setdefault(int(match[1]), set()).add(int(match[2]))
    root, head = shapes.get("resnet/root_block/standardized_conv2d/kernel", ()), shapes.get("head/kernel", ())
    if len(root) != 4 or len(head) != 2 or not units:
        raise UserError(
            "these are not the parameters of a ResNet (BiT): expected resnet/root_block, blocks of units and a head, "
            f"got {', '.join(sorted(shapes)[:3]) or 'nothing'}; give a BiT file, or set architecture to 'vit'"
        )
    return {"units": tuple(len(units[i]) for i in sorted(units)), "width": root[3], "num_classes": head[1]}
