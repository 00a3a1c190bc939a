"""`python -m vit_jax.inspect --config FILE --out DIR`: writes a page about the images of a dataset, before training."""

from vit_jax.runtime.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before JAX is imported

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int, UInt8
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vit_jax.config import add_dataset_arguments, get_config, parse_dataset
from vit_jax.data import DatasetInfo, decode_image, findings
from vit_jax.data.images import read_size
from vit_jax.runtime import resources, rng
from vit_jax.runtime.arguments import create_parser, parse_known_arguments
from vit_jax.runtime.errors import run_command
from vit_jax.runtime.files import write_atomically
from vit_jax.runtime.progress import progress_bar
from vit_jax.training.experiment import Experiment, create_experiment, load_dataset
from vit_jax.training.steps import TrainState
from vit_jax.types import Dataset, Split
from vit_jax.visualization import html, plotting

_CAPTIONS = {
    "counts": "Class counts. The number of images of each class in each split.",
    "sizes": "Image sizes. Width and height of the files. The area of a point is the number of images.",
    "samples": "Samples. Random training images of each class, before they are resized.",
    "training": "Training. Images of the first batch, and beside each what the model is trained on: cropped, "
    "augmented, resized and mixed as by the config.",
    "evaluation": "Evaluation. Random test images, and beside each what the model is evaluated on.",
}
"""Name of a figure -> title and caption, in the order of the page."""

_MAX_SIZES = 10_000  # images whose size is read
_MAX_CLASSES = 20  # with samples: the most and the least frequent
_SAMPLES = 8  # per class
_PAIRS = 24
_COLUMNS = 6
_THUMBNAIL = 256  # pixels of the longer side
_SETTINGS = ("image_size", "image_mean", "image_std", "augment", "mixup_alpha", "cutmix_alpha", "batch_size", "seed")
_MODEL_KEYS = (
    *("architecture", "model", "dtype", "pretrained", "trainable", "features", "feature_views", "optimizer"),
    *("ema_decay", "accumulation_steps"),
)
"""Keys that the inputs of the model do not depend on."""


def main(argv: list[str] | None = None) -> int:
    """Writes the page and the figures, and prints their paths."""
    parser = create_parser(
        "python -m vit_jax.inspect",
        "Write OUT/inspect.html and its figures: class counts, image sizes, samples of each class, and what the model\n"
        "is trained on after augmentation. Nothing is trained, and no checkpoint is loaded.",
        "--dataset folder:DIR --out inspection",
        "--config configs/cifar10.py --config.augment=inception --out inspection",
    )
    add_dataset_arguments(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="output directory, created if missing")
    arguments, overrides = parse_known_arguments(parser, argv)
    config = parse_dataset(parser, arguments, overrides)
    loading = config.copy_and_resolve_references()
    loading.dataset.damaged = "skip"  # the page lists them
    dataset = load_dataset(loading)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, figure in draw_all(config, dataset):
        figures[name] = plotting.to_png(figure)
        write_atomically(out / f"{name}.png", figures[name])
        print(out / f"{name}.png", flush=True)
    write_atomically(out / "inspect.html", format_page(config, dataset, figures))
    print(out / "inspect.html")
    return 0


def draw_all(config: ConfigDict, dataset: Dataset) -> Iterator[tuple[str, Figure]]:
    """Yields the figures of the page, see `_CAPTIONS`; "sizes" only if the sizes differ."""
    names, train, test = dataset.class_names, dataset.train, dataset.test
    yield "counts", plotting.plot_class_counts(findings.class_counts(dataset), names)
    sizes = np.concatenate([read_sizes(split) for split in dataset.splits.values()])
    if len(np.unique(sizes, axis=0)) > 1:
        yield "sizes", plotting.plot_image_sizes(sizes, image_size=config.image_size)
    samples = sample_rows(train.labels, seed=config.seed)
    images = [None if row < 0 else load_thumbnail(train, row) for row in samples.ravel().tolist()]
    captions = [names[train.labels[rows[0]]] if column == 0 else "" for rows in samples for column in range(_SAMPLES)]
    yield "samples", plotting.plot_images(images, captions, columns=_SAMPLES, title="Random training images")
    experiment, state = create_input_experiment(config, dataset)
    rows, inputs, captions = training_inputs(experiment, state)
    yield (
        "training",
        plot_pairs(train, names, rows, inputs, captions, title="The first training images and their inputs"),
    )
    rows = np.random.default_rng(config.seed).permutation(len(test))[:_PAIRS]
    inputs = evaluation_inputs(experiment, rows)
    title = "Random test images and their inputs"
    yield "evaluation", plot_pairs(test, names, rows, inputs, ["input"] * len(rows), title=title)


def plot_pairs(
    split: Split,
    class_names: Sequence[str],
    rows: Int[np.ndarray, " n"],
    inputs: UInt8[np.ndarray, "n s s 3"],
    captions: Sequence[str],
    *,
    title: str,
) -> Figure:
    """Plots images of a split below their class, and beside each the model's input below its caption."""
    pairs = [(load_thumbnail(split, row), shown) for row, shown in zip(rows.tolist(), inputs, strict=True)]
    texts = [(class_names[label], text) for label, text in zip(split.labels[rows], captions, strict=True)]
    images, captions = list(itertools.chain(*pairs)), list(itertools.chain(*texts))
    return plotting.plot_images(images, captions, columns=_COLUMNS, title=title)


def load_thumbnail(split: Split, row: int) -> UInt8[np.ndarray, "h w 3"]:
    """Returns an image of a split with its aspect ratio, if its file is known, and at most `_THUMBNAIL` pixels wide."""
    if split.in_memory and split.paths is None:
        return np.asarray(split.images[row])
    image = decode_image(
        split.images.open_image(split.images.numbers[row]) if split.paths is None else split.paths[row]
    )
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return np.asarray(image)


def read_sizes(split: Split) -> Int[np.ndarray, "n 2"]:
    """Returns (width, height) in pixels of the images of a split, of random ones if there are many; reads headers."""
    if split.in_memory and split.paths is None:
        return np.tile(split.images.shape[2:0:-1], (len(split), 1))
    rows = np.random.default_rng(0).permutation(len(split))[:_MAX_SIZES]
    sources = split.paths[rows] if split.paths is not None else map(split.images.open_image, split.images.numbers[rows])
    with ThreadPoolExecutor(resources.available_cpus()) as pool:
        return np.array(list(progress_bar(pool.map(read_size, sources), total=len(rows), desc="sizes", unit=" images")))


def sample_rows(labels: Int[np.ndarray, " n"], *, seed: int) -> Int[np.ndarray, "c samples"]:
    """Returns rows of random images of each class; -1 where a class has fewer.

    Of many classes, the most and the least frequent are used; the classes are in the order of their labels.
    """
    rng, counts = np.random.default_rng(seed), np.bincount(labels)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if len(order) > _MAX_CLASSES:
        order = np.concatenate([order[: _MAX_CLASSES // 2], order[-_MAX_CLASSES // 2 :]])
    rows = np.full((len(order), _SAMPLES), -1)
    for i, label in enumerate(np.sort(order)):
        chosen = rng.permutation(np.flatnonzero(labels == label))[:_SAMPLES]
        rows[i, : len(chosen)] = chosen
    return rows


def create_input_experiment(config: ConfigDict, dataset: Dataset) -> tuple[Experiment, TrainState]:
    """Creates an experiment whose inputs are those of the config, on one device, with a model of a single patch.

    A batch has at most as many images as the training split.
    """
    config, defaults = config.copy_and_resolve_references(), get_config()
    for name in _MODEL_KEYS:
        config[name] = defaults[name]
    config.model.update(patch_size=config.image_size, hidden_size=1, num_layers=1, num_heads=1, mlp_dim=1)
    config.batch_size = min(config.batch_size, len(dataset.train))
    config.mesh.update(data=1, fsdp=1)
    with contextlib.redirect_stdout(io.StringIO()):  # the parameters of this model are of no interest
        return create_experiment(config, dataset=dataset)


def training_inputs(
    experiment: Experiment, state: TrainState
) -> tuple[Int[np.ndarray, " n"], UInt8[np.ndarray, "n s s 3"], list[str]]:
    """Returns the rows, the inputs and their captions, of the first images of the first training step."""
    step, names, labels = experiment.train_step, experiment.dataset.class_names, experiment.dataset.train.labels
    with contextlib.closing(experiment.train_batches(experiment.load_examples(state), 0)) as batches:
        _, batch = next(batches)
    balanced = experiment.config.dataset.sampling == "balanced"
    rows = np.asarray(rng.training_order(state.key, 0, labels, balanced=balanced))[:_PAIRS]
    rows = rows[: experiment.config.batch_size]
    examples = jax.tree.map(lambda leaf: leaf[:_PAIRS], step.with_keys(batch, state))
    inputs, targets = jax.jit(step.prepare)(examples)
    weights = np.stack([np.broadcast_to(weight, len(rows)) for _, weight in targets], axis=-1)  # [n t]
    classes = np.stack([label for label, _ in targets], axis=-1)  # [n t]
    captions = ["input"] * len(rows)
    if len(targets) > 1:
        captions = [
            "\n".join(f"{w:.0%} {names[i]}" for i, w in zip(label, weight, strict=True))
            for label, weight in zip(classes, weights, strict=True)
        ]
    return rows, to_pixels(inputs, experiment.config), captions


def evaluation_inputs(experiment: Experiment, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n s s 3"]:
    """Returns the inputs of test images in an evaluation."""
    images = np.stack([experiment.dataset.test.images[row] for row in rows])
    inputs = experiment.image_forward.preprocess(rng.row_keys(rows), jnp.asarray(images))
    return to_pixels(inputs, experiment.config)


def to_pixels(inputs: Float32[jax.Array, "n s s 3"], config: ConfigDict) -> UInt8[np.ndarray, "n s s 3"]:
    """Returns the inputs of a model as colors from 0 to 255."""
    pixels = 255 * (inputs * np.array(config.image_std) + np.array(config.image_mean))
    return np.asarray(jnp.round(pixels).clip(0, 255).astype(jnp.uint8))


def format_page(config: ConfigDict, dataset: Dataset, figures: Mapping[str, bytes]) -> str:
    """Formats the page: problems of the dataset, figures, and the settings that they depend on."""
    found = dataset.findings
    texts = {
        "Problems. Warnings that training prints, too.": [*found.notes, *findings.describe_warnings(dataset)],
        "Damaged images. They cannot be decoded; dataset.damaged says what training does about them.": found.damaged,
        "Equal images in several splits. The accuracy on images that were trained on is too high.": [
            " = ".join(paths) for paths in found.duplicates
        ],
        "Images per class. The number in each split; of many classes, the most and the least frequent.": [
            findings.describe_classes(dataset)
        ],
    }
    sections: dict[str, str | bytes] = {caption: "\n".join(lines) for caption, lines in texts.items() if lines}
    sections |= {_CAPTIONS[name]: figures[name] for name in _CAPTIONS if name in figures}
    settings = {"dataset": config.dataset.to_dict()} | {name: config[name] for name in _SETTINGS}
    sections["Settings. Keys of the config that this page depends on."] = "\n".join(
        f"{name}: {json.dumps(value)}" for name, value in settings.items()
    )
    num_images = sum(map(len, dataset.splits.values()))
    summary = str(DatasetInfo.from_dataset(dataset))
    return html.format_inspection(config.dataset.name, f"{num_images:,} images", summary, sections)


if __name__ == "__main__":
    sys.exit(run_command(main))
