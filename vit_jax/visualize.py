"""`python -m vit_jax.visualize --workdir DIR --out DIR`: figures of what a run learned and of its errors."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from vit_jax.data import decode_image
from vit_jax.models import VisionTransformer
from vit_jax.runtime.errors import UsageError, parse_arguments, run_command
from vit_jax.runtime.files import write_atomically
from vit_jax.training.writer import read_records
from vit_jax.types import ImageModel, Split
from vit_jax.visualization import analysis, plotting

if TYPE_CHECKING:
    from vit_jax.run import Run


def main(argv: list[str] | None = None) -> int:
    """Saves all figures and prints their paths."""
    parser = argparse.ArgumentParser(prog="python -m vit_jax.visualize", description=__doc__)
    parser.add_argument("--workdir", required=True, help="directory of the run")
    parser.add_argument("--out", required=True, help="directory of the figures; created if missing")
    parser.add_argument("--images", nargs="+", default=[], metavar="IMAGE", help="files to plot attention on")
    parser.add_argument("--num_images", type=int, default=8, help="number of test images to plot attention on (8)")
    parser.add_argument("--layer", type=int, help="plot the attention of this layer, on every image")
    parser.add_argument("--head", type=int, help="plot the attention of this head of --layer")
    parser.add_argument("--step", type=int, help="step of the checkpoint; the latest by default")
    parser.add_argument("--data_dir", help="directory of the dataset, if it moved since the run")
    arguments = parse_arguments(parser, argv)
    if arguments.num_images < 1:
        raise UsageError(f"--num_images is {arguments.num_images}; expected at least 1")

    from vit_jax.run import load_run

    run = load_run(arguments.workdir, step=arguments.step)
    check_layer_and_head(run.model, arguments.layer, arguments.head)
    images = {path: read_image(path, run.image_size) for path in arguments.images}
    test = None if run.dataset_given else run.load_test_split(arguments.data_dir)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in draw_all(
        run, test, images=images, num_images=arguments.num_images, layer=arguments.layer, head=arguments.head
    ):
        write_atomically(out / f"{name}.png", plotting.to_png(figure))
        print(out / f"{name}.png", flush=True)
    return 0


def check_layer_and_head(model: ImageModel, layer: int | None, head: int | None) -> None:
    """Raises UsageError if the model has no such layer or head."""
    if head is not None and layer is None:
        raise UsageError("--head needs --layer: give both, or neither for all")
    has_attention = isinstance(model, VisionTransformer)
    for flag, value, attribute in (("--layer", layer, "num_layers"), ("--head", head, "num_heads")):
        size = getattr(model, attribute) if has_attention else 0
        if value is not None and not 0 <= value < size:
            raise UsageError(f"{flag} is {value}; this {type(model).__name__} has {size}, counted from 0")


def read_image(path: str | Path, image_size: int) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image file, resized to the square that the model sees."""
    return np.asarray(decode_image(Path(path), size=(image_size, image_size)))


def draw_all(
    run: "Run",
    test: Split | None = None,
    *,
    images: Mapping[str, UInt8[np.ndarray, "h w 3"]] | None = None,
    num_images: int = 8,
    layer: int | None = None,
    head: int | None = None,
) -> Iterator[tuple[str, Figure]]:
    """Plots all figures of a run: curves, parameters, predictions, attention.

    Args:
        run: see `load_run`.
        test: test images; None loads those of the run's config. Where the dataset was given from Python and they are
            not given here, predictions are not plotted, and attention only on `images`.
        images: name -> image to plot attention on; None or none at all takes a random sample of `test`.
        num_images: size of that sample.
        layer: plots the attention of this layer instead of that of all.
        head: plots the attention of this head instead of the mean over the heads of the layer.

    Yields:
        (name, figure). Without metrics there are no curves, for a ResNet no parameters and no attention.
    """
    records = read_records(run.workdir / "metrics.jsonl", last_step=run.step)
    if records:
        yield "curves", plotting.plot_curves(records, title=run.workdir.name)
    else:
        print(f"{run.workdir} has no metrics up to step {run.step}: no curves are plotted", file=sys.stderr)
    if isinstance(run.model, VisionTransformer):
        yield from draw_parameters(run)
    if test is None and run.dataset_given:
        print(
            f"{run.workdir} was trained on a dataset given from Python: no predictions are plotted; for all figures, "
            "call vit_jax.report.write_report(workdir, split=split)",
            file=sys.stderr,
        )
    else:
        test = run.load_test_split() if test is None else test
        probabilities = run.predict(test.images)
        yield from draw_predictions(run, test, probabilities)
    if not isinstance(run.model, VisionTransformer):
        print(f"a {type(run.model).__name__} has no attention, positions or patches to plot")
        return
    if images:
        names, shown = list(images), np.stack(list(images.values()))
        predictions = run.predict(shown).argmax(axis=-1)
    elif test is None:
        return
    else:
        chosen = np.random.default_rng(run.config.seed).permutation(len(test))[:num_images]
        names, shown = [run.class_names[i] for i in test.labels[chosen]], np.stack([test.images[i] for i in chosen])
        predictions = probabilities[chosen].argmax(axis=-1)
    titles = [
        f"{Path(name).name}\nclassified as {run.class_names[i]}" for name, i in zip(names, predictions, strict=True)
    ]
    yield from draw_attention(run, shown, titles, layer=layer, head=head)


def draw_parameters(run: "Run") -> Iterator[tuple[str, Figure]]:
    """Plots the position embeddings, and the filters of the patch embedding or of a hybrid's root."""
    assert isinstance(run.model, VisionTransformer)
    embeddings = np.asarray(run.params["Transformer"]["posembed_input"]["pos_embedding"])
    similarity = analysis.position_similarity(embeddings, class_token=run.model.pool == "cls")
    yield "position_similarity", plotting.plot_position_similarity(similarity)
    yield "position_matrix", plotting.plot_position_matrix(similarity)
    filters = run.params["embedding" if run.model.stem_units is None else "conv_root"]["kernel"]
    yield "patch_filters", plotting.plot_filters(*analysis.filter_components(np.asarray(filters)))


def draw_predictions(run: "Run", test: Split, probabilities: Float[np.ndarray, "n c"]) -> Iterator[tuple[str, Figure]]:
    """Plots the confusion matrix and the most confident errors."""
    names, predictions = run.class_names, probabilities.argmax(axis=-1)
    counts = analysis.confusion_matrix(test.labels, predictions, num_classes=len(names))
    title = f"{run.workdir.name}: test accuracy {np.trace(counts) / counts.sum():.2%} ({len(test):,} images)"
    pairs = analysis.most_frequent_confusions(counts)
    yield "confusion", plotting.plot_confusion(counts, pairs, names, title=title)
    wrong = analysis.most_confident_errors(probabilities, test.labels)
    labels, predicted = [names[i] for i in test.labels[wrong]], [names[i] for i in predictions[wrong]]
    yield "errors", plotting.plot_errors(test.images[wrong], labels, predicted, probabilities[wrong].max(axis=-1))


def draw_attention(
    run: "Run", images: UInt8[np.ndarray, "b h w 3"], titles: Sequence[str], *, layer: int | None, head: int | None
) -> Iterator[tuple[str, Figure]]:
    """Plots attention rollout and the maps of all heads, or the attention of one layer or head; see `draw_all`."""
    assert isinstance(run.model, VisionTransformer)
    inputs, class_token = run.preprocess(images), run.model.pool == "cls"
    weights = analysis.attention_weights(run.model, run.params, inputs)  # [l b k n n]
    maps = analysis.attention_maps(weights, class_token=class_token)  # [l b k g g]
    query = "the class token" if class_token else "the patches (mean)"
    if layer is None:
        rollout = analysis.attention_rollout(weights, analysis.pooling_weights(run.model, run.params, inputs))
        title = "Attention through all layers (rollout)"
        yield "attention_rollout", plotting.plot_attention(images, rollout, titles, title=title)
        yield "attention_heads", plotting.plot_heads(images[0], maps[:, 0], title=f"Attention of {query}")
        return
    shown = maps[layer].mean(axis=1) if head is None else maps[layer][:, head]
    title = f"Attention of {query}: layer {layer}, " + ("mean of its heads" if head is None else f"head {head}")
    name = f"attention_layer_{layer}" + ("" if head is None else f"_head_{head}")
    yield name, plotting.plot_attention(images, shown, titles, title=title)


if __name__ == "__main__":
    sys.exit(run_command(main))
