"""A model that is ready for use: parameters, class names, and how pictures are made ready for it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import pretrained
from vit_jax.data import preprocess
from vit_jax.pretrained import ModelMetadata
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UserError
from vit_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Classifier:
    """What `vit_jax.load` gives: a model with all that its use needs.

    Attributes:
        model: Linen module.
        params: of the model: its whole tree.
        class_names: `class_names[i]` names column i of the logits; "0", "1", … where a file does not say.
        image_size: pixels, square, that the model sees.
        image_mean: of the channels, from 0 to 1.
        image_std: of the channels, on the same scale.
    """

    model: Any
    params: Params
    class_names: tuple[str, ...]
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def predict(self, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
        """Probabilities of the classes.

        Args:
            images: uint8 [n h w 3], RGB; resized to `image_size`.
            batch_size: pictures at once, rounded up to the devices.

        Returns:
            float32 [n classes]; rows sum to 1.

        Raises:
            ValueError: these are no such pictures.
        """
        return softmax(self.logits(images, batch_size=batch_size))

    def logits(self, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
        """Float32 [n classes] before the softmax; arguments as in `predict`."""
        images = np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"expected pictures as uint8 [n h w 3], got {images.dtype} {list(images.shape)}")
        batch_size = self.round_up(batch_size, len(images))
        batches = [
            self.start(images[first : first + batch_size], batch_size) for first in range(0, len(images), batch_size)
        ]
        parts = [np.zeros((0, len(self.class_names)), np.float32), *map(np.asarray, batches)]
        return np.concatenate(parts)[: len(images)]

    def forward(self, params: Params, images: jax.Array) -> jax.Array:
        """The whole way as a pure function: uint8 [b h w 3] -> float32 [b classes] before the softmax."""
        keys = jnp.zeros((images.shape[0], 2), jnp.uint32)  # nothing is drawn
        inputs = preprocess.prepare(keys, images, image_size=self.image_size, mean=self.image_mean, std=self.image_std)
        return self.model.apply({"params": params}, inputs).astype(jnp.float32)

    def round_up(self, batch_size: int, num_images: int) -> int:
        """`batch_size`, or fewer where there are fewer pictures, as a multiple of the devices."""
        return sharding.pad_to_devices(batch_size, max(1, num_images), self._mesh)

    def start(self, images: np.ndarray, batch_size: int) -> jax.Array:
        """Begins a batch and does not wait: pictures, up to `batch_size` of them -> float32 [batch_size classes].

        Missing pictures are black; `batch_size` is a multiple of the devices.
        """
        missing = [(0, batch_size - len(images)), *[(0, 0)] * 3]
        batch = jax.device_put(np.pad(images, missing), sharding.batch_sharding(self._mesh))
        return self._forward(self._placed, batch)

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return sharding.create_mesh(jax.local_devices())

    @functools.cached_property
    def _placed(self) -> Params:
        return jax.device_put(self.params, sharding.replicated(self._mesh))

    @functools.cached_property
    def _forward(self) -> Any:
        return jax.jit(self.forward)


def softmax(logits: np.ndarray) -> np.ndarray:
    """[n classes] -> probabilities [n classes]."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def load_exported(name_or_path: str) -> Classifier:
    """A classifier from a file or folder that is no run's.

    Args:
        name_or_path: as for `config.pretrained`.

    Raises:
        UserError: it cannot be read, is no known model, or has no head.
    """
    params, metadata = pretrained.read_model(name_or_path)
    try:
        metadata = metadata or ModelMetadata.from_params(params)
        if "head" not in params:
            raise UserError("it has no head and knows no classes; start a run from it (config.pretrained)")
        return Classifier(**fields(params, metadata))
    except UserError as error:
        raise UserError(f"{name_or_path}: {error}") from error


def require_trained_head(classifier: Classifier, name: str) -> None:
    """Raises UserError where a head is of zeros, as in the files of ImageNet-21k: `name` is whose it is."""
    if not np.any(np.asarray(classifier.params["head"]["kernel"])):
        raise UserError(f"{name} has a head of zeros, which says nothing; fine-tune the model first")


def fields(params: Params, metadata: ModelMetadata) -> dict[str, Any]:
    """Returns the fields of a `Classifier`; raises UserError if the metadata is not that of the parameters."""
    metadata.validate(params)
    return {
        "model": metadata.create_model(),
        "params": params,
        "class_names": metadata.class_names,
        "image_size": metadata.image_size,
        "image_mean": metadata.image_mean,
        "image_std": metadata.image_std,
    }
