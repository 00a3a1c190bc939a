"""Trainable parameters, learning-rate schedules and optimizers."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.runtime.errors import UsageError
from vit_jax.types import ImageModel, Params

MODES: dict[str, tuple[str, ...]] = {
    "full": (r".*",),
    "head": (r"head/.*",),
    "mlp": (r".*/MlpBlock_3/.*", r"head/.*"),
    "attention": (r".*/MultiHeadDotProductAttention_1/.*", r"head/.*"),
    "bias": (r".*/bias", r".*/scale", r"head/.*"),
    "lora": (r"lora/.*", r"head/.*"),
}
"""Trainable parameters of each mode: regular expressions that match a whole parameter path."""

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("cosine", "linear", "constant")
DECAYED = ("all", "kernels")


def trainable_patterns(trainable: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the regular expressions of a mode, a key of `MODES`, or the given ones."""
    return MODES[trainable] if isinstance(trainable, str) else tuple(trainable)


def split_params(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """Splits parameters into (trainable, frozen) nested dictionaries; trainable paths match any of the patterns.

    Only trainable parameters have gradients and optimizer state, so frozen ones cost nothing and stay bit-identical.
    (`optax.masked` alone would pass the other gradients through unchanged.)
    """
    flat = flatten_dict(params, sep="/")
    for pattern in patterns:
        if not any(_is_match(path, [pattern]) for path in flat):
            raise UsageError(
                f"trainable: {pattern!r} matches no parameter; expected full, head, bias, or regular expressions of "
                f"whole paths, such as {', '.join([*flat][-4:])}"
            )
    trainable = {path: leaf for path, leaf in flat.items() if _is_match(path, patterns)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trainable}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def _is_match(path: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def merge_params(trainable: Params, frozen: Params) -> Params:
    """Inverts `split_params`; for paths in both trees, returns the leaf of the first."""
    merged: Params = unflatten_dict({**flatten_dict(frozen), **flatten_dict(trainable)})
    return merged


def describe_trainable(params: Params, patterns: Sequence[str]) -> str:
    """Returns a table: the number of arrays and parameters that each pattern matches, and the total."""
    flat = flatten_dict(params, sep="/")
    width = max(len("trainable"), *map(len, patterns))
    lines = [f"{'trainable':<{width}}  {'arrays':>6}  {'parameters':>12}"]
    for name, alternatives in [*((pattern, [pattern]) for pattern in patterns), ("total", patterns)]:
        sizes = [leaf.size for path, leaf in flat.items() if _is_match(path, alternatives)]
        lines.append(f"{name:<{width}}  {len(sizes):>6}  {sum(sizes):>12,}")
    return "\n".join(lines) + f"  of {sum(leaf.size for leaf in flat.values()):,}"


def make_schedule(
    name: str, *, learning_rate: float, warmup_steps: int, num_steps: int, hold_steps: int = 1
) -> optax.Schedule:
    """Returns the learning rate of update i, counted from 0.

    `learning_rate * min(1, i / warmup_steps) * decay(p)` with p = (i - warmup_steps) / (num_steps - warmup_steps)
    clipped to [0, 1]; decay is (1 + cos(pi * p)) / 2, 1 - p, or 1. The first update of a warmed-up run has rate 0.
    After the warm-up the rate changes every `hold_steps` updates.
    """

    def schedule(count: jax.Array) -> jax.Array:
        warmup = jnp.minimum(1.0, count / warmup_steps) if warmup_steps else 1.0
        held = count // hold_steps * hold_steps
        progress = jnp.clip((held - warmup_steps) / max(1, num_steps - warmup_steps), 0.0, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        decay = {"cosine": cosine, "linear": 1.0 - progress, "constant": jnp.ones(())}[name]
        return jnp.asarray(learning_rate * warmup * decay, jnp.result_type(float))

    return schedule


def create_optimizer(
    name: str,
    *,
    schedule: optax.Schedule,
    momentum: float = 0.9,
    momentum_dtype: str = "float32",
    weight_decay: float = 0.0,
    decayed: str = "all",
    clip_norm: float = 0.0,
    layer_decay: float = 1.0,
    model: ImageModel | None = None,
) -> optax.GradientTransformation:
    """Returns the chain: clip, then L2, then momentum or Adam, then the learning rate, scaled by layer; or AdamW.

    Names are "sgd", "adam" (Kingma and Ba 2015) and "adamw", whose weight decay is decoupled (Loshchilov and Hutter
    2019). `model` is needed for `layer_decay`; the other arguments are config keys.
    """
    mask = _are_kernels if decayed == "kernels" else None
    chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if weight_decay and name != "adamw":
        chain.append(optax.add_decayed_weights(weight_decay, mask=mask))
    if name == "sgd":
        chain.append(optax.sgd(schedule, momentum=momentum, accumulator_dtype=jnp.dtype(momentum_dtype)))
    elif name == "adam":
        chain.append(optax.adam(schedule))
    else:
        chain.append(optax.adamw(schedule, weight_decay=weight_decay, mask=mask))
    if layer_decay != 1.0:
        assert model is not None, "layer_decay needs the model"
        chain.append(scale_by_layer(model, layer_decay))
    return optax.chain(*chain)


def scale_by_layer(model: ImageModel, layer_decay: float) -> optax.GradientTransformation:
    """Multiplies updates by `layer_decay ** (last - layer)`; layers are from `model.layer_index`, the head is the last.

    Source: Bao et al. 2022, "BEiT", appendix; Clark et al. 2020, "ELECTRA".
    """
    last = model.layer_index("head/kernel")

    def scale(updates: Params, params: Params | None = None) -> Params:
        flat = flatten_dict(updates, sep="/")
        scaled = {path: leaf * layer_decay ** (last - model.layer_index(path)) for path, leaf in flat.items()}
        result: Params = unflatten_dict(scaled, sep="/")
        return result

    return optax.stateless(scale)


def _are_kernels(params: Params) -> Params:
    """Returns a mask that is True for kernels and LoRA weights."""
    mask: Params = unflatten_dict({path: path[-1] == "kernel" or path[0] == "lora" for path in flatten_dict(params)})
    return mask
