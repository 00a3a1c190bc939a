"""Metadata of a checkpoint: what its model is, which classes it predicts, and how its images are preprocessed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import jax.numpy as jnp

import vit_jax
from vit_jax.models import ARCHITECTURES, create_model, model_arguments
from vit_jax.pretrained.bit import infer_resnet
from vit_jax.pretrained.imagenet import imagenet_classes
from vit_jax.pretrained.infer import infer_architecture
from vit_jax.runtime.errors import UserError
from vit_jax.types import ImageModel, Params

Channels = tuple[float, float, float]
"""One number for each of red, green, blue."""


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """Metadata that every export and checkpoint carries.

    Attributes:
        architecture: a key of `models.ARCHITECTURES`.
        model: arguments of its constructor, `num_classes` included.
        image_size: height and width of the input in pixels.
        class_names: one per logit.
        dtype: of the computation.
        image_mean: per channel, of pixels from 0 to 1.
        image_std: per channel, on the same scale.
        vit_jax: version of the package that wrote it.
    """

    architecture: str
    model: Mapping[str, Any]
    image_size: int
    class_names: tuple[str, ...]
    dtype: str = "float32"
    image_mean: Channels = (0.5, 0.5, 0.5)
    image_std: Channels = (0.5, 0.5, 0.5)
    vit_jax: str = vit_jax.__version__

    @classmethod
    def from_model(
        cls,
        model: ImageModel,
        *,
        image_size: int,
        class_names: Sequence[str],
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> "ModelMetadata":
        """Returns the metadata of a module; arguments as the attributes."""
        return cls(
            architecture=next(name for name, module in ARCHITECTURES.items() if isinstance(model, module)),
            model=model_arguments(model),
            image_size=image_size,
            class_names=tuple(class_names),
            dtype=jnp.dtype(model.dtype).name,
            image_mean=_channels(image_mean),
            image_std=_channels(image_std),
        )

    @classmethod
    def from_params(cls, params: Params) -> "ModelMetadata":
        """Returns the metadata of a checkpoint that has none, such as Google's, from the shapes of its parameters.

        The classes of a head of 1,000 are those of ImageNet; other classes are named "0", "1", ….

        Raises:
            UserError: the parameters are of no known model, or position embeddings are not of a square.
        """
        architecture, sizes = infer_sizes(params)
        num_classes = sizes["num_classes"] or 0
        names = [name for _, name in imagenet_classes()]
        return cls(
            architecture=architecture,
            model=sizes,
            image_size=_infer_image_size(params, architecture, sizes) or 224,
            class_names=tuple(names if num_classes == len(names) else map(str, range(num_classes))),
        )

    @classmethod
    def from_json(cls, json: object) -> "ModelMetadata":
        """Reads what `to_json` returns, of this version or an older one; ignores unknown keys.

        Raises:
            UserError: a key is missing, or its value has a wrong type or range.
        """
        if not isinstance(json, dict):
            raise UserError(f"it is {str(json)[:50]!r}; expected an object")
        old_names = {"image_mean": json.get("pixel_mean"), "image_std": json.get("pixel_deviation")}
        value: dict[str, Any] = {"dtype": "float32", "vit_jax": ""} | old_names | json
        rules = {
            "architecture": (value.get("architecture") in tuple(ARCHITECTURES), f"one of {', '.join(ARCHITECTURES)}"),
            "model": (isinstance(value.get("model"), dict), "an object of constructor arguments"),
            "image_size": (_is_integer(value.get("image_size")), "a positive integer"),
            "class_names": (_are(value.get("class_names"), str), "a list of strings"),
            "dtype": (value["dtype"] in ("float32", "bfloat16", "float64"), "one of float32, bfloat16"),
            "image_mean": (_are_channels(value["image_mean"]), "three numbers from 0 to 1"),
            "image_std": (_are_channels(value["image_std"], above_zero=True), "three numbers above 0, at most 1"),
        }
        for key, (valid, expected) in rules.items():
            if not valid:
                raise UserError(f"{key} is {value.get(key)!r}; expected {expected}")
        tuples = {key: tuple(item) if isinstance(item, list) else item for key, item in value["model"].items()}
        return cls(
            architecture=value["architecture"],
            model=tuples,
            image_size=value["image_size"],
            class_names=tuple(value["class_names"]),
            dtype=value["dtype"],
            image_mean=_channels(value["image_mean"]),
            image_std=_channels(value["image_std"]),
            vit_jax=str(value["vit_jax"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes as JSON values."""
        value = dataclasses.asdict(self)
        model = {key: list(item) if isinstance(item, tuple) else item for key, item in self.model.items()}
        names = ("class_names", "image_mean", "image_std")
        return value | {"model": model} | {name: list(value[name]) for name in names}

    def validate(self, params: Params) -> None:
        """Compares the metadata with the shapes of the parameters.

        Raises:
            UserError: they are of different models.
        """
        architecture, sizes = infer_sizes(params)
        found = {
            "architecture": architecture,
            **sizes,
            "image_size": _infer_image_size(params, architecture, sizes) or self.image_size,
            "number of class_names": sizes["num_classes"],
        }
        said = {
            "architecture": self.architecture,
            **self.model,
            "image_size": self.image_size,
            "number of class_names": len(self.class_names) if sizes["num_classes"] is not None else None,
        }
        wrong = [f"{key} {said.get(key)} (parameters: {found[key]})" for key in found if said.get(key) != found[key]]
        if wrong:
            raise UserError(f"the metadata does not match the parameters: {', '.join(wrong)}; export the model again")

    def create_model(self) -> ImageModel:
        """Creates the module.

        Raises:
            UserError: `model` is not what the constructor takes.
        """
        arguments = {key: value for key, value in self.model.items() if key != "num_classes"}
        try:
            return create_model(
                self.architecture, arguments, num_classes=self.model.get("num_classes"), dtype=self.dtype
            )
        except UserError as error:
            raise UserError(f"the metadata is wrong: {error}; export the model again") from error


def infer_sizes(params: Params) -> tuple[str, dict[str, Any]]:
    """Reads the architecture and the arguments of its constructor off the shapes of parameters.

    Raises:
        UserError: the parameters are of no known model.
    """
    if "resnet" in params:
        return "resnet50", infer_resnet(params)
    return "vit", infer_architecture(params)


def _infer_image_size(params: Params, architecture: str, sizes: dict[str, Any]) -> int | None:
    """Returns the pixels that position embeddings are for; None for a model that has none."""
    if "Transformer" not in params:
        return None
    num_patches = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1] - ("cls" in params)
    side = math.isqrt(num_patches)
    if not side or side * side != num_patches:
        raise UserError(f"the position embeddings are of {num_patches} patches, which is not a square")
    return side * ARCHITECTURES["vit"](**sizes).pixels_per_patch


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 16_384


def _are(values: object, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _are_channels(values: object, *, above_zero: bool = False) -> bool:
    if not _are(values, int | float) or len(values) != 3:  # type: ignore[arg-type]
        return False
    return all(0 <= value <= 1 and not isinstance(value, bool) and (value or not above_zero) for value in values)


def _channels(values: Sequence[float]) -> Channels:
    red, green, blue = values
    return red, green, blue
