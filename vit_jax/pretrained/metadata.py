"""Metadata of a checkpoint: model, class names and image preprocessing."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import vit_jax
from vit_jax.models import ARCHITECTURES, create_model, model_arguments
from vit_jax.pretrained.imagenet import imagenet_classes
from vit_jax.pretrained.sizes import few, infer_image_size, infer_sizes
from vit_jax.runtime.checksums import checksum_json, checksums
from vit_jax.runtime.errors import UserError, one_line
from vit_jax.types import RESIZES, ImageModel, Json, Params

_RENAMED = {"pixel_mean": "image_mean", "pixel_deviation": "image_std"}  # since version 0.1


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """Metadata in every export and every checkpoint of a run."""

    architecture: str  # a key of `models.ARCHITECTURES`
    model: Mapping[str, Any]  # constructor arguments, `num_classes` included
    image_size: int  # pixels
    class_names: tuple[str, ...]  # one per logit
    dtype: str = "float32"  # of the computation
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # per channel, of pixels from 0 to 1
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    test_resize: str = "squash"  # one of `types.RESIZES`
    vit_jax: str = vit_jax.__version__  # version that wrote the metadata

    def __post_init__(self) -> None:
        """Validates types and ranges, as JSON of other tools and older versions can have any."""
        names, mean, std = self.class_names, self.image_mean, self.image_std
        rules = {
            "architecture": (self.architecture in tuple(ARCHITECTURES), f"one of {', '.join(ARCHITECTURES)}"),
            "model": (isinstance(self.model, Mapping), "constructor arguments"),
            "image_size": (type(self.image_size) is int and 0 < self.image_size <= 16_384, "a positive integer"),
            "class_names": (isinstance(names, tuple) and all(isinstance(name, str) for name in names), "strings"),
            "dtype": (self.dtype in ("float32", "bfloat16", "float64"), "one of float32, bfloat16"),
            "image_mean": (_are_channels(mean), "three numbers from 0 to 1"),
            "test_resize": (self.test_resize in RESIZES, f"one of {', '.join(RESIZES)}"),
            "image_std": (_are_channels(std) and min(std) > 0, "three numbers above 0, at most 1"),
        }
        for name, (valid, expected) in rules.items():
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected {expected}")

    @classmethod
    def from_model(
        cls,
        model: ImageModel,
        *,
        image_size: int,
        class_names: tuple[str, ...],
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        test_resize: str = "squash",
    ) -> "ModelMetadata":
        """Returns the metadata of a module."""
        architecture = next(name for name, module in ARCHITECTURES.items() if isinstance(model, module))
        dtype = jnp.dtype(model.dtype).name
        return cls(
            architecture, model_arguments(model), image_size, class_names, dtype, image_mean, image_std, test_resize
        )

    @classmethod
    def from_params(cls, params: Params) -> "ModelMetadata":
        """Infers the metadata of a checkpoint that has none, such as Google's, from the shapes of its parameters.

        1,000 classes are assumed to be those of ImageNet; other classes are named "0", "1", ….
        """
        architecture, sizes = infer_sizes(params)
        names = tuple(name for _, name in imagenet_classes())
        if sizes["num_classes"] != len(names):
            names = tuple(map(str, range(sizes["num_classes"] or 0)))
        metadata = cls(architecture, sizes, image_size=224, class_names=names)
        return dataclasses.replace(metadata, image_size=infer_image_size(params, metadata.create_model()) or 224)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ModelMetadata":
        """Inverts `to_json`, of this version or an older one; ignores unknown keys."""
        names = [field.name for field in dataclasses.fields(cls)]
        renamed = {_RENAMED.get(key, key): _tuples(item) for key, item in value.items()}
        return cls(**{key: item for key, item in renamed.items() if key in names})

    def to_json(self) -> dict[str, Json]:
        """Returns the attributes as JSON values."""
        value: dict[str, Json] = json.loads(json.dumps(dataclasses.asdict(self)))
        return value

    def create_model(self) -> ImageModel:
        """Creates the module."""
        arguments = {key: value for key, value in self.model.items() if key != "num_classes"}
        num_classes = self.model.get("num_classes")
        return create_model(self.architecture, arguments, num_classes=num_classes, dtype=self.dtype)

    def validate(self, params: Params) -> None:
        """Raises UserError if the metadata does not match the parameters."""
        architecture, sizes = infer_sizes(params)
        expected = {"architecture": architecture, **sizes, "number of class_names": sizes["num_classes"] or 0}
        found = {"architecture": self.architecture, **self.model, "number of class_names": len(self.class_names)}
        if architecture == self.architecture:
            model = self.create_model()
            expected["image_size"] = infer_image_size(params, model) or self.image_size
            found |= model_arguments(model) | {"image_size": self.image_size}
        wrong = [key for key in expected if found.get(key) != expected[key]]
        if wrong:
            differences = ", ".join(f"{key} {found.get(key)} instead of {expected[key]}" for key in wrong)
            raise UserError(f"its metadata does not match its parameters: {differences}; export it again")


def wrap_metadata(metadata: ModelMetadata, expected: Mapping[str, str]) -> dict[str, Json]:
    """Returns the metadata as JSON, with a checksum of it and of the arrays' expected checksums."""
    value = metadata.to_json()
    return {"crc32": checksum_json([value, expected]), "metadata": value}


def unwrap_metadata(value: Mapping[str, Any], found: Mapping[str, str]) -> ModelMetadata:
    """Verifies and returns metadata that was saved with arrays whose checksums are now `found`.

    `value` is from `wrap_metadata`, optionally with "checksums" of the arrays, or plain metadata of version 0.1.
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
    """Saves the metadata and the checksums of the parameters to `directory/metadata.json`."""
    expected = checksums(params)
    value = {**wrap_metadata(metadata, expected), "checksums": expected}
    (directory / "metadata.json").write_text(json.dumps(value, indent=2) + "\n")


def load_metadata(directory: Path, params: Params) -> ModelMetadata | None:
    """Loads metadata.json, or about.json of version 0.1; returns None if there is neither."""
    paths = [path for name in ("metadata.json", "about.json") if (path := directory / name).exists()]
    if not paths:
        return None
    try:
        return unwrap_metadata(json.loads(paths[0].read_text()), checksums(params))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory} is damaged: {one_line(error)}; export it again") from error


def _are_channels(values: object) -> bool:
    numbers = values if isinstance(values, tuple) and len(values) == 3 else (None,)
    return all(isinstance(number, int | float) and 0 <= number <= 1 for number in numbers)


def _tuples(value: Any) -> Any:
    """Converts lists in a JSON value to tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
