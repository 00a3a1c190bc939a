"""A classifier: a model with its parameters, class names and preprocessing."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32, UInt8

from vit_jax import pretrained
from vit_jax.data import check_split, preprocess
from vit_jax.data.batches import crop_when_decoded
from vit_jax.data.crops import Augmentations
from vit_jax.data.images import EncodedImages, decode_image
from vit_jax.models import model_arguments
from vit_jax.pretrained import ModelMetadata
from vit_jax.runtime import sharding
from vit_jax.runtime.errors import UserError
from vit_jax.training import calibration, metrics
from vit_jax.training.evaluation import Evaluation
from vit_jax.training.inference import ImageForward, Inference
from vit_jax.types import ImageModel, ImageSource, Params, Split

_create_inference = functools.lru_cache(maxsize=8)(Inference)  # compiled once for classifiers of the same model


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Classifier:
    """A pretrained or fine-tuned classifier, as `vit_jax.load` returns it.

    Attributes:
        model: a Linen module, such as `models.VisionTransformer`.
        params: nested dictionary of float32 arrays; its joined keys are those of the pretrained checkpoints.
        metadata: class names, image size, normalization.
        mesh: batches are sharded over its devices.
        test_augment: augmentation of test images, set only in ablations.
    """

    model: ImageModel
    params: Params
    metadata: ModelMetadata
    mesh: Mesh
    test_augment: str = "none"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names in the order of the logits; "0", "1", … if the checkpoint has none."""
        return self.metadata.class_names

    @property
    def image_size(self) -> int:
        """Height and width in pixels that images are resized to."""
        return self.metadata.image_size

    def __repr__(self) -> str:
        """Returns a one-line summary without the parameters."""
        names = ", ".join(self.class_names[:3]) + (", …" if len(self.class_names) > 3 else "")
        model = f"{type(self.model).__name__}, {self.image_size} px, {len(self.class_names)} classes: {names}"
        return f"{type(self).__name__}({model})"

    def predict(self, images: ImageSource, *, batch_size: int = 256) -> Float32[np.ndarray, "*n classes"]:
        """Returns class probabilities.

        Args:
            images: uint8 [n h w 3], RGB, or one image [h w 3]; resized to `image_size`, unless they have that size, by
                `metadata.test_resize`.
            batch_size: images per batch, rounded up to a multiple of the number of devices.

        Returns:
            float32 [n classes], or [classes] for one image; rows sum to 1.

        Raises:
            ValueError: the images have another shape or dtype.

        Examples:
            >>> import numpy as np
            >>> import vit_jax
            >>> classifier = vit_jax.load("micro")
            >>> probabilities = classifier.predict(np.zeros((2, 32, 32, 3), np.uint8))
            >>> probabilities.shape
            (2, 10)
            >>> len(classifier.class_names), classifier.class_names[0]
            (10, 'airplane')
        """
        return np.asarray(jax.nn.softmax(self.logits(images, batch_size=batch_size)))

    def logits(self, images: ImageSource, *, batch_size: int = 256) -> Float32[np.ndarray, "*n classes"]:
        """Returns logits, float32 [n classes]; arguments as in `predict`."""
        return self._apply(self.model, images, batch_size=batch_size)

    def features(self, images: ImageSource, *, batch_size: int = 256) -> Float32[np.ndarray, "*n d"]:
        """Returns the inputs of the head, float32 [n d]; arguments as in `predict`.

        Examples:
            >>> import numpy as np
            >>> import vit_jax
            >>> vit_jax.load("micro").features(np.zeros((2, 32, 32, 3), np.uint8)).shape
            (2, 96)
        """
        return self._apply(self.model.clone(num_classes=None), images, batch_size=batch_size)

    def decode(self, path: str | Path) -> UInt8[np.ndarray, "s s 3"]:
        """Decodes an image file and resizes it as in evaluation; raises UserError if it cannot be read."""
        size = (self.image_size, self.image_size)
        return np.asarray(decode_image(Path(path), size=size, resize=self.metadata.test_resize))

    def preprocess(self, images: UInt8[np.ndarray | Array, "n h w 3"]) -> Float32[Array, "n s s 3"]:
        """Resizes and normalizes uint8 images [n h w 3]; returns the model's inputs, float32 [n s s 3]."""
        keys = jnp.zeros((images.shape[0], 2), jnp.uint32)  # nothing is sampled
        return self._forward(self.model).preprocess(keys, jnp.asarray(images))

    def forward(self, params: Params, images: UInt8[Array, "b h w 3"]) -> Float32[Array, "b classes"]:
        """Returns logits, float32 [b classes], for uint8 images [b h w 3]; a pure function, for export."""
        return jnp.asarray(self.model.apply({"params": params}, self.preprocess(images)), jnp.float32)

    def evaluate(self, split: Split, *, batch_size: int = 256, prefix: str = "test") -> dict[str, float]:
        """Returns "test/loss", "test/accuracy" and "test/accuracy_top5" over all images, each counted exactly once.

        The labels of `split` are logit indices; `batch_size` is as in `predict`; `prefix` replaces "test".

        Raises:
            UsageError: see `data.check_split`.
        """
        split = check_split(split, num_classes=len(self.class_names))
        images, inference = self._prepare(self.model, split.images, batch_size=batch_size)
        return metrics.means(jax.device_get(inference.sum_metrics(self._placed, images, split.labels)), prefix=prefix)

    def measure(self, split: Split, *, validation: Split | None = None, batch_size: int = 256) -> Evaluation:
        """Evaluates as `evaluate`, and returns the logits, from which all other figures follow.

        Args:
            split: its labels are logit indices.
            validation: images to fit the temperature on, used neither for training nor in `split`; None fits none.
            batch_size: as in `predict`.

        Raises:
            UsageError: see `data.check_split`.

        Examples:
            >>> import vit_jax
            >>> from vit_jax import data
            >>> digits = data.load_dataset("digits", train_split="train[:64]", test_split="test[:32]", image_size=32)
            >>> evaluation = vit_jax.load("micro").measure(digits.test, validation=digits.train)
            >>> sorted(evaluation.summary())[:3]
            ['test/accuracy', 'test/accuracy_interval', 'test/accuracy_top5']
        """
        split = check_split(split, num_classes=len(self.class_names))
        images, inference = self._prepare(self.model, split.images, batch_size=batch_size)
        logits, sums = inference.logits_and_sums(self._placed, images, split.labels)
        temperature = None
        if validation is not None:
            validation = check_split(validation, num_classes=len(self.class_names), name="validation")
            validation_logits = self.logits(validation.images, batch_size=batch_size)
            temperature = calibration.fit_temperature(validation_logits, validation.labels)
        return Evaluation(
            class_names=self.class_names,
            labels=split.labels,
            logits=np.asarray(logits, np.float32),
            means=metrics.means(sums),
            temperature=temperature,
        )

    @property
    def has_trained_head(self) -> bool:
        """True unless the head is all zeros, as in Google's ImageNet-21k checkpoints."""
        return bool(np.any(np.asarray(self.params["head"]["kernel"])))

    def require_trained_head(self, name: str) -> None:
        """Raises UserError if the head is all zeros; the message names `name`."""
        if not self.has_trained_head:
            raise UserError(f"{name} has an untrained (all-zero) head; fine-tune it first")

    def _apply(self, model: ImageModel, images: ImageSource, *, batch_size: int) -> np.ndarray:
        if not isinstance(images, EncodedImages):
            images = np.asarray(images)
            if images.ndim not in (3, 4) or images.shape[-1] != 3 or images.dtype != np.uint8:
                raise ValueError(f"got images {images.dtype} {list(images.shape)}; expected uint8 [n h w 3] or [h w 3]")
        if len(images.shape) == 3:
            return self._apply(model, images[None], batch_size=batch_size).squeeze(axis=0)
        if not len(images):
            inputs = self.preprocess(np.zeros((1, 1, 1, 3), np.uint8))
            shape = jax.eval_shape(model.apply, {"params": self.params}, inputs)
            return np.zeros((0, *shape.shape[1:]), np.float32)
        images, inference = self._prepare(model, images, batch_size=batch_size)
        return np.asarray(inference.outputs(self._placed, images), np.float32)

    def _prepare(self, model: ImageModel, images: ImageSource, *, batch_size: int) -> tuple[ImageSource, Inference]:
        """Returns the images, to be cropped if `test_augment` crops, and an `Inference` for them."""
        augment = preprocess.device_augment(self.test_augment, in_memory=not isinstance(images, EncodedImages))
        inference = _create_inference(self._forward(model, augment), self.mesh, batch_size=batch_size)
        images = crop_when_decoded(images, augment=self.test_augment, image_mean=self.metadata.image_mean)
        return images, inference

    def _forward(self, model: ImageModel, augment: Augmentations = "none") -> ImageForward:
        data = self.metadata
        normalization = data.image_size, data.image_mean, data.image_std
        return ImageForward(model, *normalization, resize=data.test_resize, test_augment=augment)

    @functools.cached_property
    def _placed(self) -> Params:
        params: Params = sharding.device_put(self.params, sharding.replicated(self.mesh))
        return params


def load_classifier(name_or_path: str) -> Classifier:
    """Loads a classifier from a pretrained checkpoint or an export, see `pretrained.read_model`."""
    params, metadata = pretrained.read_model(name_or_path)
    try:
        metadata = metadata or ModelMetadata.from_params(params)
        if "head" not in params:
            raise UserError("it has no trained classification head; fine-tune it first")
        mesh = sharding.create_mesh(jax.local_devices())
        model = metadata.create_model()
        metadata = dataclasses.replace(metadata, model=model_arguments(model))  # with defaults, for exports
        return Classifier(model=model, params=params, metadata=metadata, mesh=mesh)
    except UserError as error:
        raise UserError(f"{name_or_path}: {error}") from error
