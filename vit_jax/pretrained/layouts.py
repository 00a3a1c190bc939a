"""Other layouts of the same models, brought to the names and axes of the original release."""

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UserError
from vit_jax.pretrained.architecture import POSITION_KEY
from vit_jax.types import FlatParams, Params

# Where the parameters lie among other things; the first prefix that some key has counts.
_PREFIXES = ("opt/target/", "optimizer/target/", "params/img/", "params/")
_STACK = "Transformer/encoderblock/"
_BIG_VISION_LAYERS = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}


def to_original(params: Params) -> Params:
    """Parameters as the original release has them; what has that layout is returned as it is.

    Known besides: SAM's and GSAM's files, which carry an optimizer's state around the parameters; big_vision's, with
    other numbers in a block's names, positions apart from the class token, and blocks that may be stacked.

    Raises:
        UserError: a big_vision file without a class token, whose model pools otherwise.
    """
    flat = flatten_dict(params, sep="/")
    prefix = next((prefix for prefix in _PREFIXES if any(key.startswith(prefix) for key in flat)), "")
    flat = {key.removeprefix(prefix): leaf for key, leaf in flat.items() if key.startswith(prefix)}
    if "pos_embedding" in flat or any(key.startswith(_STACK) for key in flat):
        flat = _from_big_vision(flat)
    return unflatten_dict(flat, sep="/")


def _from_big_vision(flat: Mapping[str, np.ndarray]) -> FlatParams:
    if "cls" not in flat or "pos_embedding" not in flat:
        pools = "attention (MAPHead_0)" if any(key.startswith("MAPHead_0/") for key in flat) else "the mean"
        raise UserError(f"this big_vision model has no class token but pools by {pools}; give one with a class token")
    unstacked: FlatParams = {}
    for key, leaf in flat.items():
        if key.startswith(_STACK):
            rest = key.removeprefix(_STACK)
            unstacked |= {f"Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(leaf)}
        else:
            unstacked[key] = leaf
    renamed = {_rename(key): leaf for key, leaf in unstacked.items()}
    positions = renamed.pop("pos_embedding")
    # There the class token joins after the positions were added: its own is zero.
    renamed[POSITION_KEY] = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    return renamed


def _rename(key: str) -> str:
    match = re.fullmatch(r"(Transformer/encoderblock_\d+)/(\w+)/(.+)", key)
    if not match:
        return key
    block, layer, rest = match.groups()
    return f"{block}/{_BIG_VISION_LAYERS.get(layer, layer)}/{rest}"
