"""Converts the formats of Google's checkpoints to the original ViT checkpoint format."""

import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.pretrained.sizes import POSITION_KEY, is_square
from vit_jax.types import FlatParams, Params

_PREFIXES = (
    "opt/target/",  # optimizer state: SAM, GSAM
    "optimizer/target/",  # the same under another name
    "params/",  # training state: big_vision
    "img/",  # image tower: LiT, SigLIP
)
_BIG_VISION_LAYERS = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}
_PRETRAINING_SIZE = 224  # pixels


def to_original(params: Params) -> Params:
    """Converts parameters to the names and axes of the original ViT checkpoint format."""
    flat = flatten_dict(params, sep="/")
    for convert in CONVERSIONS:
        flat = convert(flat)
    original: Params = unflatten_dict(flat, sep="/")
    return original


def _strip_prefixes(flat: FlatParams) -> FlatParams:
    """Strips the prefixes of optimizer states, training states and image towers."""
    for prefix in _PREFIXES:
        stripped = {key.removeprefix(prefix): leaf for key, leaf in flat.items() if key.startswith(prefix)}
        flat = stripped or flat
    return flat


def _unstack_blocks(flat: FlatParams) -> FlatParams:
    """Splits blocks that big_vision stacks on axis 0."""
    unstacked: FlatParams = {}
    for key, leaf in flat.items():
        rest = key.removeprefix("Transformer/encoderblock/")
        if rest == key:
            unstacked[key] = leaf
        else:
            unstacked |= {f"Transformer/encoderblock_{i}/{rest}": part for i, part in enumerate(np.atleast_1d(leaf))}
    return unstacked


def _nest_map_head(flat: FlatParams) -> FlatParams:
    """Renames a top-level pooling head, as in old big_vision checkpoints."""
    if "probe" not in flat:
        return flat
    layers = ("probe", "MultiHeadDotProductAttention_0/", "LayerNorm_0/", "MlpBlock_0/")
    return {f"MAPHead_0/{key}" if key.startswith(layers) else key: leaf for key, leaf in flat.items()}


def _add_sincos_positions(flat: FlatParams) -> FlatParams:
    """Adds sincos position embeddings, which big_vision computes and does not store.

    They are sines and cosines of columns, then of rows, at width / 4 frequencies from 1 to 1e-4.
    """
    kernel = flat.get("embedding/kernel")
    if kernel is None or kernel.ndim != 4 or any(key == "cls" or key.endswith("pos_embedding") for key in flat):
        return flat
    side = _PRETRAINING_SIZE // kernel.shape[0]
    rows, columns = np.divmod(np.arange(side * side), side)
    frequencies = 1e-4 ** np.linspace(0.0, 1.0, kernel.shape[3] // 4)
    angles = [np.outer(positions, frequencies) for positions in (columns, rows)]  # [n d/4] each
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return {**flat, "pos_embedding": np.concatenate(waves, axis=1)[None].astype(np.float32)}  # [1 n d]


def _rename_block_layers(flat: FlatParams) -> FlatParams:
    """Renames the layers of a block, which big_vision numbers by type."""
    renamed = {}
    for key, leaf in flat.items():
        if match := re.fullmatch(r"(Transformer/encoderblock_\d+)/(\w+)/(.+)", key):
            key = f"{match[1]}/{_BIG_VISION_LAYERS.get(match[2], match[2])}/{match[3]}"
        renamed[key] = leaf
    return renamed


def _move_positions(flat: FlatParams) -> FlatParams:
    """Renames big_vision's position embeddings."""
    for key in ("pos_embedding", "Transformer/pos_embedding"):
        if key in flat:
            positions = flat[key]
            if "cls" in flat and positions.ndim == 3 and not is_square(positions.shape[1] - 1):
                # Unlike in the original format, the class token has no position embedding.
                positions = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
            flat = {other: leaf for other, leaf in flat.items() if other != key} | {POSITION_KEY: positions}
    return flat


def _squeeze_group_norms(flat: FlatParams) -> FlatParams:
    """Reshapes GroupNorm parameters of hybrids from [1 1 1 c] to [c]."""
    is_group_norm = re.compile(r"(.*/)?gn(\d|_root|_proj)/(scale|bias)").fullmatch
    return {
        key: leaf.reshape(-1) if is_group_norm(key) and leaf.shape[:3] == (1, 1, 1) else leaf
        for key, leaf in flat.items()
    }


def _squeeze_head(flat: FlatParams) -> FlatParams:
    """Reshapes and renames the head of BiT, a 1 × 1 convolution."""
    head = "resnet/head/conv2d/"
    kernel = flat.get(f"{head}kernel")
    if kernel is None or kernel.shape[:2] != (1, 1):
        return flat
    flat = flat | {f"{head}kernel": kernel[0, 0]}  # [d classes]
    return {key.replace(head, "head/"): leaf for key, leaf in flat.items()}


CONVERSIONS = (
    _strip_prefixes,
    _unstack_blocks,
    _nest_map_head,
    _add_sincos_positions,
    _rename_block_layers,
    _move_positions,
    _squeeze_group_norms,
    _squeeze_head,
)
"""Conversions in the order of application; each leaves other formats unchanged."""
