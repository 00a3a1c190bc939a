"""LoRA (Hu et al. 2022): low-rank weights beside the parameter tree, which keeps the names of the checkpoints.

The LoRA weights of `Transformer/…/query/kernel` are `lora/Transformer/…/query/kernel/{a,b}`, so that such a tree is
split, saved and counted like any other. The model gets `merge_lora_weights(params)`.
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
    """Adds LoRA weights for some kernels; at first their product is zero.

    A kernel is taken as a matrix from its inputs to its outputs: [d, (k h)] for queries, keys and values, whose heads
    are outputs; [(…), d] for any other. `a` is sampled from a normal distribution of variance 1 / inputs, `b` is zero.

    Args:
        key: random key.
        params: nested dictionary of arrays, without LoRA weights.
        rank: of every product.
        targets: regular expressions that match whole paths of kernels.

    Returns:
        `params` and, under "lora", for every kernel of shape (*inputs, *outputs) "a" (*inputs, rank) and "b"
        (rank, *outputs).

    Raises:
        UsageError: a target matches nothing, or something that is not a kernel.
    """
    flat = flatten_dict(params, sep="/")
    matches = {target: [path for path in flat if re.fullmatch(target, path)] for target in targets}
    for target, paths in matches.items():
        others = [path for path in paths if not path.endswith("/kernel")]
        if others or not paths:
            kernels = [path for path in flat if path.endswith("/kernel")][-8:]
            raise UsageError(
                f"lora.targets: {target!r} matches {', '.join(others[:3]) or 'no parameter'}; expected kernels only, "
                f"such as {', '.join(kernels)}"
            )
    paths = [path for path in flat if any(path in matches[target] for target in targets)]
    weights = {}
    for path, path_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        shape = flat[path].shape
        split = _num_input_axes(path, len(shape))
        inputs, outputs = shape[:split], shape[split:]
        scale = 1.0 / math.sqrt(math.prod(inputs))
        weights[f"{path}/a"] = scale * jax.random.normal(path_key, (*inputs, rank))
        weights[f"{path}/b"] = jnp.zeros((rank, *outputs))
    return {**params, "lora": unflatten_dict(weights, sep="/")}


def merge_lora_weights(params: Params, *, alpha: float) -> Params:
    """Adds each product to its kernel: W + alpha / rank · a · b.

    Args:
        params: of `add_lora_weights`, or a tree without LoRA weights, which is returned unchanged.
        alpha: scale of the products, whatever the rank.

    Returns:
        A tree without LoRA weights.
    """
    if "lora" not in params:
        return params
    flat = flatten_dict({name: branch for name, branch in params.items() if name != "lora"})
    weights = flatten_dict(params["lora"])
    for (*path, _), a in ((path, leaf) for path, leaf in weights.items() if path[-1] == "a"):
        rank = a.shape[-1]
        product = jnp.tensordot(a, weights[(*path, "b")], axes=1, precision="highest")
        flat[tuple(path)] = flat[tuple(path)] + alpha / rank * product
    merged: Params = unflatten_dict(flat)
    return merged


def _num_input_axes(path: str, num_axes: int) -> int:
    """Returns the number of input axes of a kernel; the heads of queries, keys and values are outputs."""
    return 1 if re.search(r"/(query|key|value)/kernel$", path) else num_axes - 1
