"""Model arguments and initial parameters."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from vit_jax import models, pretrained
from vit_jax.pretrained import ModelMetadata
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.types import ImageModel, Params

_NOT_IN_SHAPES = ("gelu_approximate", "layer_norm_epsilon")
"""Model arguments that change the outputs, but not the shapes of the parameters."""


class Pretrained(NamedTuple):
    """A pretrained checkpoint: its name or path, parameters, and metadata if it has any."""

    name: str
    params: Params
    metadata: ModelMetadata | None


def load_pretrained(name_or_path: str) -> Pretrained | None:
    """Loads a pretrained checkpoint; returns None for the empty name, which means training from scratch."""
    return Pretrained(name_or_path, *pretrained.read_model(name_or_path)) if name_or_path else None


def model_arguments(arguments: Mapping[str, Any], architecture: str, source: Pretrained | None) -> dict[str, Any]:
    """Returns constructor arguments: those given, completed by the pretrained checkpoint, which they must match."""
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    if source is None:
        if not given:
            raise UsageError("config.model is empty; set the model's sizes, or a pretrained checkpoint that has them")
        return given
    try:
        found, sizes = pretrained.infer_sizes(source.params)
    except UserError as error:
        raise UserError(f"{source.name}: {error}") from error
    sizes = {key: value for key, value in sizes.items() if key not in ("num_classes", "representation_size")}
    wrong = [
        f"{key} {given[key]} (checkpoint: {sizes[key]})" for key in sizes if given.get(key, sizes[key]) != sizes[key]
    ]
    if found != architecture:
        wrong = [f"{architecture} (checkpoint: {found})"]
    if wrong:
        raise UsageError(
            f"config.model does not match {source.name}: {', '.join(wrong)}; correct one of the two, "
            "or leave config.model empty to use the sizes of the checkpoint"
        )
    in_metadata = source.metadata.model if source.metadata else {}
    return {key: in_metadata[key] for key in _NOT_IN_SHAPES if key in in_metadata} | sizes | given


def needs_pretrained(arguments: Mapping[str, Any], architecture: str) -> bool:
    """Returns True if sizes of the model must be read from a pretrained checkpoint."""
    return not set(arguments) >= set(models.ARCHITECTURES[architecture].SIZES)


def create_params(model: ImageModel, source: Pretrained | None, *, image_size: int, seed: int) -> Params:
    """Returns the initial parameters, random or adapted from the checkpoint, and prints which."""
    init = functools.partial(init_params, model, image_size=image_size, seed=seed)
    if source is None:
        print("parameters are randomly initialized")
        initialized: Params = jax.jit(init)()
        return initialized
    head = jax.jit(lambda: init()["head"])()  # the compiler drops the initialization of everything else
    params, report = pretrained.adapt_params(source.params, {**jax.eval_shape(init), "head": head})
    print(f"{source.name}\n{report}")
    return params


def init_params(model: ImageModel, *, image_size: int, seed: int) -> Params:
    """Returns randomly initialized parameters."""
    params: Params = model.init(jax.random.PRNGKey(seed), jnp.zeros((1, image_size, image_size, 3)))["params"]
    return params


def has_dropout(model: ImageModel) -> bool:
    """Returns True if any dropout rate of the model is above zero."""
    return any(value > 0 for name, value in vars(model).items() if name.endswith("_rate"))


def check_head(trainable: Params, model: ImageModel) -> None:
    """Raises UsageError if the kernel of the head is zero and frozen: no parameter below it would get a gradient."""
    paths = flatten_dict(trainable, sep="/").keys()
    if model.head_init == "zeros" and not paths & {"head/kernel", "lora/head/kernel/b"}:
        raise UsageError(
            "trainable does not match head/kernel, which is initialized to zero, so no parameter below the head would "
            "get a gradient; add 'head/.*', or set ablation.head_init to 'xavier'"
        )
