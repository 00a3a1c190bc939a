"""Architecture and sizes of a model, read off the shapes of its parameters."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
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
"""Constructor arguments of a module that the shapes of its parameters depend on."""


def infer_sizes(params: Params) -> tuple[str, Sizes]:
    """Returns the architecture that parameters are of, and the arguments of its constructor.

    Args:
        params: nested dictionary of arrays, or of anything with a shape, in the format that `to_original` returns.

    Returns:
        (key of `models.ARCHITECTURES`, arguments): the module's `SIZES` and `num_classes`, None without a head; of a
        Vision Transformer also representation_size, stem_units, pool and, of a hybrid, stem_width.

    Raises:
        UserError: the parameters are not exactly those of a known model; names keys.
    """
    shapes = shapes_of(params)
    architecture = find_architecture(shapes)
    sizes: Sizes = {}
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
    """Returns the architecture whose keys these are.

    Raises:
        UserError: they are those of no known architecture.
    """
    keys = sorted(keys)
    for architecture, (prefix, _) in _READERS.items():
        if any(key.startswith(prefix) for key in keys):
            return architecture
    prefixes = " or ".join(f"{prefix}…" for prefix, _ in _READERS.values())
    raise UserError(f"these are not the parameters of a known model: found {few(keys)}; expected keys {prefixes}")


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: ImageModel, num_patches: int = 1) -> Mapping[str, Shape]:
    """Returns {key: shape} of a module's parameters for images of so many patches, by tracing its initialization."""
    side = model.pixels_per_patch
    images = jax.ShapeDtypeStruct((1, side, side * num_patches, 3), jnp.float32)
    return shapes_of(jax.eval_shape(model.init, jax.ShapeDtypeStruct((2,), jnp.uint32), images)["params"])


def shapes_of(params: Params) -> dict[str, Shape]:
    """Returns {joined key: shape}."""
    return {key: tuple(leaf.shape) for key, leaf in flatten_dict(params, sep="/").items()}


def infer_image_size(params: Params, model: ImageModel) -> int | None:
    """Returns the height and width in pixels of the images that position embeddings are for; None if there are none.

    Raises:
        UserError: they are not those of a square image.
    """
    if "Transformer" not in params:
        return None
    num_patches: int = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1] - ("cls" in params)
    rows, _ = find_grid(num_patches)
    return rows * model.pixels_per_patch


def find_grid(num_patches: int, grid: Grid | None = None, *, name: str = "grid") -> Grid:
    """Returns the rows and columns of a grid of patches: as given, or those of a square.

    Raises:
        UserError: the patches are not a square, or not those of the given grid; `name` is its name.
    """
    rows, columns = grid or (math.isqrt(max(0, num_patches)),) * 2
    if rows * columns != num_patches or rows < 1:
        given = f"{name} is {rows} × {columns}" if grid else "they are not a square"
        raise UserError(
            f"position embeddings are of {num_patches} patches, but {given}; commands and configs need a square, "
            f"in Python pretrained.adapt_params takes {name}=(rows, columns)"
        )
    return rows, columns


def is_square(num_patches: int) -> bool:
    """Returns whether so many patches are a square."""
    return num_patches > 0 and math.isqrt(num_patches) ** 2 == num_patches


def differences(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """Lists keys that are missing, unexpected, or of another shape; "" if there are none."""
    lists = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} {found[key]} instead of {expected[key]}"
            for key in expected
            if key in found and found[key] != expected[key]
        ],
    }
    return "; ".join(f"{what}: {few(items)}" for what, items in lists.items() if items)


def unequal(found: Mapping[str, object], expected: Mapping[str, object]) -> str:
    """Lists the values that are not the expected ones."""
    wrong = [f"{key} {found.get(key)} instead of {value}" for key, value in expected.items() if found.get(key) != value]
    return ", ".join(wrong)


def few(items: list[str]) -> str:
    """Joins the first three items."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "") or "nothing"


def _vit_sizes(shapes: Mapping[str, Shape]) -> tuple[Sizes, int]:
    """Returns the sizes of a Vision Transformer and its number of patches."""
    block = "Transformer/encoderblock_0"
    num_tokens = _axis(shapes, POSITION_KEY, 1, of=3)
    sizes: Sizes = {
        "patch_size": _axis(shapes, "embedding/kernel", 0, of=4),
        "hidden_size": _axis(shapes, "embedding/kernel", 3, of=4),
        "num_layers": len(_groups(r"Transformer/encoderblock_(\d+)/", shapes)),
        "num_heads": _axis(shapes, f"{block}/MultiHeadDotProductAttention_1/query/kernel", 1, of=3),
        "mlp_dim": _axis(shapes, f"{block}/MlpBlock_3/Dense_0/kernel", 1, of=2),
        "representation_size": _width_of(shapes, "pre_logits"),
        "num_classes": _width_of(shapes, "head"),
        "stem_units": None,
        "pool": "cls",
    }
    if any(key.startswith("conv_root/") for key in shapes):
        sizes["stem_units"] = _count_units(r"block(\d+)/unit(\d+)/", shapes)
        sizes["stem_width"] = _axis(shapes, "conv_root/kernel", 3, of=4)
    if any(key.startswith("MAPHead_0/") for key in shapes):
        sizes["pool"] = "map"
    elif "cls" not in shapes and not is_square(num_tokens - 1):  # otherwise the class token is missing
        sizes["pool"] = "mean"
    num_patches = num_tokens - (sizes["pool"] == "cls")
    return sizes, min(max(1, num_patches), 2**16)


def _resnet_sizes(shapes: Mapping[str, Shape]) -> tuple[Sizes, int]:
    """Returns the sizes of a ResNet; its parameters do not depend on the number of patches."""
    sizes = {
        "units": _count_units(r"resnet/block(\d+)/unit(\d+)/", shapes),
        "width": _axis(shapes, "resnet/root_block/standardized_conv2d/kernel", 3, of=4),
        "num_classes": _width_of(shapes, "head"),
    }
    return sizes, 1


def _axis(shapes: Mapping[str, Shape], key: str, axis: int, *, of: int) -> int:
    """Returns the size of an axis of an array of so many axes."""
    if len(shapes.get(key, ())) != of:
        found = f"is of shape {shapes[key]}" if key in shapes else "is missing"
        raise UserError(f"{key} {found}; expected an array of {of} axes")
    return shapes[key][axis]


def _width_of(shapes: Mapping[str, Shape], layer: str) -> int | None:
    """Returns the output width of a dense layer; None if there is no such layer."""
    return _axis(shapes, f"{layer}/kernel", 1, of=2) if any(key.startswith(f"{layer}/") for key in shapes) else None


def _groups(pattern: str, keys: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the different groups of a pattern's matches."""
    return sorted({match.groups() for key in keys if (match := re.match(pattern, key))})


def _count_units(pattern: str, keys: Iterable[str]) -> tuple[int, ...]:
    """Returns the number of units of each block of a ResNet."""
    blocks = [int(block) for block, _ in _groups(pattern, keys)]
    return tuple(blocks.count(block) for block in sorted(set(blocks)))


_READERS: dict[str, tuple[str, Callable[[Mapping[str, Shape]], tuple[Sizes, int]]]] = {
    "vit": ("Transformer/encoderblock_", _vit_sizes),
    "resnet50": ("resnet/block", _resnet_sizes),
}
"""Architecture -> (how some keys of its parameters start, shapes -> (sizes, number of patches))."""
