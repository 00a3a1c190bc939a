"""The released layout: which keys and shapes make a whole Vision Transformer, and what other files look like."""

import re
from collections.abc import Iterable
from typing import Any

from flax.traverse_util import flatten_dict

from vit_jax.errors import UserError
from vit_jax.types import Params

POSITION_KEY = "Transformer/posembed_input/pos_embedding"
BLOCK = re.compile(r"Transformer/encoderblock_(\d+)/")


def infer_architecture(params: Params) -> dict[str, Any]:
    """Reads a Vision Transformer's sizes off the shapes of its parameters.

    Args:
        params: nested dictionary of arrays, or of anything with a shape.

    Returns:
        Arguments of `VisionTransformer`: patch_size, hidden_size, num_layers, num_heads, mlp_dim, representation_size
        (None without `pre_logits`) and num_classes.

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

    block = "Transformer/encoderblock_0"
    has_pre_logits = any(key.startswith("pre_logits/") for key in shapes)
    architecture: dict[str, Any] = {
        "patch_size": size("embedding/kernel", axis=0, num_axes=4),
        "hidden_size": size("embedding/kernel", axis=3, num_axes=4),
        "num_layers": len(block_numbers(shapes)),
        "num_heads": size(f"{block}/MultiHeadDotProductAttention_1/query/kernel", axis=1, num_axes=3),
        "mlp_dim": size(f"{block}/MlpBlock_3/Dense_0/kernel", axis=1, num_axes=2),
        "representation_size": size("pre_logits/kernel", axis=1, num_axes=2) if has_pre_logits else None,
        "num_classes": size("head/kernel", axis=1, num_axes=2),
    }
    hidden_size, num_heads = architecture["hidden_size"], architecture["num_heads"]
    if not num_heads or hidden_size % num_heads:
        raise UserError(f"this is not a whole ViT: its width, {hidden_size}, does not divide into {num_heads} heads")
    expected = expected_shapes(**architecture, num_tokens=size(POSITION_KEY, axis=1, num_axes=3))
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
    num_classes: int,
    num_tokens: int,
) -> dict[str, tuple[int, ...]]:
    """Every key of a released file, with its shape."""

    def dense(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {f"{name}/kernel": inputs + outputs, f"{name}/bias": outputs}

    def norm(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}/scale": width, f"{name}/bias": width}

    width, heads = (hidden_size,), (num_heads, hidden_size // num_heads)
    shapes: dict[str, tuple[int, ...]] = {"cls": (1, 1, hidden_size), POSITION_KEY: (1, num_tokens, hidden_size)}
    shapes |= dense("embedding", (patch_size, patch_size, 3), width)
    for i in range(num_layers):
        block = f"Transformer/encoderblock_{i}"
        shapes |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_2")
        for name in ("query", "key", "value"):
            shapes |= dense(f"{block}/MultiHeadDotProductAttention_1/{name}", width, heads)
        shapes |= dense(f"{block}/MultiHeadDotProductAttention_1/out", heads, width)
        shapes |= dense(f"{block}/MlpBlock_3/Dense_0", width, (mlp_dim,))
        shapes |= dense(f"{block}/MlpBlock_3/Dense_1", (mlp_dim,), width)
    shapes |= norm("Transformer/encoder_norm")
    if representation_size is not None:
        shapes |= dense("pre_logits", width, (representation_size,))
    return shapes | dense("head", (representation_size or hidden_size,), (num_classes,))


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

    if some_start_with("opt/", "optimizer/"):
        return "it carries an optimizer's state (opt/…, parameters under opt/target/); give the parameters alone"
    if some_start_with("params/", "pos_embedding", "Transformer/encoderblock/"):
        return "it looks like a big_vision file (params/…), whose names differ; give a file of the original release"
    if some_start_with("conv_root/", "gn_root/"):
        return f"it looks like a hybrid of ResNet and ViT (conv_root/…), such as R50+ViT-B_16; give a plain {wanted}"
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
