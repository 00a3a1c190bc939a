"""From a config and a released file to the model and its parameters."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import vit_jax
from vit_jax import config as settings
from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.models import ARCHITECTURES, HEAD_INITS, POOLS
from vit_jax.runtime.errors import UsageError, UserError, one_line
from vit_jax.types import Params

INFER = {"vit": pretrained.infer_architecture, "resnet50": pretrained.infer_resnet}
"""`config.architecture` -> what reads a model's sizes off a file."""

_NOT_IN_SHAPES = ("gelu_approximate", "layer_norm_epsilon")
"""Arguments that are part of what parameters mean, and that their shapes do not tell."""

_LARGEST_SIZE = 2**16
"""Of a module's constructor arguments: larger models than there are, and no tracing without end."""


class Source(NamedTuple):
    """What a run starts from: parameters, and what their file says of the model, if it does."""

    params: Params
    about: dict[str, Any] | None


def load_source(config: ConfigDict) -> Source | None:
    """Reads the pretrained file; None where the run starts from scratch."""
    if not config.pretrained:
        return None
    params, about = pretrained.read_model(config.pretrained)
    try:
        if about is not None:
            check_about(about, params)
    except UserError as error:
        raise UserError(f"{config.pretrained}: {error}") from error
    return Source(params, about)


def create_model(config: ConfigDict, source: Source | None, *, num_classes: int) -> Any:
    """The module. What `config.model` leaves out is read off the file; sizes that it gives must be the file's."""
    arguments = _with_tuples(config.model.to_dict())
    if source is not None:
        try:
            sizes = INFER[config.architecture](source.params)
        except UserError as error:
            raise UserError(f"{config.pretrained}: {error}") from error
        said = source.about["model"] if source.about else {}
        meant = {key: said[key] for key in _NOT_IN_SHAPES if key in said}
        arguments = meant | agree(arguments, sizes, config.pretrained)
    elif not arguments:
        raise UsageError("config.model is empty: give the model's sizes, or a pretrained file to read them off")
    return build_model(
        config.architecture,
        arguments | {"head_init": config.ablation.head_init},
        num_classes=num_classes,
        dtype=config.dtype,
        image_size=config.image_size,
        remat=config.remat,
    )


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


def build_model(
    architecture: str,
    arguments: dict[str, Any],
    *,
    num_classes: int,
    dtype: str = "float32",
    image_size: int | None = None,
    remat: str = "none",
) -> Any:
    """The module, its arguments checked.

    Args:
        architecture: a key of `ARCHITECTURES`.
        arguments: of its constructor, as they come from a config or from JSON.
        num_classes: of the head.
        dtype: of the computation.
        image_size: pixels, that the model has to take; None checks none.
        remat: see the module.
    """
    module = ARCHITECTURES[architecture]
    fields = {field.name: field.type for field in dataclasses.fields(module)}
    arguments = _with_tuples(arguments)
    for key, value in arguments.items():
        if key not in fields or key in ("num_classes", "dtype", "remat", "parent", "name"):
            raise UsageError(f"config.model.{key}: {module.__name__} has no such argument")
        expected = _expected(key, fields[key], value)
        if expected:
            raise UsageError(f"config.model.{key} is {value!r}; expected {expected}")
    model = module(num_classes=num_classes, dtype=jnp.dtype(dtype), remat=remat, **arguments)
    complaint = model.complaint(image_size) if image_size is not None else ""
    if complaint:
        raise UsageError(complaint)
    return model


def _with_tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    """Lists, as configs and JSON have them, as the tuples that modules and files have."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}


def _expected(key: str, kind: Any, value: Any) -> str:
    """What a constructor's argument should be, where it is not."""

    def is_size(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= _LARGEST_SIZE

    bounds = f"of at least 1, at most {_LARGEST_SIZE:,}"
    size, sizes = f"a whole number {bounds}", f"a tuple of whole numbers {bounds}"

    def are_sizes(numbers: Any) -> bool:
        return isinstance(numbers, tuple) and all(map(is_size, numbers))

    checks = {
        "head_init": (value in HEAD_INITS, f"one of {', '.join(HEAD_INITS)}"),
        "pool": (value in POOLS, f"one of {', '.join(POOLS)}"),
        bool: (isinstance(value, bool), "True or False"),
        float: (isinstance(value, int | float) and 0 <= value < 1, "a number of at least 0 and below 1"),
        int: (is_size(value), size),
        int | None: (value is None or is_size(value), size),
        tuple[int, ...]: (are_sizes(value) and bool(value), sizes),
        tuple[int, ...] | None: (value is None or are_sizes(value), f"None, or {sizes}"),
    }
    holds, expected = checks.get(key) or checks[kind]
    return "" if holds else expected


def describe(config: ConfigDict, model: Any, class_names: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint says of its model, as JSON values."""
    skipped = ("parent", "name", "dtype", "remat")
    arguments = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in skipped}
    return {
        "vit_jax": vit_jax.__version__,
        "architecture": config.architecture,
        "model": arguments,
        "dtype": config.dtype,
        "image_size": config.image_size,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
        "class_names": list(class_names),
    }


def rebuild_model(about: dict[str, Any], params: Params) -> Any:
    """Creates the module that metadata describes; exports of older versions, without "dtype", compute in float32.

    Raises:
        UserError: the description is none, or not that of the parameters.
    """
    check_about(about, params)
    sizes, dtype = dict(about["model"]), about.get("dtype", "float32")
    try:
        return build_model(about["architecture"], sizes, num_classes=sizes.pop("num_classes"), dtype=dtype)
    except UsageError as error:
        raise _damaged(one_line(error)) from error


def check_about(about: dict[str, Any], params: Params) -> None:
    """Compares a description with what `describe` writes, and with the parameters beside it.

    Raises:
        UserError: the description is none, or not that of the parameters.
    """
    values = {"dtype": "float32"} | about
    stored = ("architecture", "dtype", "image_size", "image_mean", "image_std")
    for key in settings.KEYS:
        if key.name in stored and not key.check.accepts(values.get(key.name)):
            raise _damaged(f"{key.name} is {values.get(key.name)!r}; expected {key.check.expected}")
    names = about.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _damaged(f"class_names is {names!r}; expected a list of texts")
    if not isinstance(about.get("model"), dict):
        raise _damaged("it names no model")
    architecture = about["architecture"]
    said, sizes = _with_tuples(about["model"]), INFER[architecture](params)
    said |= {"image_size": about["image_size"], "number of class_names": len(names)}
    image_size = image_size_of(params, sizes) or about["image_size"]
    sizes |= {"image_size": image_size, "number of class_names": sizes["num_classes"]}
    others = [f"{key} {said.get(key)} (parameters: {sizes[key]})" for key in sizes if said.get(key) != sizes[key]]
    if others:
        raise _damaged(", ".join(others))


def _damaged(why: str) -> UserError:
    return UserError(f"what the file says of its model is damaged ({why}); export it again")


def describe_file(params: Params) -> dict[str, Any]:
    """What can be told of a released file's model by its parameters: `describe`.

    The classes of a head of 1,000 are ImageNet's; others are numbers.

    Raises:
        UserError: it is of no known model, or of patches that are no square.
    """
    architecture = "resnet50" if "resnet" in params else "vit"
    sizes = INFER[architecture](params)
    num_classes = sizes["num_classes"] or 0
    names = [name for _, name in pretrained.imagenet_classes()]
    return {
        "architecture": architecture,
        "model": sizes,
        "dtype": "float32",
        "image_size": image_size_of(params, sizes) or 224,
        "image_mean": list(preprocess.HALF),
        "image_std": list(preprocess.HALF),
        "class_names": names if num_classes == len(names) else [str(i) for i in range(num_classes)],
    }


def image_size_of(params: Params, sizes: dict[str, Any]) -> int | None:
    """Pixels, square, that position embeddings are of; None for a model that has none.

    Args:
        params: of the model.
        sizes: read off them.

    Raises:
        UserError: they are not of a square.
    """
    if "Transformer" not in params:
        return None
    num_patches = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1] - ("cls" in params)
    side = math.isqrt(num_patches)
    if not side or side * side != num_patches:
        raise UserError(f"the position embeddings are of {num_patches} patches, which is not a square")
    return side * ARCHITECTURES["vit"](**sizes).pixels_per_patch
