"""From a config and a released file to the model and its parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import vit_jax
from vit_jax import pretrained
from vit_jax.errors import UsageError, UserError
from vit_jax.models import HEAD_INITS, VisionTransformer
from vit_jax.types import Params


def load_source(config: ConfigDict) -> Params | None:
    """The parameters of the pretrained file, or None where the run starts from scratch."""
    return pretrained.load_npz(pretrained.resolve(config.pretrained)) if config.pretrained else None


def create_model(config: ConfigDict, source: Params | None, *, num_classes: int) -> VisionTransformer:
    """The module. Sizes that `config.model` leaves out are read off the file; those it gives must be the file's."""
    arguments = config.model.to_dict()
    if source is not None:
        try:
            sizes = pretrained.infer_architecture(source)
        except UserError as error:
            raise UserError(f"{config.pretrained}: {error}") from error
        arguments = agree(arguments, sizes, config.pretrained)
    elif not arguments:
        raise UsageError("config.model is empty: give the model's sizes, or a pretrained file to read them off")
    return build_model(
        arguments, num_classes=num_classes, dtype=config.dtype, image_size=config.image_size, remat=config.remat
    )


def create_params(config: ConfigDict, model: VisionTransformer, source: Params | None) -> Params:
    """The parameters before the first update, adapted from the file or drawn at random; says what it did."""
    init = init_params(model, config)
    if source is None:
        print("parameters drawn at random")
        return jax.jit(init)()
    # The compiler leaves out all that this does not return, so that only the head is really drawn.
    head = jax.jit(lambda: init()["head"])()
    params, report = pretrained.adapt_params(source, {**jax.eval_shape(init), "head": head})
    print(f"{config.pretrained}\n{report}")
    return params


def init_params(model: VisionTransformer, config: ConfigDict) -> Callable[[], Params]:
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


def build_model(
    arguments: dict[str, Any], *, num_classes: int, dtype: str, image_size: int, remat: str = "none"
) -> VisionTransformer:
    """The module, its arguments checked."""
    fields = {field.name: field.type for field in dataclasses.fields(VisionTransformer)}
    for key, value in arguments.items():
        if key not in fields or key in ("num_classes", "dtype", "remat", "parent", "name"):
            raise UsageError(f"config.model.{key}: VisionTransformer has no such argument")
        if key == "head_init":
            if value not in HEAD_INITS:
                raise UsageError(f"config.model.{key} is {value!r}; expected one of {', '.join(HEAD_INITS)}")
        elif fields[key] is bool:
            if not isinstance(value, bool):
                raise UsageError(f"config.model.{key} is {value!r}; expected True or False")
        elif key.endswith("_rate"):
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise UsageError(f"config.model.{key} is {value!r}; expected a number of at least 0 and below 1")
        elif value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"config.model.{key} is {value!r}; expected a whole number of at least 1")
    model = VisionTransformer(num_classes=num_classes, dtype=jnp.dtype(dtype), remat=remat, **arguments)
    if model.hidden_size % model.num_heads:
        raise UsageError(f"config.model: hidden_size {model.hidden_size} does not divide into {model.num_heads} heads")
    if image_size % model.patch_size:
        raise UsageError(f"config.image_size {image_size} is not a multiple of the patch, {model.patch_size} pixels")
    return model


def describe(config: ConfigDict, model: VisionTransformer, class_names: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint says of its model, as JSON values."""
    skipped = ("parent", "name", "dtype", "remat")
    arguments = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in skipped}
    return {
        "vit_jax": vit_jax.__version__,
        "architecture": config.architecture,
        "model": arguments,
        "image_size": config.image_size,
        "pixel_mean": list(config.pixel_mean),
        "pixel_deviation": list(config.pixel_deviation),
        "class_names": list(class_names),
    }
