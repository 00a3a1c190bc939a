"""Metadata of a checkpoint: its model, the names of its classes, and the preprocessing of its images."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp

import vit_jax
from vit_jax.models import ARCHITECTURES, create_model, model_arguments
from vit_jax.pretrained.imagenet import imagenet_classes
from vit_jax.pretrained.infer import few, infer_image_size, infer_sizes, unequal
from vit_jax.runtime.checksums import checksum_json, checksums
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.types import ImageModel, Json, Params

_OLD_NAMES = {"image_mean": "pixel_mean", "image_std": "pixel_deviation"}
"""Keys of files of version 0.1."""


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """Metadata that every export and every checkpoint of a run has.

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
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    vit_jax: str = vit_jax.__version__

    def __post_init__(self) -> None:
        """Checks types and ranges.

        Raises:
            UserError: names the first attribute that is wrong.
        """
        names, mean, std = self.class_names, self.image_mean, self.image_std
        rules = {
            "architecture": (self.architecture in tuple(ARCHITECTURES), f"one of {', '.join(ARCHITECTURES)}"),
            "model": (isinstance(self.model, Mapping), "constructor arguments"),
            "image_size": (type(self.image_size) is int and 0 < self.image_size <= 16_384, "a positive integer"),
            "class_names": (isinstance(names, tuple) and all(isinstance(name, str) for name in names), "strings"),
            "dtype": (self.dtype in ("float32", "bfloat16", "float64"), "one of float32, bfloat16"),
            "image_mean": (_are_channels(mean), "three numbers from 0 to 1"),
            "image_std": (_are_channels(std) and min(std) > 0, "three numbers above 0, at most 1"),
        }
        for name, (valid, expected) in rules.items():
            if not valid:
                raise UserError(f"{name} is {_lists(getattr(self, name))!r}; expected {expected}")

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
            image_mean=tuple(image_mean),
            image_std=tuple(image_std),
        )

    @classmethod
    def from_params(cls, params: Params) -> "ModelMetadata":
        """Returns the metadata of a checkpoint that has none, such as Google's, from the shapes of its parameters.

        The classes of a head of 1,000 are those of ImageNet; other classes are named "0", "1", ….

        Raises:
            UserError: the parameters are of no known model, or position embeddings are not of a square.
        """
        architecture, sizes = infer_sizes(params)
        names = tuple(name for _, name in imagenet_classes())
        if sizes["num_classes"] != len(names):
            names = tuple(map(str, range(sizes["num_classes"] or 0)))
        metadata = cls(architecture, sizes, image_size=224, class_names=names)
        image_size = infer_image_size(params, metadata.create_model())
        return dataclasses.replace(metadata, image_size=image_size or 224)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ModelMetadata":
        """Returns the metadata for what `to_json` returned, in this version or an older one; ignores unknown keys.

        Raises:
            UserError: a value has a wrong type or range, or is missing.
        """
        names = {field.name: _OLD_NAMES.get(field.name, field.name) for field in dataclasses.fields(cls)}
        found = {name: value.get(name, value.get(old)) for name, old in names.items() if name in value or old in value}
        required = dict.fromkeys(("architecture", "model", "image_size", "class_names"))
        return cls(**{name: _tuples(item) for name, item in (required | found).items()})

    def to_json(self) -> dict[str, Json]:
        """Returns the attributes as JSON values."""
        return cast(
            dict[str, Json], _lists({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        )

    def create_model(self) -> ImageModel:
        """Creates the module.

        Raises:
            UserError: `model` has arguments that the constructor does not accept.
        """
        arguments = {key: value for key, value in self.model.items() if key != "num_classes"}
        num_classes = self.model.get("num_classes")
        return create_model(self.architecture, arguments, num_classes=num_classes, dtype=self.dtype)

    def validate(self, params: Params) -> None:
        """Compares the metadata with the shapes of the parameters.

        Raises:
            UserError: they are of different models.
        """
        architecture, sizes = infer_sizes(params)
        expected = {"architecture": architecture, **sizes}
        found = {"architecture": self.architecture, **self.model}
        if architecture == self.architecture:
            model = self.create_model()
            expected["image_size"] = infer_image_size(params, model) or self.image_size
            found |= model_arguments(model) | {"image_size": self.image_size}
        if sizes["num_classes"] is not None:
            expected["number of class_names"], found["number of class_names"] = (
                sizes["num_classes"],
                len(self.class_names),
            )
        if wrong := unequal(found, expected):
            raise UserError(f"its metadata is not that of its parameters: {wrong}; export it again")


def wrap_metadata(metadata: ModelMetadata, expected: Mapping[str, str]) -> dict[str, Json]:
    """Returns JSON that is stored beside arrays of the expected checksums; damage to either is noticed by its own."""
    value = metadata.to_json()
    return {"crc32": checksum_json([value, expected]), "metadata": value}


def unwrap_metadata(value: Mapping[str, Any], found: Mapping[str, str]) -> ModelMetadata:
    """Returns the metadata in JSON that was stored beside arrays.

    Args:
        value: of `wrap_metadata`, perhaps with "checksums" of the arrays; or metadata of version 0.1.
        found: checksums of the arrays.

    Raises:
        UserError: a checksum, or a value of the metadata, is wrong.
    """
    if "architecture" in value:
        return ModelMetadata.from_json(value)
    expected = value.get("checksums", found)
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if value["crc32"] != checksum_json([value["metadata"], expected]):
        wrong.append("the metadata")
    if wrong:
        raise UserError(f"the checksum of {few(wrong)} is wrong")
    return ModelMetadata.from_json(value["metadata"])


def save_metadata(directory: Path, metadata: ModelMetadata, params: Params) -> None:
    """Writes the metadata, and the checksums of the parameters, to `directory/metadata.json`."""
    expected = checksums(params)
    value = {**wrap_metadata(metadata, expected), "checksums": expected}
    (directory / "metadata.json").write_text(json.dumps(value, indent=2) + "\n")


def load_metadata(directory: Path, params: Params) -> ModelMetadata | None:
    """Reads what `save_metadata` wrote, or version 0.1 to about.json; None if there is neither.

    Raises:
        UserError: it is damaged, or the parameters are not those that were saved.
    """
    paths = [path for name in ("metadata.json", "about.json") if (path := directory / name).exists()]
    if not paths:
        return None
    try:
        return unwrap_metadata(json.loads(paths[0].read_text()), checksums(params))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory} is damaged: {one_line(error)}; export it again") from error


def _are_channels(values: object) -> bool:
    if not isinstance(values, tuple) or len(values) != 3:
        return False
    return all(isinstance(value, int | float) and type(value) is not bool and 0 <= value <= 1 for value in values)


def _tuples(value: Any) -> Any:
    """Returns a JSON value with tuples in place of lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _lists(value: Any) -> Any:
    """Returns a JSON value, with lists in place of tuples."""
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return list(map(_lists, value)) if isinstance(value, tuple) else value
