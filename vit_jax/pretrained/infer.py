"""The released layout: which keys and shapes make a whole Vision Transformer, and what other files look like."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from vit_jax.runtime.errors import UserError
from vit_jax.types import Params

POSITION_KEY = "Transformer/posembed_input/pos_embedding"
BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/")
BIG_VISION_ATTENTION = re.compile(BLOCK.pattern + "MultiHeadDotProductAttention_0/")
_AROUND = ("opt/", "optimizer/", "params/", "img/")  # what `layouts.to_original` would have taken away
_STEM_UNIT = re.compile(r"block(\d+)/unit(\d+)/")


def infer_architecture(params: Params) -> dict[str, Any]:
    """Reads a Vision Transformer's sizes off the shapes of its parameters.

    Args:
        params: nested dictionary of arrays, or of anything with a shape.

    Returns:
        Arguments of `VisionTransformer`: patch_size, hidden_size, num_layers, num_heads, mlp_dim, representation_size
        (None without `pre_logits`) and num_classes (None without a head); of a hybrid also stem_units and stem_width;
        pool where there is no class token.

    Raises:
        UserError: this is not a whole Vision Transformer of the original layout; names keys and the likely cause.
    """
    shapes = _shapes(params)
    cause = foreign_layout(shapes)
    if cause:
        raise UserError(f"these are not the parameters of a ViT in the original layout: {cause}")

    def size(key: str, *, axis: int, num_axes: int) -> int:
        if len(shapes.get(key, ())) != num_axes:
            got = f"is of shape {shapes[key]}" if key in shapes else "is missing"
            raise UserError(f"this is not a whole ViT: {key} {got}; expected an array of {num_axes} axes")
        return shapes[key][axis]

    def some_start_with(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in shapes)

    block = "Transformer/encoderblock_0"
    num_tokens = size(POSITION_KEY, axis=1, num_axes=3)
    architecture: dict[str, Any] = {
        "patch_size": size("embedding/kernel", axis=0, num_axes=4),
        "hidden_size": size("embedding/kernel", axis=3, num_axes=4),
        "num_layers": len(block_numbers(shapes)),
        "num_heads": size(f"{block}/MultiHeadDotProductAttention_1/query/kernel", axis=1, num_axes=3),
        "mlp_dim": size(f"{block}/MlpBlock_3/Dense_0/kernel", axis=1, num_axes=2),
        "representation_size": None,
        "num_classes": None,
    }
    if some_start_with("pre_logits/"):
        architecture["representation_size"] = size("pre_logits/kernel", axis=1, num_axes=2)
    if some_start_with("head/"):
        architecture["num_classes"] = size("head/kernel", axis=1, num_axes=2)
    if some_start_with("conv_root/"):
        stem_width = size("conv_root/kernel", axis=3, num_axes=4)
        architecture |= {"stem_units": _count_units(shapes), "stem_width": stem_width}
    if some_start_with("MAPHead_0/"):
        architecture["pool"] = "map"
    elif "cls" not in shapes and not is_square(num_tokens - 1):  # else a square and one more: the class token is lost
        architecture["pool"] = "mean"
    hidden_size, num_heads = architecture["hidden_size"], architecture["num_heads"]
    if not num_heads or hidden_size % num_heads:
        raise UserError(f"this is not a whole ViT: its width, {hidden_size}, does not divide into {num_heads} heads")
    expected = expected_shapes(**architecture, num_tokens=num_tokens)
    if shapes != expected:
        raise UserError(f"this is not a whole ViT: {differences(shapes, expected)}")
    return architecture


def expected_shapes(
    *,
    patch_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    mlp_dim: int,
    representation_size: int | None,
    num_classes: int | None,
    num_tokens: int,
    stem_units: Sequence[int] | None = None,
    stem_width: int = 64,
    pool: str = "cls",
) -> dict[str, tuple[int, ...]]:
    """Every key of a released file, with its shape."""
    width = (hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {"cls": (1, 1, hidden_size)} if pool == "cls" else {}
    shapes[POSITION_KEY] = (1, num_tokens, hidden_size)
    channels = 3
    if stem_units is not None:
        stem, channels = _stem_shapes(stem_units, stem_width)
        shapes |= stem
    shapes |= _dense("embedding", (patch_size, patch_size, channels), width)
    for i in range(num_layers):
        block = f"Transformer/encoderblock_{i}"
        shapes |= _norm(f"{block}/LayerNorm_0", width) | _norm(f"{block}/LayerNorm_2", width)
        shapes |= _attention(f"{block}/MultiHeadDotProductAttention_1", hidden_size, num_heads)
        shapes |= _mlp(f"{block}/MlpBlock_3", hidden_size, mlp_dim)
    shapes |= _norm("Transformer/encoder_norm", width)
    if pool == "map":
        shapes["MAPHead_0/probe"] = (1, 1, hidden_size)
        shapes |= _attention("MAPHead_0/MultiHeadDotProductAttention_0", hidden_size, num_heads)
        shapes |= _norm("MAPHead_0/LayerNorm_0", width) | _mlp("MAPHead_0/MlpBlock_0", hidden_size, mlp_dim)
    if representation_size is not None:
        shapes |= _dense("pre_logits", width, (representation_size,))
    if num_classes is not None:
        shapes |= _dense("head", (representation_size or hidden_size,), (num_classes,))
    return shapes


def _stem_shapes(units: Sequence[int], width: int) -> tuple[dict[str, tuple[int, ...]], int]:
    """(Every key of a hybrid's ResNet with its shape, channels of what it gives)."""
    shapes = {"conv_root/kernel": (7, 7, 3, width)} | _norm("gn_root", (width,))
    channels = width
    for i, num_units in enumerate(units):
        middle = width * 2**i
        for j in range(num_units):
            unit = f"block{i + 1}/unit{j + 1}"
            sides = {"1": (1, channels, middle), "2": (3, middle, middle), "3": (1, middle, 4 * middle)}
            if j == 0:
                sides["_proj"] = (1, channels, 4 * middle)
            for name, (side, inputs, outputs) in sides.items():
                shapes[f"{unit}/conv{name}/kernel"] = (side, side, inputs, outputs)
                shapes |= _norm(f"{unit}/gn{name}", (outputs,))
            channels = 4 * middle
    return shapes, channels


def _dense(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}/kernel": inputs + outputs, f"{name}/bias": outputs}


def _norm(name: str, width: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}/scale": width, f"{name}/bias": width}


def _attention(name: str, hidden_size: int, num_heads: int) -> dict[str, tuple[int, ...]]:
    width, heads = (hidden_size,), (num_heads, hidden_size // num_heads)
    shapes = _dense(f"{name}/query", width, heads) | _dense(f"{name}/key", width, heads)
    return shapes | _dense(f"{name}/value", width, heads) | _dense(f"{name}/out", heads, width)


def _mlp(name: str, hidden_size: int, mlp_dim: int) -> dict[str, tuple[int, ...]]:
    return _dense(f"{name}/Dense_0", (hidden_size,), (mlp_dim,)) | _dense(f"{name}/Dense_1", (mlp_dim,), (hidden_size,))


def _count_units(keys: Iterable[str]) -> tuple[int, ...]:
    """Units of each block of a hybrid's ResNet."""
    blocks: dict[int, set[str]] = {}
    for match in filter(None, map(_STEM_UNIT.match, keys)):
        blocks.setdefault(int(match[1]), set()).add(match[2])
    return tuple(len(blocks[block]) for block in sorted(blocks))


def is_square(number: int) -> bool:
    """Whether so many patches can be a square."""
    return number > 0 and math.isqrt(number) ** 2 == number


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {key: tuple(leaf.shape) for key, leaf in flatten_dict(params, sep="/").items()}


def block_numbers(keys: Iterable[str]) -> list[int]:
    """The numbers of the encoder blocks, in order."""
    return sorted({int(match[1]) for key in keys if (match := BLOCK.match(key))})


def foreign_layout(keys: Iterable[str], *, wanted: str = "ViT") -> str:
    """Says which other known file this is; empty for the original layout of what is wanted.

    Args:
        keys: of the file.
        wanted: "ViT" or "ResNet (BiT)".
    """
    keys = list(keys)
    is_wanted = {"ViT": bool(block_numbers(keys)), "ResNet (BiT)": any(key.startswith("resnet/block") for key in keys)}

    def some_start_with(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if below := next((name for name in _AROUND if some_start_with(name)), ""):
        return f"its parameters lie below {below}; pretrained.read_model, or to_original, takes them out"
    if wanted == "ViT" and some_start_with("resnet/"):
        return "it looks like a ResNet (BiT) file (resnet/…); give a ViT, or set architecture to 'resnet50'"
    if wanted != "ViT" and is_wanted["ViT"]:
        return f"it looks like a ViT file (Transformer/encoderblock_…); give a {wanted}, or set architecture to 'vit'"
    if not is_wanted[wanted]:
        return f"it is not a {wanted} file, for it holds {_few(sorted(keys)) or 'nothing'}; give a {wanted}"
    return ""


def differences(shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str:
    """Lists what is missing, unexpected, or of another shape."""
    other = [
        f"{key} {shapes[key]} instead of {expected[key]}"
        for key in expected
        if key in shapes and shapes[key] != expected[key]
    ]
    lists = {
        "missing": [key for key in expected if key not in shapes],
        "unexpected": [key for key in shapes if key not in expected],
        "of another shape": other,
    }
    return "; ".join(f"{what}: {_few(items)}" for what, items in lists.items() if items)


def _few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
