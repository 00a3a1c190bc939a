"""Infers the architecture and sizes of a model from the shapes of its parameters."""

import collections
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vit_jax.models import ARCHITECTURES, create_model
from vit_jax.runtime.errors import UserError
from vit_jax.types import ImageModel, Params

POSITION_KEY = "Transformer/posembed_input/pos_embedding"

Grid = tuple[int, int]
"""Rows and columns of patches."""

Shape = tuple[int, ...]
Sizes = dict[str, Any]
"""Constructor arguments of a module that determine the shapes of its parameters."""


def infer_sizes(params: Params) -> tuple[str, Sizes]:
    """Returns the architecture and the constructor arguments of the model that parameters belong to.

    Args:
        params: nested dictionary of arrays or `jax.ShapeDtypeStruct`, in the original ViT checkpoint format.

    Raises:
        UserError: the keys and shapes are not exactly those of a known model; the message names keys.
    """
    shapes = shapes_of(params)
    architecture = find_architecture(shapes)
    try:
        sizes, num_patches = _READERS[architecture][1](shapes)
        arguments = {key: value for key, value in sizes.items() if key != "num_classes"}
        model = create_model(architecture, arguments, num_classes=sizes["num_classes"])
        wrong = differences(shapes, parameter_shapes(model, num_patches))
    except UserError as error:
        wrong = str(error)
    if wrong:
        name = ARCHITECTURES[architecture].__name__
        raise UserError(f"these are not the parameters of a complete {name}: {wrong}")
    return architecture, sizes


def find_architecture(keys: Iterable[str]) -> str:
    """Returns the architecture that parameter keys belong to."""
    keys = sorted(keys)
    for architecture, (prefix, _) in _READERS.items():
        if any(key.startswith(prefix) for key in keys):
            return architecture
    prefixes = " or ".join(f"{prefix}…" for prefix, _ in _READERS.values())
    raise UserError(f"these are not the parameters of a known model: found {few(keys)}; expected keys {prefixes}")


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: ImageModel, num_patches: int) -> Mapping[str, Shape]:
    """Returns {key: shape} of a module's parameters for `num_patches` patches, by tracing the initialization."""
    side = model.pixels_per_patch
    images = jax.ShapeDtypeStruct((1, side, side * num_patches, 3), jnp.float32)
    return shapes_of(jax.eval_shape(model.init, jax.ShapeDtypeStruct((2,), jnp.uint32), images)["params"])


def shapes_of(params: Params) -> dict[str, Shape]:
    """Returns {joined key: shape}."""
    return {key: tuple(leaf.shape) for key, leaf in flatten_dict(params, sep="/").items()}


def infer_image_size(params: Params, model: ImageModel) -> int | None:
    """Returns the image size in pixels of the position embeddings; None if there are none."""
    if "Transformer" not in params:
        return None
    num_patches: int = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1] - ("cls" in params)
    rows, _ = find_grid(num_patches)
    return rows * model.pixels_per_patch


def find_grid(num_patches: int, grid: Grid | None = None, *, name: str = "grid") -> Grid:
    """Returns the grid of `num_patches` patches: `grid`, or a square; errors call the argument `name`."""
    rows, columns = grid or (math.isqrt(max(0, num_patches)),) * 2
    if rows * columns != num_patches or rows < 1:
        given = f"{name} is {rows} × {columns}" if grid else "they are not a square"
        raise UserError(
            f"position embeddings have {num_patches} patches, but {given}; commands and configs need a square, "
            f"in Python, give pretrained.adapt_params {name}=(rows, columns)"
        )
    return rows, columns


def is_square(num_patches: int) -> bool:
    """Returns True if the patches form a square grid."""
    return num_patches > 0 and math.isqrt(num_patches) ** 2 == num_patches


def differences(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """Lists keys that are missing, unexpected, or of another shape; "" if there are none."""
    both = [key for key in expected if key in found]
    lists = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} {found[key]} instead of {expected[key]}" for key in both if found[key] != expected[key]
        ],
    }
    return "; ".join(f"{what}: {few(items)}" for what, items in lists.items() if items)


def few(items: list[str]) -> str:
    """Joins the first three items."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "") or "nothing"


def _vit_sizes(shapes: Mapping[str, Shape]) -> tuple[Sizes, int]:
    """Returns the sizes of a Vision Transformer and its number of patches."""
    block = "Transformer/encoderblock_0"
    num_tokens = _axis(shapes, POSITION_KEY, 1)
    sizes: Sizes = {
        "patch_size": _axis(shapes, "embedding/kernel", 0),
        "hidden_size": _axis(shapes, "embedding/kernel", 3),
        "num_layers": len(set(re.findall(r"Transformer/encoderblock_(\d+)/", " ".join(shapes)))),
        "num_heads": _axis(shapes, f"{block}/MultiHeadDotProductAttention_1/query/kernel", 1),
        "mlp_dim": _axis(shapes, f"{block}/MlpBlock_3/Dense_0/kernel", 1),
        "representation_size": _width_of(shapes, "pre_logits"),
        "num_classes": _width_of(shapes, "head"),
        "stem_units": None,
        "pool": "cls",
    }
    if any(key.startswith("conv_root/") for key in shapes):
        sizes["stem_units"] = _count_units(shapes)
        sizes["stem_width"] = _axis(shapes, "conv_root/kernel", 3)
    if any(key.startswith("MAPHead_0/") for key in shapes):
        sizes["pool"] = "map"
    elif "cls" not in shapes and not is_square(num_tokens - 1):  # otherwise the class token is missing
        sizes["pool"] = "mean"
    num_patches = num_tokens - (sizes["pool"] == "cls")
    return sizes, min(max(1, num_patches), 2**16)


def _resnet_sizes(shapes: Mapping[str, Shape]) -> tuple[Sizes, int]:
    """Returns the sizes of a ResNet; its parameters do not depend on the number of patches."""
    sizes = {
        "units": _count_units(shapes),
        "width": _axis(shapes, "resnet/root_block/standardized_conv2d/kernel", 3),
        "num_classes": _width_of(shapes, "head"),
    }
    return sizes, 1


def _axis(shapes: Mapping[str, Shape], key: str, axis: int) -> int:
    """Returns the length of an axis."""
    if len(shapes.get(key, ())) <= axis:
        raise UserError(f"{key} is of shape {shapes[key]}" if key in shapes else f"{key} is missing")
    return shapes[key][axis]


def _width_of(shapes: Mapping[str, Shape], layer: str) -> int | None:
    """Returns the output width of a dense layer; None if there is no such layer."""
    return _axis(shapes, f"{layer}/kernel", 1) if any(key.startswith(f"{layer}/") for key in shapes) else None


def _count_units(keys: Iterable[str]) -> tuple[int, ...]:
    """Returns the number of units of each block of a ResNet."""
    units = set(re.findall(r"^(?:resnet/)?block(\d+)/unit(\d+)/", "\n".join(keys), re.MULTILINE))
    counts = collections.Counter(int(block) for block, _ in units)
    return tuple(counts[block] for block in sorted(counts))


# Architecture -> (prefix of some keys, function from shapes to (sizes, number of patches)).
_READERS = {"vit": ("Transformer/encoderblock_", _vit_sizes), "resnet50": ("resnet/block", _resnet_sizes)}
