"""Plots metrics, predictions, attention and parameters with Matplotlib, without pyplot's windows and state."""

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure

Records = Sequence[Mapping[str, float]]
"""The lines of a metrics.jsonl."""

# Okabe and Ito's palette, which color-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_TRAIN, _TEST = _COLORS[:2]
_MARKERS = "os^Dv<>"


def to_png(figure: Figure, *, dpi: int = 120) -> bytes:
    """Returns a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return buffer.getvalue()


def plot_curves(records: Records, *, title: str = "") -> Figure:
    """Plots loss, accuracy and learning rate over the steps."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, metric in ((loss, "loss"), (accuracy, "accuracy")):
        _plot_metric(axes, records, f"train/{metric}", label="train (single batches)", color=_TRAIN)
        _plot_metric(axes, records, f"test/{metric}", label="test", color=_TEST, marker="o")
        axes.legend()
    _plot_metric(rate, records, "learning_rate", label="learning rate", color=_TRAIN)
    loss.set(title="Loss", ylabel="cross-entropy (nats)", ylim=(0, None))
    accuracy.set(title="Accuracy", ylabel="fraction of images", ylim=(0, 1.02))
    rate.set(title="Learning rate", ylabel="learning rate", ylim=(0, None))
    figure.suptitle(title)
    return figure


def plot_accuracies(runs: Mapping[str, Records], *, title: str = "") -> Figure:
    """Plots test accuracy over the steps, one line per run."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, records) in enumerate(runs.items()):
        last = [f": {record['test/accuracy']:.1%}" for record in records if "test/accuracy" in record][-1:]
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        _plot_metric(axes, records, "test/accuracy", label="".join([name, *last]), color=color, marker=marker)
    axes.set(ylabel="test accuracy", ylim=(0, 1.02))
    axes.legend(loc="lower right")
    figure.suptitle(title)
    return figure


def _plot_metric(axes: Axes, records: Records, key: str, *, label: str, color: str, marker: str = "") -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    steps, values = [step for step, _ in points], [value for _, value in points]
    axes.plot(steps, values, label=label, color=color, marker=marker, markersize=3, linewidth=1)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def plot_attention(
    images: UInt8[np.ndarray, "b h w 3"], maps: Float[np.ndarray, "b g g"], titles: Sequence[str], *, title: str
) -> Figure:
    """Plots each image above its attention map on a grey version of it; each map has its own color scale."""
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    figure, panels = _create_panels(2 * rows, columns, size=(1.7, 1.85), title=title)
    for i, (image, weights, name) in enumerate(zip(images, maps, titles, strict=True)):
        above, below = panels[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        above.imshow(image)
        above.set_title("\n".join(_shorten(line, 26) for line in name.splitlines()), fontsize=8)
        grey, extent = image.mean(axis=-1), (0, image.shape[1], image.shape[0], 0)
        below.imshow(grey, cmap="gray", vmin=-200, vmax=455, extent=extent)  # faint, so that the colors stand out
        below.imshow(weights, cmap="inferno", alpha=0.65, extent=extent, interpolation="bilinear")
        below.set_title(f"{weights.min():.2%} to {weights.max():.2%}", fontsize=7)
    bar = figure.colorbar(ScalarMappable(Normalize(), "inferno"), ax=panels, aspect=40, label="attention to a patch")
    bar.set_ticks([0, 1], labels=["min", "max"])
    return figure


def plot_heads(
    image: UInt8[np.ndarray, "h w 3"], weights: Float[np.ndarray, "layers heads g g"], *, title: str
) -> Figure:
    """Plots an image and the attention maps of all heads: layers in rows, heads in columns.

    All maps share one square-root color scale, as the weights of one head are often much larger than the others.
    """
    layers, heads = weights.shape[:2]
    figure = Figure(figsize=(max(6.0, 0.9 * heads + 2.6), 0.9 * layers + 1.2), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.6, max(3.0, 0.9 * heads + 0.4)))[0]
    shown = left.subplots()
    shown.imshow(image)
    shown.set_axis_off()
    panels = right.subplots(layers, heads, squeeze=False)
    norm = PowerNorm(0.5, vmin=0, vmax=weights.max())
    for (layer, head), axes in np.ndenumerate(panels):
        axes.imshow(weights[layer, head], cmap="viridis", norm=norm)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"head {head}" if layer == 0 else "", fontsize=8)
        axes.set_ylabel(f"layer {layer}" if head == 0 else "", fontsize=8)
    right.colorbar(ScalarMappable(norm, "viridis"), ax=panels, label="attention weight", fraction=0.05)
    figure.suptitle(title)
    return figure


def plot_position_similarity(similarity: Float[np.ndarray, "n n"]) -> Figure:
    """Plots a grid of maps, one per patch: the similarity of its position embedding to all others."""
    side = round(len(similarity) ** 0.5)
    maps = similarity.reshape(side, side, side, side)
    maps = np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)  # a gap after each map
    canvas = maps.transpose(0, 2, 1, 3).reshape(side * (side + 1), -1)[:-1, :-1]
    figure, axes = _plot_similarity(canvas, "Position embeddings: similarity of each to all others")
    centers, names = np.arange(side) * (side + 1) + (side - 1) / 2, [str(i) for i in range(side)]
    axes.set(xlabel="patch column", ylabel="patch row")
    axes.set_xticks(centers, names, fontsize=8)
    axes.set_yticks(centers, names, fontsize=8)
    return figure


def plot_position_matrix(similarity: Float[np.ndarray, "n n"]) -> Figure:
    """Plots the matrix of similarities between all position embeddings."""
    figure, axes = _plot_similarity(similarity, "Position embeddings: similarity of every pair")
    axes.set(xlabel="patch index", ylabel="patch index")
    return figure


def _plot_similarity(image: np.ndarray, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(image, cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title)
    figure.colorbar(shown, label="cosine similarity")
    return figure, axes


def plot_filters(components: Float[np.ndarray, "n p p 3"], explained: Float[np.ndarray, " n"]) -> Figure:
    """Plots the components of `analysis.filter_components` as colors, each scaled to its own range."""
    columns = min(7, len(components))
    rows = -(-len(components) // columns)
    title = "Patch filters: principal components and explained variance"
    figure, panels = _create_panels(rows, columns, size=(1.25, 1.45), title=title)
    for axes, component, fraction in zip(panels.flat, components, explained, strict=False):
        axes.imshow(0.5 + 0.5 * component / max(np.abs(component).max(), 1e-12), interpolation="nearest")
        axes.set_title(f"{fraction:.1%}", fontsize=8)
    return figure


def plot_confusion(
    counts: Int[np.ndarray, "c c"], pairs: Sequence[tuple[int, int, int]], class_names: Sequence[str], *, title: str
) -> Figure:
    """Plots the row-normalized confusion matrix, grey for classes without images, and the most frequent confusions."""
    totals, names = counts.sum(axis=1, keepdims=True), [_shorten(name) for name in class_names]
    fractions = np.where(totals, counts / np.maximum(totals, 1), np.nan)
    side = min(7.0, 3.2 + 0.36 * len(counts))  # inches
    figure = Figure(figsize=(1.2 * side + 3, side), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2 * side, 3))
    left.set_facecolor("lightgrey")
    shown = left.imshow(fractions, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    left.set(title=title, xlabel="predicted class", ylabel="true class")
    if len(counts) <= 20:
        left.set_xticks(range(len(counts)), names, rotation=45, ha="right", rotation_mode="anchor")
        left.set_yticks(range(len(counts)), names)
        for i, j in np.argwhere(counts):
            color = "black" if fractions[i, j] > 0.5 else "white"
            left.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=9, color=color)
    figure.colorbar(shown, ax=left, label="fraction of the true class", fraction=0.046)
    right.set_axis_off()
    right.set_title("Most frequent confusions", loc="left")
    text = "\n".join(f"{number:,} × {names[i]} classified as {names[j]}" for i, j, number in pairs) or "no errors"
    right.text(0, 0.98, text, va="top", fontsize=9, linespacing=1.6, transform=right.transAxes)
    return figure


def plot_errors(
    images: UInt8[np.ndarray, "b h w 3"],
    labels: Sequence[str],
    predictions: Sequence[str],
    probabilities: Float[np.ndarray, " b"],
) -> Figure:
    """Plots misclassified images with their true class, predicted class and its probability."""
    rows = max(1, -(-len(images) // 5))
    title = "Most confident errors" if len(images) else "No errors"
    figure, panels = _create_panels(rows, 5, size=(2.1, 2.6), title=title)
    shown = zip(panels.flat, images, labels, predictions, probabilities, strict=False)
    for axes, image, label, prediction, probability in shown:
        axes.imshow(image)
        axes.set_title(f"{_shorten(label)}\nclassified as {_shorten(prediction)}, {probability:.0%}", fontsize=8)
    return figure


def _create_panels(rows: int, columns: int, *, size: tuple[float, float], title: str) -> tuple[Figure, np.ndarray]:
    """Creates a figure with a grid of hidden axes [rows columns]; `size` of each is in inches."""
    width, height = size
    figure = Figure(figsize=(max(6.5, width * columns + 0.4), height * rows + 0.6), layout="constrained")  # title fits
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    figure.suptitle(title)
    return figure, panels


def _shorten(name: str, width: int = 20) -> str:
    return textwrap.shorten(name.replace("_", " "), width, placeholder="…")
