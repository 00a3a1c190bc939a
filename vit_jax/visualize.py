"""`python -m vit_jax.visualize --workdir DIR --out DIR`: plots a run or a checkpoint."""

from vit_jax.runtime.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before JAX is imported

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

import vit_jax
from vit_jax.classifier import Classifier
from vit_jax.models import VisionTransformer
from vit_jax.run import Run
from vit_jax.runtime.arguments import add_model_arguments, create_parser, parse_arguments
from vit_jax.runtime.errors import run_command
from vit_jax.runtime.files import write_atomically
from vit_jax.training import calibration
from vit_jax.training.evaluation import Evaluation
from vit_jax.training.writer import read_records
from vit_jax.types import Split
from vit_jax.visualization import analysis, plotting


def main(argv: list[str] | None = None) -> int:
    """Saves all figures and prints their paths."""
    parser = create_parser(
        "python -m vit_jax.visualize",
        "Plot attention, position embeddings and patch filters; for a run also curves, confusion matrix and errors.",
        "--workdir runs/digits --out runs/digits/figures",
        "--model augreg/B_16 --images IMAGE.jpg --layer 11 --out figures",
    )
    add_model_arguments(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="output directory, created if missing")
    parser.add_argument(
        "--images", nargs="+", default=[], metavar="IMAGE", help="images for attention (default: the run's test images)"
    )
    parser.add_argument("--num_images", type=int, default=9, help="test images for attention (default: 9)")
    parser.add_argument("--layer", type=int, help="attention of this layer only, from 0 (default: all)")
    parser.add_argument("--head", type=int, help="attention of this head of --layer only, from 0 (default: mean)")
    parser.add_argument("--data_dir", metavar="DIR", help="directory of the dataset, if it has moved since training")
    arguments = parse_arguments(parser, argv)
    if arguments.num_images < 1:
        parser.error(f"--num_images is {arguments.num_images}; expected at least 1")
    if arguments.head is not None and arguments.layer is None:
        parser.error("--head needs --layer: give both, or neither for all")
    classifier = vit_jax.load(arguments.model, step=arguments.step)
    for flag, value, attribute in (("layer", arguments.layer, "num_layers"), ("head", arguments.head, "num_heads")):
        size = getattr(classifier.model, attribute, 0)  # a ResNet has no attention
        if value is not None and not 0 <= value < size:
            parser.error(f"--{flag} is {value}; this {type(classifier.model).__name__} has {size}, counted from 0")
    options = {"num_images": arguments.num_images, "layer": arguments.layer, "head": arguments.head}
    images = {path: classifier.decode(path) for path in arguments.images}
    test = evaluation = None
    if isinstance(classifier, Run) and not classifier.dataset_given:
        test = classifier.load_test_split(arguments.data_dir)
        evaluation = classifier.measure(test, validation=classifier.load_validation_split(arguments.data_dir))
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in draw_all(classifier, test, evaluation, images=images, **options):
        write_atomically(out / f"{name}.png", plotting.to_png(figure))
        print(out / f"{name}.png", flush=True)
    return 0


def draw_all(
    classifier: Classifier,
    test: Split | None = None,
    evaluation: Evaluation | None = None,
    *,
    images: Mapping[str, UInt8[np.ndarray, "h w 3"]] | None = None,
    num_images: int = 9,
    layer: int | None = None,
    head: int | None = None,
) -> Iterator[tuple[str, Figure]]:
    """Yields the figures of a run: curves, parameters, predictions, attention; for a ResNet curves and predictions.

    Attention is plotted for all layers (rollout) and heads, for the mean over the heads of one `layer`, or for one
    `head`: on `images`, by name, or on `num_images` random images of `test`, by default the run's test split.
    `evaluation` is of `test`, by default without calibration. A dataset given from Python needs `test`: without it,
    predictions are not plotted, and attention only for `images`. A `classifier` that is not a run has only the figures
    of its parameters, and attention for `images`.
    """
    run = classifier if isinstance(classifier, Run) else None
    if run and (records := read_records(run.workdir / "metrics.jsonl", last_step=run.step)):
        yield "curves", plotting.plot_curves(records, title=run.workdir.name)
    is_vit = isinstance(classifier.model, VisionTransformer)
    if is_vit:
        yield from draw_parameters(classifier)
    if run and test is None and not run.dataset_given:
        test = run.load_test_split()
    if run and test is not None:
        evaluation = evaluation or run.measure(test)
        yield from draw_predictions(run, test, evaluation)
    else:
        print(_omissions(run), file=sys.stderr)
    if not is_vit:
        print(f"a {type(classifier.model).__name__} has no attention, position embeddings or patch filters to plot")
        return
    if images:
        titles, shown = [Path(path).name for path in images], np.stack(list(images.values()))
        predictions = classifier.predict(shown).argmax(axis=-1)
    elif run and test is not None and evaluation is not None:
        chosen = np.random.default_rng(run.config.seed).permutation(len(test))[:num_images]
        titles = [f"true: {run.class_names[i]}" for i in test.labels[chosen]]
        shown = np.stack([test.images[i] for i in chosen])
        predictions = evaluation.predictions[chosen]
    else:
        return
    if classifier.has_trained_head:
        classes = [classifier.class_names[i] for i in predictions]
        titles = [f"{title}\npredicted: {found}" for title, found in zip(titles, classes, strict=True)]
    yield from draw_attention(classifier, shown, titles, layer=layer, head=head)


def _omissions(run: Run | None) -> str:
    """Names the figures that cannot be plotted for a checkpoint (None), or for a run on a dataset given from Python."""
    if run is None:
        return (
            "not a run: curves, confusion matrix, reliability and errors are omitted; attention is plotted for --images"
        )
    return (
        f"{run.workdir} was trained on a dataset given from Python: no predictions are plotted; for all figures, "
        "call vit_jax.report.write_report(workdir, split=split)"
    )


def draw_parameters(classifier: Classifier) -> Iterator[tuple[str, Figure]]:
    """Plots the position embeddings, and the filters of the patch embedding or the hybrid's root."""
    assert isinstance(classifier.model, VisionTransformer)
    embeddings = np.asarray(classifier.params["Transformer"]["posembed_input"]["pos_embedding"])
    similarity = analysis.position_similarity(embeddings, class_token=classifier.model.pool == "cls")
    yield "position_similarity", plotting.plot_position_similarity(similarity)
    yield "position_matrix", plotting.plot_position_matrix(similarity)
    filters = classifier.params["embedding" if classifier.model.stem_units is None else "conv_root"]["kernel"]
    yield "patch_filters", plotting.plot_filters(*analysis.filter_components(np.asarray(filters)))


def draw_predictions(run: Run, test: Split, evaluation: Evaluation) -> Iterator[tuple[str, Figure]]:
    """Plots the confusion matrix, the reliability and, if there are any, the most confident errors."""
    names, predictions, probabilities = run.class_names, evaluation.predictions, evaluation.probabilities
    counts = analysis.confusion_matrix(test.labels, predictions, num_classes=len(names))
    accuracy = np.trace(counts) / counts.sum()
    title = f"Confusion matrix of {run.workdir.name}: test accuracy {accuracy:.2%} ({len(test):,} images)"
    pairs = analysis.most_frequent_confusions(counts)
    yield "confusion", plotting.plot_confusion(counts, pairs, names, title=title)
    curves = {"probabilities of the model": evaluation.reliability}
    if evaluation.calibrated_reliability is not None:
        curves[f"with temperature {evaluation.temperature:.3f}"] = evaluation.calibrated_reliability
    labelled = {
        f"{name}: ECE {bins.error:.2%}": (bins.confidences, bins.accuracies, bins.counts)
        for name, bins in curves.items()
    }
    title = f"Reliability of {run.workdir.name} in {calibration.NUM_BINS} bins of equal mass"
    yield "reliability", plotting.plot_reliability(labelled, title=title)
    wrong = analysis.most_confident_errors(probabilities, test.labels)
    if not len(wrong):
        return
    labels, predicted = [names[i] for i in test.labels[wrong]], [names[i] for i in predictions[wrong]]
    yield "errors", plotting.plot_errors(test.images[wrong], labels, predicted, probabilities[wrong].max(axis=-1))


def draw_attention(
    classifier: Classifier,
    images: UInt8[np.ndarray, "b h w 3"],
    titles: Sequence[str],
    *,
    layer: int | None,
    head: int | None,
) -> Iterator[tuple[str, Figure]]:
    """Plots attention rollout and the maps of all heads, or the attention of one layer or head; see `draw_all`."""
    assert isinstance(classifier.model, VisionTransformer)
    inputs, class_token = classifier.preprocess(images), classifier.model.pool == "cls"
    weights = analysis.attention_weights(classifier.model, classifier.params, inputs)  # [l b k n n]
    maps = analysis.attention_maps(weights, class_token=class_token)  # [l b k g g]
    query = "the class token" if class_token else "the patches (mean)"
    if layer is None:
        pooling = analysis.pooling_weights(classifier.model, classifier.params, inputs)
        rollout = analysis.attention_rollout(weights, pooling)
        title = "Attention rollout"
        yield "attention_rollout", plotting.plot_attention(images, rollout, titles, title=title)
        title = f"Attention of {query} (above each map: the largest)"
        yield "attention_heads", plotting.plot_heads(images[0], maps[:, 0], title=title)
        return
    shown = maps[layer].mean(axis=1) if head is None else maps[layer][:, head]
    title = f"Attention of {query}: layer {layer}, " + ("mean of its heads" if head is None else f"head {head}")
    name = f"attention_layer_{layer}" + ("" if head is None else f"_head_{head}")
    yield name, plotting.plot_attention(images, shown, titles, title=title)


if __name__ == "__main__":
    sys.exit(run_command(main))
