"""Linen modules whose parameter names are the keys of the pretrained checkpoints."""

import dataclasses
import types
import typing
from collections.abc import Mapping

import jax.numpy as jnp

from vit_jax.models.attention import IMPLEMENTATIONS
from vit_jax.models.common import HEAD_INITS, REMAT_POLICIES
from vit_jax.models.resnet import ResNet
from vit_jax.models.vit import POOLS, VisionTransformer
from vit_jax.runtime.errors import UsageError
from vit_jax.types import ImageModel

__all__ = [
    "ARCHITECTURES",
    "HEAD_INITS",
    "POOLS",
    "REMAT_POLICIES",
    "ResNet",
    "VisionTransformer",
    "create_model",
    "model_arguments",
]

ARCHITECTURES: dict[str, type[VisionTransformer] | type[ResNet]] = {"vit": VisionTransformer, "resnet50": ResNet}

_CHOICES = {"attention": IMPLEMENTATIONS, "head_init": HEAD_INITS, "pool": POOLS}
_NOT_ARGUMENTS = ("num_classes", "dtype", "remat", "parent", "name")
_MAX_SIZE = 2**16


def create_model(
    architecture: str,
    arguments: Mapping[str, object],
    *,
    num_classes: int | None,
    dtype: str = "float32",
    remat: str = "none",
) -> ImageModel:
    """Creates a module after validating its arguments; lists, as in JSON, are converted to tuples.

    Raises:
        UsageError: an unknown architecture, an unknown argument, or a value of a wrong type or range.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(f"architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    module = ARCHITECTURES[architecture]
    annotations = {field.name: field.type for field in dataclasses.fields(module) if field.name not in _NOT_ARGUMENTS}
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    for name, value in arguments.items():
        if name not in annotations:
            raise UsageError(f"model.{name}: {module.__name__} has no such argument; expected {', '.join(annotations)}")
        if expected := _expected(name, annotations[name], value):
            raise UsageError(f"model.{name} is {value!r}; expected {expected}")
    create: typing.Any = module
    model: ImageModel = create(num_classes=num_classes, dtype=jnp.dtype(dtype), remat=remat, **arguments)
    model.validate()
    return model


def model_arguments(model: ImageModel) -> dict[str, typing.Any]:
    """Returns the constructor arguments of a module, except `dtype`, `remat` and `attention`."""
    names = [field.name for field in dataclasses.fields(typing.cast(typing.Any, model))]
    excluded = (*_NOT_ARGUMENTS[1:], "attention")
    return {name: getattr(model, name) for name in names if name not in excluded}


def _expected(name: str, annotation: object, value: object) -> str:
    """Describes the valid values of an argument; "" if `value` is valid."""
    kinds = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    optional = types.NoneType in kinds
    if name in _CHOICES:
        valid, expected = value in tuple(_CHOICES[name]), f"one of {', '.join(_CHOICES[name])}"
    elif bool in kinds:
        valid, expected = isinstance(value, bool), "True or False"
    elif float in kinds:
        valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        expected = "a number in [0, 1)"
    elif int in kinds:
        valid, expected = _is_size(value), f"a positive integer up to {_MAX_SIZE:,}"
    else:
        valid = isinstance(value, tuple) and all(map(_is_size, value)) and (bool(value) or optional)
        expected = f"a tuple of positive integers up to {_MAX_SIZE:,}"
    if valid or (optional and value is None):
        return ""
    return f"None, or {expected}" if optional else expected


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= _MAX_SIZE
