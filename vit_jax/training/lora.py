"""Low-rank adaptation (Hu et al. 2022): small factors beside the parameter tree, which keeps the released names.

The factors of `Transformer/…/query/kernel` are `lora/Transformer/…/query/kernel/{a,b}`, so that a tree with factors is
split, saved and counted like any other. The model never sees them: it gets `merge_lora_weights(params)`.
"""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.runtime.errors import UsageError
from vit_jax.types import Params


def is_requested(params: Params, patterns: Sequence[str]) -> bool:
    """Returns whether a pattern of trainable parameters names LoRA weights.

    It does if it matches `lora/<kernel>/a` or `lora/<kernel>/b` for some kernel, and would not match with another word
    in the place of `lora`: `lora/.*` and `(lora|head)/.*` name them, `.*` and `.*/MlpBlock_3/.*` do not.

    Args:
        params: nested dictionary, without LoRA weights.
        patterns: regular expressions that match whole paths.
    """
    kernels = [path for path in flatten_dict(params, sep="/") if path.endswith("/kernel")]
    names = [f"{kernel}/{factor}" for kernel in kernels for factor in "ab"]
    return any(
        re.fullmatch(pattern, f"lora/{name}") and not re.fullmatch(pattern, f"xxxx/{name}")
        for pattern in patterns
        for name in names
    )


def add_lora_weights(key: jax.Array, params: Params, *, rank: int, targets: Sequence[str]) -> Params:
    """Adds factors for the kernels that are to be adapted; at first their product is zero.

    A kernel is taken as a matrix from its inputs to its outputs: [d, (k h)] for queries, keys and values, whose heads
    are outputs; [(…), d] for any other. `a` is drawn from a normal distribution of variance 1 / inputs, `b` is zero.

    Args:
        key: random key.
        params: nested dictionary of arrays, without factors.
        rank: of every product.
        targets: regular expressions that match whole paths of kernels.

    Returns:
        `params` and, under "lora", for every kernel of shape (*inputs, *outputs) "a" (*inputs, rank) and "b"
        (rank, *outputs).

    Raises:
        UsageError: a target matches nothing, or something that is not a kernel.
    """
    flat = flatten_dict(params, sep="/")
    for target in targets:
        if not any(re.fullmatch(target, path) for path in flat):
            kernels = [path for path in flat if path.endswith("/kernel")][-8:]
            raise UsageError(
                f"config.lora.targets: {target!r} matches no parameter; kernels look like {', '.join(kernels)}"
            )
    paths = [path for path in flat if any(re.fullmatch(target, path) for target in targets)]
    others = [path for path in paths if path.rpartition("/")[2] != "kernel"]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UsageError(
            f"config.lora.targets matches {', '.join(others[:3])}{more}; expected kernels only, as in '.*/query/kernel'"
        )
    factors = {}
    for path, path_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        shape = flat[path].shape
        split = _num_input_axes(path, len(shape))
        inputs, outputs = shape[:split], shape[split:]
        scale = 1.0 / math.sqrt(math.prod(inputs))
        factors[f"{path}/a"] = scale * jax.random.normal(path_key, (*inputs, rank))
        factors[f"{path}/b"] = jnp.zeros((rank, *outputs))
    return {**params, "lora": unflatten_dict(factors, sep="/")}


def merge_lora_weights(params: Params, *, alpha: float) -> Params:
    """Adds each product to its kernel: W + alpha / rank · a · b.

    Args:
        params: as `add_lora_weights` gives them, or a tree without factors, which is returned as it is.
        alpha: scale of the products, whatever the rank.

    Returns:
        A tree with the released names alone.
    """
    if "lora" not in params:
        return params
    flat = flatten_dict({name: branch for name, branch in params.items() if name != "lora"})
    factors = flatten_dict(params["lora"])
    for (*path, _), a in ((path, leaf) for path, leaf in factors.items() if path[-1] == "a"):
        rank = a.shape[-1]
        product = jnp.tensordot(a, factors[(*path, "b")], axes=1, precision="highest")
        flat[tuple(path)] = flat[tuple(path)] + alpha / rank * product
    return unflatten_dict(flat)


def _num_input_axes(path: str, num_axes: int) -> int:
    """How many axes of a kernel are inputs; the heads of queries, keys and values are outputs."""
    return 1 if re.search(r"/(query|key|value)/kernel$", path) else num_axes - 1
