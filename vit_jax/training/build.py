"""From a config and a released file to the model and its parameters."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vit_jax import models, pretrained
from vit_jax.models import ARCHITECTURES
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.types import Params

_NOT_IN_SHAPES = ("gelu_approximate", "layer_norm_epsilon")
"""Arguments that are part of what parameters mean, and that their shapes do not tell."""


class Source(NamedTuple):
    """What a run starts from: parameters, and what their file says of the model, if it does."""

    params: Params
    metadata: pretrained.ModelMetadata | None


def load_source(config: ConfigDict) -> Source | None:
    """Reads the pretrained file; None where the run starts from scratch."""
    if not config.pretrained:
        return None
    params, metadata = pretrained.read_model(config.pretrained)
    return Source(params, metadata)


def create_model(config: ConfigDict, source: Source | None, *, num_classes: int) -> Any:
    """The module. What `config.model` leaves out is read off the file; sizes that it gives must be the file's."""
    arguments = _with_tuples(config.model.to_dict())
    if source is not None:
        try:
            architecture, sizes = pretrained.infer_sizes(source.params)
            if architecture != config.architecture:
                raise UserError(f"it is a {architecture}; set architecture to {architecture!r}")
        except UserError as error:
            raise UserError(f"{config.pretrained}: {error}") from error
        said = source.metadata.model if source.metadata else {}
        meant = {key: said[key] for key in _NOT_IN_SHAPES if key in said}
        arguments = meant | agree(arguments, sizes, config.pretrained)
    elif not arguments:
        raise UsageError("config.model is empty: give the model's sizes, or a pretrained file to read them off")
    try:
        model = models.create_model(
            config.architecture, arguments, num_classes=num_classes, dtype=config.dtype, remat=config.remat
        )
        model.validate(config.image_size)
    except UsageError as error:
        raise UsageError(f"config.{error}") from error
    return model


def needs_file(config: ConfigDict) -> bool:
    """Whether the pretrained file is needed to know the model's sizes."""
    return bool(config.pretrained) and not set(config.model) >= set(ARCHITECTURES[config.architecture].SIZES)


def create_params(config: ConfigDict, model: Any, source: Source | None) -> Params:
    """The parameters before the first update, adapted from the file or drawn at random; says what it did."""
    init = init_params(model, config)
    if source is None:
        print("parameters drawn at random")
        return jax.jit(init)()
    # The compiler leaves out all that this does not return, so that only the head is really drawn.
    head = jax.jit(lambda: init()["head"])()
    params, report = pretrained.adapt_params(source.params, {**jax.eval_shape(init), "head": head})
    print(f"{config.pretrained}\n{report}")
    return params


def init_params(model: Any, config: ConfigDict) -> Callable[[], Params]:
    """Returns `() -> freshly drawn parameters`."""
    images = jnp.zeros((1, config.image_size, config.image_size, 3))
    return lambda: model.init(jax.random.PRNGKey(config.seed), images)["params"]


def agree(arguments: dict[str, Any], sizes: dict[str, Any], name: str) -> dict[str, Any]:
    """Fills constructor arguments up with the sizes read off a file; what both say must be equal."""
    sizes = {key: value for key, value in sizes.items() if key not in ("num_classes", "representation_size")}
    others = [
        f"{key} {arguments[key]} (file: {sizes[key]})" for key in sizes if arguments.get(key, sizes[key]) != sizes[key]
    ]
    if others:
        raise UsageError(
            f"config.model does not fit {name}, which is of another variant: {', '.join(others)}; "
            "mend one of the two, or leave config.model empty to take the file's sizes"
        )
    return sizes | arguments


def _with_tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    """Lists, as configs and JSON have them, as the tuples that modules and files have."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def describe(config: ConfigDict, model: Any, class_names: Sequence[str]) -> dict[str, Any]:
    """Returns the metadata of a model as JSON values."""
    metadata = pretrained.ModelMetadata.from_model(
        model,
        image_size=config.image_size,
        class_names=class_names,
        image_mean=config.image_mean,
        image_std=config.image_std,
    )
    return metadata.to_json()
