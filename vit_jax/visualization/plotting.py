"""Plots metrics, predictions, attention and parameters with Matplotlib, without pyplot's windows and state."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

Records = Sequence[Mapping[str, float]]
"""The lines of a metrics.jsonl."""

Curve = tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], Int[np.ndarray, " bins"]]
"""Confidence, accuracy and number of images of each bin."""

WIDTH = 8.0
"""Width of every figure in inches: at 800 pixels, text of 8 points and more is readable."""

# Okabe and Ito's palette, which color-blind readers can tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
_TRAIN, _TEST, _VALIDATION = _COLORS[:3]
_MARKERS = "os^Dv<>"  # not as many as colors, so that 56 lines differ
_SMALL = 8  # points


def to_png(figure: Figure, *, dpi: int = 150) -> bytes:
    """Returns a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    return buffer.getvalue()


def plot_curves(records: Records, *, title: str = "") -> Figure:
    """Plots loss, accuracy and learning rate over the steps."""
    figure = _create_figure(3.0, title)
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, metric in ((loss, "loss"), (accuracy, "accuracy")):
        _plot_metric(axes, records, f"train/{metric}", label="train (single batches)", color=_TRAIN)
        if any("validation/loss" in record for record in records):
            _plot_metric(axes, records, f"validation/{metric}", label="validation", color=_VALIDATION, marker="s")
        _plot_metric(axes, records, f"test/{metric}", label="test", color=_TEST, marker="o")
        axes.legend(fontsize=_SMALL)
    _plot_metric(rate, records, "learning_rate", label="learning rate", color=_TRAIN)
    loss.set(ylabel="loss (cross-entropy)", ylim=(0, None))
    accuracy.set(ylabel="accuracy", ylim=(0, 1.02))
    rate.set(ylabel="learning rate", ylim=(0, None))
    return figure


def plot_accuracies(runs: Mapping[str, Records], *, name: str = "test/accuracy", title: str = "") -> Figure:
    """Plots an accuracy over the steps, one line per run; `name` is its key in the records."""
    figure = _create_figure(4.5, title)
    axes = figure.subplots()
    for i, (run, records) in enumerate(runs.items()):
        last = [f": {record[name]:.1%}" for record in records if name in record][-1:]
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        _plot_metric(axes, records, name, label="".join([run, *last]), color=color, marker=marker)
    axes.set_ylabel(name.replace("/", " "))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the lines
    return figure


def _plot_metric(axes: Axes, records: Records, key: str, *, label: str, color: str, marker: str = "") -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    steps, values = [step for step, _ in points], [value for _, value in points]
    axes.plot(steps, values, label=label, color=color, marker=marker, markersize=3, linewidth=1)
    axes.set_xlabel("step")
    axes.tick_params(labelsize=_SMALL)
    axes.grid(alpha=0.3)


def plot_rows(rows: Mapping[str, UInt8[np.ndarray, "b h w 3"]], *, title: str) -> Figure:
    """Plots rows of images, each below its name; rows have the same number of images."""
    figure, panels = _create_panels(len(rows), max(map(len, rows.values())), title=title)
    for axes, (name, images) in zip(panels, rows.items(), strict=True):
        axes[0].set_title(name, loc="left", fontsize=_SMALL, pad=3)
        for panel, image in zip(axes, images, strict=True):
            panel.imshow(image)
    return figure


def plot_attention(
    images: UInt8[np.ndarray, "b h w 3"], maps: Float[np.ndarray, "b g g"], titles: Sequence[str], *, title: str
) -> Figure:
    """Plots each image beside its attention map, a heat map on its own color scale over a grey copy of the image."""
    columns = min(3, math.ceil(math.sqrt(len(images))))
    rows = -(-len(images) // columns)
    figure, panels = _create_panels(rows, 2 * columns, title=title, captions=2)
    for pair, image, weights, name in zip(panels.reshape(-1, 2), images, maps, titles, strict=False):
        pair[0].imshow(image)
        pair[0].set_title(
            "\n".join(_shorten(line, 34) for line in name.splitlines()), loc="left", fontsize=_SMALL, pad=3
        )  # above both
        _plot_heat_map(pair[1], image, weights)
        pair[1].set_xlabel(f"{weights.min():.2%} to {weights.max():.2%}", fontsize=_SMALL)
    _add_heat_bar(figure, panels, label="attention to a patch")
    return figure


def plot_heads(
    image: UInt8[np.ndarray, "h w 3"], weights: Float[np.ndarray, "layers heads g g"], *, title: str
) -> Figure:
    """Plots an image and its attention maps, as in `plot_attention`: layers in rows, heads in columns.

    The largest attention to a patch is above each map.
    """
    layers, heads = weights.shape[:2]
    side = min(1.2, (WIDTH - 3.0) / heads)
    figure = _create_figure(max(2.4, layers * (side + 0.2) + 0.9), title, pad=0.02)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.5, WIDTH - 1.5))[0]
    shown = left.subplots()
    shown.imshow(image)
    shown.set_axis_off()
    panels = right.subplots(layers, heads, squeeze=False)
    for (layer, head), axes in np.ndenumerate(panels):
        _plot_heat_map(axes, image, weights[layer, head])
        axes.set_title(f"{weights[layer, head].max():.0%}", fontsize=_SMALL, pad=2)
        axes.set_xlabel(f"{head}" if layer == layers - 1 else "", fontsize=_SMALL)
        axes.set_ylabel(f"{layer}" if head == 0 else "", fontsize=_SMALL)
    right.supxlabel("head", fontsize=10)
    right.supylabel("layer", fontsize=10)
    _add_heat_bar(right, panels, label="attention to a patch")
    return figure


_HEAT_CMAP, _HEAT_ALPHA = "inferno", 0.65


def _plot_heat_map(axes: Axes, image: UInt8[np.ndarray, "h w 3"], weights: Float[np.ndarray, "g g"]) -> None:
    extent = (0, image.shape[1], image.shape[0], 0)
    axes.imshow(image.mean(axis=-1), cmap="gray", vmin=-200, vmax=455, extent=extent)  # faint, below the colors
    axes.imshow(weights, cmap=_HEAT_CMAP, alpha=_HEAT_ALPHA, extent=extent, interpolation="bilinear")
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])


def _add_heat_bar(figure: FigureBase, panels: np.ndarray, *, label: str) -> None:
    """Adds a color bar with the colors of `_plot_heat_map`, from the minimum to the maximum of each map."""
    mappable = ScalarMappable(Normalize(), _HEAT_CMAP)
    bar = figure.colorbar(mappable, ax=panels, aspect=40, alpha=_HEAT_ALPHA, label=label)
    bar.ax.set_facecolor("0.5")
    bar.set_ticks([0, 1], labels=["min", "max"])


def plot_position_similarity(similarity: Float[np.ndarray, "n n"]) -> Figure:
    """Plots a grid of maps, one per patch: the similarity of its position embedding to all others."""
    side = round(len(similarity) ** 0.5)
    maps = similarity.reshape(side, side, side, side)
    maps = np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan)  # a gap after each map
    canvas = maps.transpose(0, 2, 1, 3).reshape(side * (side + 1), -1)[:-1, :-1]
    figure, axes = _plot_similarity(canvas, "Position embeddings: similarity of each to all others")
    centers, names = np.arange(side) * (side + 1) + (side - 1) / 2, [str(i) for i in range(side)]
    axes.set(xlabel="patch column", ylabel="patch row")
    axes.set_xticks(centers, names, fontsize=_SMALL)
    axes.set_yticks(centers, names, fontsize=_SMALL)
    return figure


def plot_position_matrix(similarity: Float[np.ndarray, "n n"]) -> Figure:
    """Plots the matrix of similarities between all position embeddings."""
    figure, axes = _plot_similarity(similarity, "Position embeddings: similarity of every pair")
    axes.set(xlabel="patch index", ylabel="patch index")
    return figure


def _plot_similarity(image: np.ndarray, title: str) -> tuple[Figure, Axes]:
    figure = _create_figure(7.0, title)
    axes = figure.subplots()
    shown = axes.imshow(image, cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(shown, label="cosine similarity")
    return figure, axes


def plot_filters(components: Float[np.ndarray, "n p p 3"], explained: Float[np.ndarray, " n"]) -> Figure:
    """Plots the components of `analysis.filter_components` as colors, each scaled to its own range."""
    columns = min(7, len(components))
    title = "Patch filters: principal components and explained variance"
    figure, panels = _create_panels(-(-len(components) // columns), columns, title=title)
    for axes, component, fraction in zip(panels.flat, components, explained, strict=False):
        axes.imshow(0.5 + 0.5 * component / max(np.abs(component).max(), 1e-12), interpolation="nearest")
        axes.set_title(f"{fraction:.1%}", fontsize=_SMALL)
    return figure


def plot_confusion(
    counts: Int[np.ndarray, "c c"], pairs: Sequence[tuple[int, int, int]], class_names: Sequence[str], *, title: str
) -> Figure:
    """Plots the row-normalized confusion matrix and the most frequent confusions.

    The color scale is a square root, so that rare confusions are visible; classes without images are grey. With more
    than 20 classes, the axes show their indices.
    """
    totals, names = counts.sum(axis=1, keepdims=True), [_shorten(name, 16) for name in class_names]
    fractions = np.where(totals, counts / np.maximum(totals, 1), np.nan)
    figure = _create_figure(min(5.4, 3.0 + 0.24 * len(counts)), title)
    left, right = figure.subplots(1, 2, width_ratios=(5.4, 2.6))
    left.set_facecolor("darkgrey")
    shown = left.imshow(fractions, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    left.set(xlabel="predicted class", ylabel="true class")
    if len(counts) <= 20:
        rotation = 0 if max(map(len, names)) <= 3 else 45 if len(counts) <= 10 else 90
        alignment = {"ha": "right", "rotation_mode": "anchor"} if rotation == 45 else {}
        left.set_xticks(range(len(counts)), names, fontsize=_SMALL, rotation=rotation, **alignment)
        left.set_yticks(range(len(counts)), names, fontsize=_SMALL)
        for i, j in np.argwhere(counts):
            color = "white" if fractions[i, j] > 0.3 else "black"
            size = _SMALL if len(counts) <= 10 else 6
            left.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=size, color=color)
    else:
        left.set(xlabel="index of the predicted class", ylabel="index of the true class")
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=left, label="fraction of the true class", fraction=0.046, ticks=[0, 0.01, 0.1, 0.5, 1])
    right.set_axis_off()
    right.set_title("Most frequent confusions", loc="left", fontsize=10)
    if len(counts) > 20:
        names = [f"{name} ({i})" for i, name in enumerate(names)]
    arrow = " → " if max(map(len, names)) <= 12 else "\n    → "
    text = "\n".join(f"{number:,} × {names[i]}{arrow}{names[j]}" for i, j, number in pairs) or "none"
    right.text(0, 0.98, text, va="top", fontsize=_SMALL, linespacing=1.6, transform=right.transAxes)
    return figure


def plot_errors(
    images: UInt8[np.ndarray, "b h w 3"],
    labels: Sequence[str],
    predictions: Sequence[str],
    probabilities: Float[np.ndarray, " b"],
) -> Figure:
    """Plots misclassified images with their true class, predicted class and its probability."""
    figure, panels = _create_panels(max(1, -(-len(images) // 5)), 5, title="Most confident errors", captions=3)
    shown = zip(panels.flat, images, labels, predictions, probabilities, strict=False)
    for axes, image, label, prediction, probability in shown:
        axes.imshow(image)
        caption = f"true: {_shorten(label, 16)}\npredicted: {_shorten(prediction, 16)}\nprobability: {probability:.0%}"
        axes.set_title(caption, loc="left", fontsize=_SMALL, pad=3)
    return figure


def plot_reliability(curves: Mapping[str, Curve], *, title: str) -> Figure:
    """Plots accuracy over confidence, one line per curve: (confidences, accuracies, numbers of images) of bins.

    Below, the numbers of images at each confidence. The dashed diagonal is perfect calibration.
    """
    figure = _create_figure(5.4, title)
    axes, masses = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="perfect calibration")
    for i, (name, (confidences, accuracies, counts)) in enumerate(curves.items()):
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        axes.plot(confidences, accuracies, label=name, color=color, marker=marker, markersize=4, linewidth=1)
        edges = np.linspace(0, 1, 41)
        masses.hist(confidences, bins=edges, weights=counts, color=color, alpha=0.5)
    axes.set(ylabel="accuracy", xlim=(0, 1.02), ylim=(0, 1.02))
    masses.set(xlabel="confidence: probability of the predicted class", ylabel="images")
    axes.legend(loc="upper left", fontsize=_SMALL)
    for panel in (axes, masses):
        panel.tick_params(labelsize=_SMALL)
        panel.grid(alpha=0.3)
    return figure


def plot_images(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"] | None], captions: Sequence[str], *, columns: int, title: str
) -> Figure:
    """Plots images of any size row by row, each below its caption of up to two lines; None leaves a gap."""
    lines = max(caption.count("\n") + 1 for caption in captions)
    figure, panels = _create_panels(-(-len(images) // columns), columns, title=title, captions=lines)
    width = 114 // columns  # characters
    for axes, image, caption in zip(panels.flat, images, captions, strict=False):
        if image is not None:
            axes.imshow(image, interpolation="nearest" if max(image.shape) <= 64 else "antialiased")
            text = "\n".join(_shorten(line, width) for line in caption.splitlines())
            axes.set_title(text, loc="left", fontsize=_SMALL, pad=3)
    return figure


_MAX_BARS = 40  # classes


def plot_class_counts(counts: Mapping[str, Int[np.ndarray, " c"]], class_names: Sequence[str]) -> Figure:
    """Plots the number of images of each class, in one panel per split; of many classes only the sorted numbers."""
    few = len(class_names) <= _MAX_BARS
    figure = _create_figure(1.2 + 0.2 * len(class_names) if few else 3.0, "Images per class")
    panels = figure.subplots(1, len(counts), squeeze=False, sharey=few)[0]
    for axes, (name, number), color in zip(panels, counts.items(), _COLORS, strict=False):
        if few:
            bars = axes.barh(range(len(number)), number, color=color)
            axes.bar_label(bars, [f"{value:,}" for value in number], fontsize=_SMALL, padding=2)
            axes.set(xlim=(0, 1.25 * max(1, number.max())), xlabel="images")
        else:
            axes.plot(np.sort(number)[::-1], color=color)
            axes.set(ylim=(0, None), xlabel="classes, most frequent first")
        axes.set_title(f"{name}: {number.sum():,}", fontsize=10)
        axes.tick_params(labelsize=_SMALL)
    if few:
        panels[0].set_yticks(range(len(class_names)), [_shorten(name) for name in class_names])
        panels[0].invert_yaxis()
    else:
        panels[0].set_ylabel("images")
    return figure


def plot_image_sizes(sizes: Int[np.ndarray, "n 2"], *, image_size: int) -> Figure:
    """Plots (width, height) of images in pixels; the area of a point is the number of images of its size."""
    figure = _create_figure(5.0, "Image sizes")
    axes = figure.subplots()
    unique, counts = np.unique(sizes, axis=0, return_counts=True)
    axes.scatter(unique[:, 0], unique[:, 1], s=12 + 300 * counts / len(sizes), color=_TRAIN, alpha=0.5, linewidths=0)
    for line in (axes.axvline, axes.axhline):
        line(image_size, color=_TEST, linewidth=1, linestyle="--")
    limit = 1.1 * max(image_size, sizes.max())
    axes.set(xlabel="width, pixels", ylabel="height, pixels", xlim=(0, limit), ylim=(0, limit), aspect="equal")
    axes.legend(
        axes.lines[:1], [f"input of the model: {image_size} × {image_size}"], fontsize=_SMALL, loc="lower right"
    )
    return figure


def _create_figure(height: float, title: str, *, pad: float = 0.04) -> Figure:
    """Creates a figure of `WIDTH`; `height` and `pad`, around each axes, are in inches."""
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=pad, h_pad=pad))
    figure.suptitle(title, fontsize=11)
    return figure


def _create_panels(rows: int, columns: int, *, title: str, captions: int = 1) -> tuple[Figure, np.ndarray]:
    """Creates a figure with a grid of hidden square axes [rows columns], each below `captions` lines of text."""
    figure = _create_figure((WIDTH / columns + 0.16 * captions) * rows + 0.4, title)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    return figure, panels


def _shorten(name: str, width: int = 20) -> str:
    name = name.replace("_", " ")
    return name if len(name) <= width else f"{name[: width - 1].rstrip()}…"
