"""Which parameters train, the learning rate over the steps, and the chain of gradient transformations."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax.errors import UsageError
from vit_jax.types import Params

MODES: dict[str, tuple[str, ...]] = {
    "full": (r".*",),
    "head": (r"head/.*",),
}
"""What each mode trains: regular expressions that match a whole parameter path."""

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "linear", "constant")


def trainable_patterns(trainable: str | Sequence[str]) -> tuple[str, ...]:
    """A mode's name, or regular expressions, as regular expressions.

    Raises:
        UsageError: no such mode, not a text or texts, or not a regular expression.
    """
    if isinstance(trainable, str):
        if trainable not in MODES:
            raise UsageError(
                f"config.trainable: no mode {trainable!r}; modes are {', '.join(MODES)}, "
                "or give a tuple of regular expressions over parameter paths"
            )
        return MODES[trainable]
    patterns = tuple(trainable)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UsageError(f"config.trainable: {pattern!r} is not a regular expression: {error}") from error
    return patterns


def split_params(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """Parts parameters into those that train and those that stay as they are.

    Only the first part is differentiated and has optimizer state, so frozen leaves cost nothing and stay
    bit-identical. (`optax.masked` alone would pass the other gradients through unchanged.)

    Args:
        params: nested dictionary.
        patterns: regular expressions that match whole paths such as "head/kernel".

    Returns:
        (trainable, frozen): nested dictionaries; `merge_params` puts them together again.

    Raises:
        UsageError: a pattern matches no parameter, or there is none.
    """
    flat = flatten_dict(params, sep="/")
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in flat):
            raise UsageError(
                f"config.trainable: {pattern!r} matches no parameter; paths look like {', '.join(list(flat)[-4:])}"
            )
    if not patterns:
        raise UsageError("config.trainable is empty: name a mode or at least one regular expression")
    chosen = {path for path in flat if any(re.fullmatch(pattern, path) for pattern in patterns)}
    trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def merge_params(trainable: Params, frozen: Params) -> Params:
    """The inverse of `split_params`."""
    return unflatten_dict({**flatten_dict(trainable), **flatten_dict(frozen)})


def describe_trainable(params: Params, patterns: Sequence[str]) -> str:
    """A table: for each pattern the arrays and numbers it trains, then the total."""
    sizes = {path: leaf.size for path, leaf in flatten_dict(params, sep="/").items()}
    rows = [(p, [size for path, size in sizes.items() if re.fullmatch(p, path)]) for p in patterns]
    chosen = [size for path, size in sizes.items() if any(re.fullmatch(p, path) for p in patterns)]
    width = max(len("trains"), *(len(pattern) for pattern in patterns))
    lines = [f"{'trains':<{width}}  {'arrays':>6}  {'parameters':>12}"]
    lines += [f"{pattern:<{width}}  {len(hits):>6}  {sum(hits):>12,}" for pattern, hits in rows]
    lines += [f"{'together':<{width}}  {len(chosen):>6}  {sum(chosen):>12,}  of {sum(sizes.values()):,}"]
    return "\n".join(lines)


def make_schedule(name: str, *, learning_rate: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """The learning rate of update i, counted from 0.

    `learning_rate · min(1, i / warmup_steps) · decay(p)` with p = (i - warmup_steps) / (num_steps - warmup_steps) cut
    to [0, 1]; decay is (1 + cos(pi p)) / 2, 1 - p, or 1. The first update of a warmed-up run has rate 0.

    Args:
        name: "cosine", "linear" or "constant".
        learning_rate: the peak.
        warmup_steps: updates until the peak; 0 starts there.
        num_steps: updates in all.
    """

    def schedule(count: jax.Array) -> jax.Array:
        warmup = jnp.minimum(1.0, count / warmup_steps) if warmup_steps else 1.0
        progress = jnp.clip((count - warmup_steps) / max(1, num_steps - warmup_steps), 0.0, 1.0)
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
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """The chain: clip, then L2, then momentum; or clip, then AdamW.

    Args:
        name: "sgd" or "adamw".
        schedule: count -> learning rate.
        momentum: of sgd.
        momentum_dtype: sgd's accumulator, "float32" or "bfloat16".
        weight_decay: sgd: added to the gradient (L2); adamw: decoupled (Loshchilov and Hutter 2019).
        clip_norm: bound on the global norm of the gradient; 0 leaves it.
    """
    chain = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if name == "adamw":
        return optax.chain(*chain, optax.adamw(schedule, weight_decay=weight_decay))
    if weight_decay:
        chain.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*chain, optax.sgd(schedule, momentum=momentum, accumulator_dtype=jnp.dtype(momentum_dtype)))
