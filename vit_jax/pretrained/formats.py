"""Formats of Google's checkpoints: a table of how they differ from the original ViT checkpoint format."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.pretrained.infer import POSITION_KEY, is_square
from vit_jax.pretrained.npz import decode_bfloat16
from vit_jax.types import FlatParams, Params

_STACK = "Transformer/encoderblock/"
_BIG_VISION_LAYERS = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}
_BIG_VISION_BLOCK = r"Transformer/encoderblock_\d+/MultiHeadDotProductAttention_0/.*"
_BIG_VISION_POSITIONS = r"(Transformer/)?pos_embedding"
_MAP_HEAD = ("probe", "MultiHeadDotProductAttention_0/", "LayerNorm_0/", "MlpBlock_0/")
_GROUP_NORM = r"(.*/)?gn(\d|_root|_proj)/(scale|bias)"
_BIT_HEAD = "resnet/head/conv2d/"
_PRETRAINING_SIZE = 224  # pixels


class Format(NamedTuple):
    """A difference from the original format.

    Attributes:
        name: of the difference, and whose checkpoints have it.
        matches: returns whether parameters, converted by the rows before, have it.
        convert: removes it.
    """

    name: str
    matches: Callable[[FlatParams], bool]
    convert: Callable[[FlatParams], FlatParams]


def to_original(params: Params) -> Params:
    """Converts parameters to the names and axes of the original ViT checkpoint format.

    Applies every row of `FORMATS` that matches, in their order; parameters that none matches are returned as they are.
    """
    flat = flatten_dict(params, sep="/")
    for row in FORMATS:
        if row.matches(flat):
            flat = row.convert(flat)
    original: Params = unflatten_dict(flat, sep="/")
    return original


def _has_prefix(prefix: str, flat: FlatParams) -> bool:
    return any(key.startswith(prefix) for key in flat)


def _has_match(pattern: str, flat: FlatParams) -> bool:
    return any(re.fullmatch(pattern, key) for key in flat)


def _strip_prefix(prefix: str, flat: FlatParams) -> FlatParams:
    """Drops everything outside of the prefix."""
    return {key.removeprefix(prefix): leaf for key, leaf in flat.items() if key.startswith(prefix)}


def _unstack(flat: FlatParams) -> FlatParams:
    unstacked: FlatParams = {}
    for key, leaf in flat.items():
        if key.startswith(_STACK):
            rest = key.removeprefix(_STACK)
            unstacked |= {f"Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(np.atleast_1d(leaf))}
        else:
            unstacked[key] = leaf
    return unstacked


def _nest_map_head(flat: FlatParams) -> FlatParams:
    return {f"MAPHead_0/{key}" if key.startswith(_MAP_HEAD) else key: leaf for key, leaf in flat.items()}


def _lacks_positions(flat: FlatParams) -> bool:
    has_patches = "embedding/kernel" in flat and flat["embedding/kernel"].ndim == 4
    stored = {"cls", "pos_embedding", "Transformer/pos_embedding", POSITION_KEY}
    return has_patches and _has_match(_BIG_VISION_BLOCK, flat) and not stored & flat.keys()


def _add_sincos_positions(flat: FlatParams) -> FlatParams:
    """Adds sines and cosines of columns, then of rows, at width / 4 frequencies from 1 down to 1e-4."""
    patch_size, _, _, width = flat["embedding/kernel"].shape
    side = _PRETRAINING_SIZE // patch_size
    rows, columns = np.divmod(np.arange(side * side), side)
    frequencies = 1e-4 ** np.linspace(0.0, 1.0, width // 4)
    angles = [np.outer(positions, frequencies) for positions in (columns, rows)]  # [n d/4] each
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return {**flat, "pos_embedding": np.concatenate(waves, axis=1)[None].astype(np.float32)}  # [1 n d]


def _rename_block_layers(flat: FlatParams) -> FlatParams:
    renamed = {}
    for key, leaf in flat.items():
        if match := re.fullmatch(r"(Transformer/encoderblock_\d+)/(\w+)/(.+)", key):
            key = f"{match[1]}/{_BIG_VISION_LAYERS.get(match[2], match[2])}/{match[3]}"
        renamed[key] = leaf
    return renamed


def _move_positions(flat: FlatParams) -> FlatParams:
    others = {key: leaf for key, leaf in flat.items() if not key.endswith("pos_embedding")}
    positions = next(leaf for key, leaf in flat.items() if key.endswith("pos_embedding"))
    if "cls" in flat and positions.ndim == 3 and not is_square(positions.shape[1] - 1):
        # The class token is added after the position embeddings: its own is zero. (In old files it was added before.)
        positions = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    return others | {POSITION_KEY: positions}


def _is_4d_group_norm(key: str, leaf: np.ndarray) -> bool:
    return leaf.ndim == 4 and leaf.shape[:3] == (1, 1, 1) and bool(re.fullmatch(_GROUP_NORM, key))


def _has_4d_group_norms(flat: FlatParams) -> bool:
    return any(_is_4d_group_norm(key, leaf) for key, leaf in flat.items())


def _squeeze_group_norms(flat: FlatParams) -> FlatParams:
    return {key: leaf.reshape(-1) if _is_4d_group_norm(key, leaf) else leaf for key, leaf in flat.items()}


def _has_convolutional_head(flat: FlatParams) -> bool:
    kernel = flat.get(f"{_BIT_HEAD}kernel")
    return kernel is not None and kernel.shape[:2] == (1, 1)


def _squeeze_head(flat: FlatParams) -> FlatParams:
    kernel = decode_bfloat16(flat[f"{_BIT_HEAD}kernel"])[0, 0]  # [d classes]
    return {key.replace(_BIT_HEAD, "head/"): leaf for key, leaf in (flat | {f"{_BIT_HEAD}kernel": kernel}).items()}


_PREFIXES = {
    "opt/target/": "inside the state of an optimizer: SAM, GSAM",
    "optimizer/target/": "inside the state of an optimizer, under another name",
    "params/": "inside a training state: big_vision",
    "img/": "beside a text tower: LiT, SigLIP",
}
FORMATS = (
    *(
        Format(name, functools.partial(_has_prefix, prefix), functools.partial(_strip_prefix, prefix))
        for prefix, name in _PREFIXES.items()
    ),
    Format("blocks stacked on axis 0: big_vision", functools.partial(_has_prefix, _STACK), _unstack),
    Format("pooling head at the top level: old big_vision", functools.partial(_has_match, "probe"), _nest_map_head),
    Format("sine and cosine position embeddings, not stored: big_vision", _lacks_positions, _add_sincos_positions),
    Format(
        "layers of a block numbered by type: big_vision",
        functools.partial(_has_match, _BIG_VISION_BLOCK),
        _rename_block_layers,
    ),
    Format(
        "position embeddings at the top level: big_vision",
        functools.partial(_has_match, _BIG_VISION_POSITIONS),
        _move_positions,
    ),
    Format("GroupNorm parameters of shape [1 1 1 c]: hybrids", _has_4d_group_norms, _squeeze_group_norms),
    Format("a 1 × 1 convolution as head: BiT", _has_convolutional_head, _squeeze_head),
)
"""Differences from the original format in the order in which they are removed; `load_npz` decodes bfloat16."""
