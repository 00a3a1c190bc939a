"""The layouts of Google's files: one table of what they are, and how each becomes that of the original release."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.pretrained.infer import BIG_VISION_ATTENTION, POSITION_KEY, is_square
from vit_jax.pretrained.npz import decode_bfloat16
from vit_jax.types import FlatParams, Params

_STACK = "Transformer/encoderblock/"
_BLOCK_LAYERS = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}
_MAP_PARTS = ("probe", "MultiHeadDotProductAttention_0/", "LayerNorm_0/", "MlpBlock_0/")
_GROUP_NORM = re.compile(r"(.*/)?gn(\d|_root|_proj)/(scale|bias)")
_BIT_HEAD = "resnet/head/conv2d/"
_PRETRAINING_SIZE = 224  # pixels


class Layout(NamedTuple):
    """A way in which files differ from the original release.

    Attributes:
        name: what it is, and whose.
        is_that_of: whether a file, as the rows before left it, is of that layout.
        undo: brings it one step nearer to the original.
    """

    name: str
    is_that_of: Callable[[FlatParams], bool]
    undo: Callable[[FlatParams], FlatParams]


def to_original(params: Params) -> Params:
    """Parameters under the names and axes of the original release, whichever of Google's layouts they have.

    Applies every row of `LAYOUTS` that fits, one after the other. What is in none of them is returned as it is.
    """
    flat = flatten_dict(params, sep="/")
    for layout in LAYOUTS:
        if layout.is_that_of(flat):
            flat = layout.undo(flat)
    return unflatten_dict(flat, sep="/")


def _some_start_with(keys: Iterable[str], *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in keys)


def _below(prefix: str, name: str) -> Layout:
    """Parameters that lie under a prefix, among other things that are left out."""

    def undo(flat: FlatParams) -> FlatParams:
        return {key.removeprefix(prefix): leaf for key, leaf in flat.items() if key.startswith(prefix)}

    return Layout(name, lambda flat: _some_start_with(flat, prefix), undo)


def _unstack(flat: FlatParams) -> FlatParams:
    unstacked: FlatParams = {}
    for key, leaf in flat.items():
        if key.startswith(_STACK):
            rest = key.removeprefix(_STACK)
            unstacked |= {f"Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(np.atleast_1d(leaf))}
        else:
            unstacked[key] = leaf
    return unstacked


def _name_map_head(flat: FlatParams) -> FlatParams:
    return {f"MAPHead_0/{key}" if key.startswith(_MAP_PARTS) else key: leaf for key, leaf in flat.items()}


def _has_computed_positions(flat: FlatParams) -> bool:
    learned = {"cls", "pos_embedding", "Transformer/pos_embedding", POSITION_KEY}
    has_patches = "embedding/kernel" in flat and flat["embedding/kernel"].ndim == 4
    return has_patches and any(map(BIG_VISION_ATTENTION.match, flat)) and not learned & flat.keys()


def _compute_positions(flat: FlatParams) -> FlatParams:
    """Sines and cosines of columns, then of rows, at a quarter of the width's frequencies, from 1 down to 1e-4."""
    patch_size, _, _, width = flat["embedding/kernel"].shape
    side = _PRETRAINING_SIZE // patch_size
    rows, columns = np.divmod(np.arange(side * side), side)
    frequencies = 1e-4 ** np.linspace(0.0, 1.0, width // 4)
    angles = [np.outer(places, frequencies) for places in (columns, rows)]  # [n d/4] each
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return {**flat, "pos_embedding": np.concatenate(parts, axis=1)[None].astype(np.float32)}  # [1 n d]


def _name_block_layers(flat: FlatParams) -> FlatParams:
    def rename(key: str) -> str:
        match = re.fullmatch(r"(Transformer/encoderblock_\d+)/(\w+)/(.+)", key)
        return f"{match[1]}/{_BLOCK_LAYERS.get(match[2], match[2])}/{match[3]}" if match else key

    return {rename(key): leaf for key, leaf in flat.items()}


def _move_positions(flat: FlatParams) -> FlatParams:
    others = {key: leaf for key, leaf in flat.items() if not key.endswith("pos_embedding")}
    positions = next(leaf for key, leaf in flat.items() if key.endswith("pos_embedding"))
    if "cls" in flat and positions.ndim == 3 and not is_square(positions.shape[1] - 1):
        # The class token joins after the positions were added: its own is zero. (Once it joined before.)
        positions = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    return others | {POSITION_KEY: positions}


def _squeeze_norms(flat: FlatParams) -> FlatParams:
    return {key: leaf.reshape(-1) if _is_group_norm(key, leaf) else leaf for key, leaf in flat.items()}


def _is_group_norm(key: str, leaf: np.ndarray) -> bool:
    return leaf.ndim == 4 and leaf.shape[:3] == (1, 1, 1) and bool(_GROUP_NORM.fullmatch(key))


def _has_convolution_as_head(flat: FlatParams) -> bool:
    kernel = flat.get(f"{_BIT_HEAD}kernel")
    return kernel is not None and kernel.shape[:2] == (1, 1)


def _squeeze_head(flat: FlatParams) -> FlatParams:
    kernel = decode_bfloat16(flat[f"{_BIT_HEAD}kernel"])[0, 0]  # [d classes]
    return {key.replace(_BIT_HEAD, "head/"): leaf for key, leaf in (flat | {f"{_BIT_HEAD}kernel": kernel}).items()}


LAYOUTS = (
    _below("opt/target/", "an optimizer's state around the parameters: SAM, GSAM"),
    _below("optimizer/target/", "the same under another name"),
    _below("params/", "a training state around the parameters: big_vision"),
    _below("img/", "a picture's and a text's model in one file: LiT, SigLIP"),
    Layout("blocks as one array each, depth first: big_vision", lambda flat: _some_start_with(flat, _STACK), _unstack),
    Layout(
        "the pooling head's parts without their head: big_vision, old", lambda flat: "probe" in flat, _name_map_head
    ),
    Layout("positions that are sines, and not stored: big_vision", _has_computed_positions, _compute_positions),
    Layout(
        "layers of a block counted kind by kind: big_vision",
        lambda flat: any(map(BIG_VISION_ATTENTION.match, flat)),
        _name_block_layers,
    ),
    Layout(
        "positions apart from the class token: big_vision",
        lambda flat: bool({"pos_embedding", "Transformer/pos_embedding"} & flat.keys()),
        _move_positions,
    ),
    Layout(
        "vectors of a GroupNorm as [1 1 1 c]: hybrids",
        lambda flat: any(_is_group_norm(key, leaf) for key, leaf in flat.items()),
        _squeeze_norms,
    ),
    Layout("a 1 × 1 convolution as head: BiT", _has_convolution_as_head, _squeeze_head),
)
"""What the files of the family differ in, in the order in which it is undone; bfloat16 stored as raw bytes is undone by
`load_npz`, for every file."""
