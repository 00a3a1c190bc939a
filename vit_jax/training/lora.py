"""LoRA (Hu et al. 2022): low-rank weights in a subtree "lora"; all other parameters keep their names.

The LoRA weights of `Transformer/…/query/kernel` are `lora/Transformer/…/query/kernel/{a,b}`, so the tree is split,
saved and counted like any other. The model is applied to `merge_lora_weights(params)`.
"""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.runtime.errors import UsageError
from vit_jax.types import Params


def add_lora_weights(key: jax.Array, params: Params, *, rank: int, targets: Sequence[str]) -> Params:
    """Adds "lora" to a tree: `a` [*inputs, rank] and `b` [rank, *outputs] of the kernels that `targets` match.

    A kernel is treated as a matrix from inputs to outputs: [d, (k h)] for query, key and value, whose heads are
    outputs; [(…), d] otherwise. `a` is uniform with variance 1 / (3 · inputs), as in Hugging Face's peft; `b` is zero.
    """
    flat = flatten_dict(params, sep="/")
    for target in targets:
        matches = [path for path in flat if re.fullmatch(target, path)]
        others = [path for path in matches if not path.endswith("/kernel")]
        if others or not matches:
            kernels = [path for path in flat if path.endswith("/kernel")][-8:]
            raise UsageError(
                f"lora.targets: {target!r} matches {', '.join(others[:3]) or 'no parameter'}; expected kernels only, "
                f"such as {', '.join(kernels)}"
            )
    paths = [path for path in flat if any(re.fullmatch(target, path) for target in targets)]
    weights = {}
    for path, path_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        split = 1 if re.search(r"/(query|key|value)/kernel$", path) else -1
        inputs, outputs = flat[path].shape[:split], flat[path].shape[split:]
        bound = 1.0 / math.sqrt(math.prod(inputs))
        weights[f"{path}/a"] = jax.random.uniform(path_key, (*inputs, rank), minval=-bound, maxval=bound)
        weights[f"{path}/b"] = jnp.zeros((rank, *outputs))
    return {**params, "lora": unflatten_dict(weights, sep="/")}


def merge_lora_weights(params: Params, *, alpha: float) -> Params:
    """Adds the LoRA weights to their kernels, W + alpha / rank · a · b; returns a tree without "lora"."""
    if "lora" not in params:
        return params
    flat = flatten_dict({name: branch for name, branch in params.items() if name != "lora"})
    weights = flatten_dict(params["lora"])
    for (*path, factor), a in weights.items():
        if factor == "a":
            product = jnp.tensordot(a, weights[(*path, "b")], axes=1, precision="highest")
            flat[tuple(path)] = flat[tuple(path)] + alpha / a.shape[-1] * product
    merged: Params = unflatten_dict(flat)
    return merged
