"""Datasets that TFDS has prepared as array_record files: reading them needs no TensorFlow."""

import difflib
import io
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from vit_jax.data.images import EncodedImages
from vit_jax.data.splits import SplitSlice, check_disjoint, nearest_first
from vit_jax.runtime.errors import UsageError, UserError
from vit_jax.types import Split


def open_tfds(name: str, data_dir: str, splits: Sequence[SplitSlice]) -> tuple[list[Split], tuple[str, ...]]:
    """Opens a dataset that TFDS has prepared as array_record; reading needs no TensorFlow, preparing does.

    Returns:
        The splits of `EncodedImages` images, and the class names.
    """
    builder = _create_tfds_builder(name, data_dir)
    features = dict(builder.info.features.items())
    class_names = getattr(features.get("label"), "names", None)
    if getattr(features.get("image"), "np_dtype", None) != np.uint8 or not class_names:
        raise UserError(
            f"tfds:{name} has the features {', '.join(sorted(features))};"
            " expected an 8-bit `image`, and a `label` with class names"
        )
    for split in splits:
        if split.name not in builder.info.splits:
            known = ", ".join(nearest_first(split.name, builder.info.splits))
            raise UsageError(f"unknown split {split.text!r} of tfds:{name}; known are {known}")
        same = [other for other in splits if other.name == split.name]
        check_disjoint(same, builder.info.splits[split.name].num_examples)
    return [_open_tfds_split(builder, split) for split in splits], tuple(class_names)


def _create_tfds_builder(name: str, data_dir: str) -> Any:
    """The builder of a prepared dataset; TFDS's own way would start to prepare it, or list a thousand names."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f"dataset tfds:{name} needs TFDS ({error}); pip install 'vit_jax[tfds]'") from error
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        known = difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False))
        nearest = f"; nearest are {', '.join(known)}" if known else ""
        raise UsageError(f"TFDS knows no {name!r}, nor does {data_dir or 'its directory'} hold it{nearest}") from error
    except Exception as error:  # each cause has its own type: wrong version, wrong config, another file format
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        advice = _tfds_command(name, data_dir)
        raise UserError(f"tfds:{name} cannot be read as array_record ({reason}); {advice}") from error
    if not builder.is_prepared():
        raise UserError(f"tfds:{name} is not prepared in {builder.data_path}; {_tfds_command(name, data_dir)}")
    return builder


def _tfds_command(name: str, data_dir: str) -> str:
    where = f'data_dir="{data_dir}", ' if data_dir else ""
    return (
        "prepare it: pip install 'vit_jax[tfds]' && python -c 'import tensorflow_datasets as tfds;"
        f' tfds.builder("{name}", {where}file_format="array_record").download_and_prepare()\''
    )


def _open_tfds_split(builder: Any, split: SplitSlice) -> Split:
    import tensorflow_datasets as tfds

    source = builder.as_data_source(split=split.name, decoders={"image": tfds.decode.SkipDecoding()})
    start, stop = split.bounds(len(source))

    def open_image(number: int) -> BinaryIO:
        picture = io.BytesIO(source[int(number)]["image"])
        picture.name = f"{number} of tfds:{builder.name} {split.name}"
        return picture

    numbers = np.arange(start, stop)
    labels = np.fromiter((source[i]["label"] for i in range(start, stop)), np.int32, stop - start)
    return Split(images=EncodedImages(open_image, numbers), labels=labels, ids=numbers.astype(np.uint64))
