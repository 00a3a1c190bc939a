"""Reads datasets that TFDS has prepared as array_record files, without TensorFlow."""

import difflib
import io
from typing import TYPE_CHECKING

import numpy as np

from vit_jax.data.images import EncodedImages
from vit_jax.data.splits import OpenedSplits, Request, select_rows
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.types import Split

if TYPE_CHECKING:
    import tensorflow_datasets.core


def open_tfds(request: Request) -> OpenedSplits:
    """Opens the prepared dataset "tfds:NAME"."""
    name = request.name
    builder = _create_builder(name.partition(":")[2], request.data_dir)
    features = dict(builder.info.features.items())
    class_names = getattr(features.get("label"), "names", None)
    if getattr(features.get("image"), "np_dtype", None) != np.uint8 or not class_names:
        raise UserError(
            f"{name} has the features {', '.join(sorted(features))}; "
            "expected an 8-bit `image`, and a `label` with class names"
        )
    num_images = {split: info.num_examples for split, info in builder.info.splits.items()}
    slices = request.slices(known=num_images)
    splits = {
        role: _open_split(builder, slices[role].name, np.asarray(rows), read_labels=not request.dry_run)
        for role, rows in select_rows(slices, num_images).items()
    }
    return OpenedSplits(splits, tuple(class_names))


def _create_builder(name: str, data_dir: str) -> "tensorflow_datasets.core.DatasetBuilder":
    """Returns the builder of a prepared dataset; without these checks TFDS would start to prepare it."""
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        if builder.is_prepared():
            return builder
        problem = f"is not prepared in {builder.data_path}"
    except ImportError as error:
        problem = f"needs TFDS ({error})"
    except tfds.core.DatasetNotFoundError as error:
        near = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
        nearest = f"; nearest are {', '.join(near)}" if near else ""
        raise UsageError(f"no dataset {name!r} in TFDS or in {data_dir or 'its data_dir'}{nearest}") from error
    except Exception as error:  # each cause has a type of its own: wrong version, wrong config, other file format
        problem = f"cannot be read as array_record ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    directory = f'data_dir="{data_dir}", ' if data_dir else ""
    raise UserError(
        f"tfds:{name} {problem}; prepare it: pip install 'vit_jax[tfds]' && python -c 'import tensorflow_datasets as "
        f'tfds; tfds.builder("{name}", {directory}file_format="array_record").download_and_prepare()\''
    )


def _open_split(
    builder: "tensorflow_datasets.core.DatasetBuilder", name: str, rows: np.ndarray, *, read_labels: bool
) -> Split:
    """Opens rows of a split; without `read_labels`, labels are evenly distributed over the classes."""
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split=name, decoders={"image": tfds.decode.SkipDecoding()})
    height, width = builder.info.features["image"].shape[:2]  # None where images differ

    def open_image(number: int) -> io.BytesIO:
        image = io.BytesIO(source[int(number)]["image"])
        image.name = f"{number} of tfds:{builder.name} {name}"
        return image

    if read_labels:
        labels = np.fromiter((source[i]["label"] for i in rows), np.int32, len(rows))
    else:
        labels = np.arange(len(rows), dtype=np.int32) % builder.info.features["label"].num_classes
    images = EncodedImages(open_image, rows, (width or 0, height or 0))
    return Split(images=images, labels=labels, ids=rows.astype(np.uint64))
