"""Arrays and records to matplotlib figures. Figures are made without pyplot: no window, no global state."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by the colour-blind.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_TRAIN, _TEST = _COLOURS[:2]
_MARKERS = "os^Dv<>"


def plot_curves(records: Sequence[dict[str, Any]], *, title: str = "") -> Figure:
    """Loss, accuracy and learning rate over the steps.

    Args:
        records: the lines of a metrics.jsonl, as dictionaries.
        title: above the three panels.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    train = {"label": "train (single batches)", "color": _TRAIN, "linewidth": 0.8, "alpha": 0.8}
    test = {"label": "test", "color": _TEST, "marker": "o", "markersize": 3}
    _curve(loss, records, "train/loss", **train)
    _curve(loss, records, "test/loss", **test)
    loss.set(title="Loss", ylabel="cross-entropy (nats)", ylim=(0, None))
    _curve(accuracy, records, "train/accuracy", **train)
    _curve(accuracy, records, "test/accuracy", **test)
    accuracy.set(title="Accuracy", ylabel="share of pictures", ylim=(0, 1.02))
    _curve(rate, records, "learning_rate", label="learning rate", color=_TRAIN)
    rate.set(title="Learning rate", ylabel="rate", ylim=(0, None))
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    for axes in (loss, accuracy):
        axes.legend()
    figure.suptitle(title)
    return figure


def plot_accuracies(runs: Mapping[str, Sequence[dict[str, Any]]], *, title: str = "") -> Figure:
    """Test accuracy over the steps, one line for each run.

    Args:
        runs: name -> the lines of its metrics.jsonl.
        title: above.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, records) in enumerate(runs.items()):
        last = [f": {record['test/accuracy']:.1%}" for record in records if "test/accuracy" in record][-1:]
        style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 4}
        _curve(axes, records, "test/accuracy", label="".join([name, *last]), **style)
    axes.set(xlabel="step", ylabel="share of test pictures that are right", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.suptitle(title)
    return figure


def _curve(axes: Any, records: Sequence[dict[str, Any]], key: str, **style: Any) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    axes.plot([step for step, _ in points], [value for _, value in points], **style)


def plot_attention(images: np.ndarray, maps: np.ndarray, titles: Sequence[str], *, title: str) -> Figure:
    """Pictures, each above itself darkened where little attention goes.

    Args:
        images: uint8 [b h w 3].
        maps: [b g g], weights of the patches.
        titles: [b], above the pictures.
        title: of the figure.
    """
    columns = min(8, len(images))
    rows = -(-len(images) // columns)
    width = max(6.5, 1.7 * columns + 0.3)  # room for the title
    figure = Figure(figsize=(width, 3.9 * rows + 0.5), layout="constrained")
    panels = figure.subplots(2 * rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for i, (image, weights, name) in enumerate(zip(images, maps, titles, strict=True)):
        above, below = panels[2 * (i // columns) : 2 * (i // columns) + 2, i % columns]
        above.imshow(image)
        above.set_title("\n".join(_short(line) for line in name.splitlines()), fontsize=9)
        height, width = image.shape[:2]
        below.imshow(image, extent=(0, width, height, 0))
        shade = np.zeros((*weights.shape, 4))
        shade[..., 3] = 0.85 * (1.0 - weights / max(weights.max(), 1e-12))
        below.imshow(shade, extent=(0, width, height, 0), interpolation="bilinear")
    figure.suptitle(title)
    return figure


def plot_heads(image: np.ndarray, weights: np.ndarray, *, title: str) -> Figure:
    """What the class token attends to, head by head in columns, layer by layer in rows.

    Args:
        image: uint8 [h w 3], shown first.
        weights: [l k g g]; all panels share one scale, of square roots, for one head often outshines all others.
        title: of the figure.
    """
    layers, heads = weights.shape[:2]
    figure = Figure(figsize=(max(6.0, 0.9 * heads + 2.6), 0.9 * layers + 1.2), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.6, max(3.0, 0.9 * heads + 0.4)))[0]
    picture = left.subplots()
    picture.imshow(image)
    picture.set_axis_off()
    panels = right.subplots(layers, heads, squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axes = panels[layer, head]
            shown = axes.imshow(weights[layer, head], cmap="viridis", norm=PowerNorm(0.5, vmin=0, vmax=weights.max()))
            axes.set(xticks=[], yticks=[])
            if layer == 0:
                axes.set_title(f"head {head}", fontsize=8)
            if head == 0:
                axes.set_ylabel(f"layer {layer}", fontsize=8)
    right.colorbar(shown, ax=panels, label="attention weight", fraction=0.05)
    figure.suptitle(title)
    return figure


def plot_position_similarity(similarity: np.ndarray) -> Figure:
    """Each position's similarity to all others: a grid of grids, in the places of the patches.

    Args:
        similarity: [n n] with n = g · g, from -1 to 1.
    """
    side = round(len(similarity) ** 0.5)
    gap = 1
    cell = side + gap
    canvas = np.full((side * cell - gap, side * cell - gap), np.nan)
    for i in range(side):
        for j in range(side):
            grid = similarity[i * side + j].reshape(side, side)
            canvas[i * cell : i * cell + side, j * cell : j * cell + side] = grid
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(canvas, cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    middle, numbers = [i * cell + (side - 1) / 2 for i in range(side)], [str(i) for i in range(side)]
    axes.set(xlabel="column of the patch", ylabel="row of the patch")
    axes.set_xticks(middle, numbers, fontsize=8)
    axes.set_yticks(middle, numbers, fontsize=8)
    axes.set_title("Position embeddings: each one's similarity to all others")
    figure.colorbar(shown, label="cosine similarity")
    return figure


def plot_position_matrix(similarity: np.ndarray) -> Figure:
    """The whole matrix of similarities [n n], row after row of patches."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(similarity, cmap="viridis", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(xlabel="patch, row by row", ylabel="patch, row by row")
    axes.set_title("Position embeddings: similarity of every pair")
    figure.colorbar(shown, label="cosine similarity")
    return figure


def plot_filters(components: np.ndarray, shares: np.ndarray) -> Figure:
    """Principal components of the patch filters as colours, each scaled to its own range.

    Args:
        components: [count p p 3].
        shares: [count], of the variance.
    """
    columns = min(7, len(components))
    rows = -(-len(components) // columns)
    figure = Figure(figsize=(1.25 * columns + 0.4, 1.45 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, component, share in zip(panels.flat, components, shares, strict=False):
        extent = max(np.abs(component).max(), 1e-12)
        axes.imshow(0.5 + 0.5 * component / extent, interpolation="nearest")
        axes.set_title(f"{share:.1%}", fontsize=8)
    figure.suptitle("Patch filters: principal components and their share of the variance")
    return figure


def plot_confusion(
    counts: np.ndarray, pairs: Sequence[tuple[int, int, int]], class_names: Sequence[str], *, title: str
) -> Figure:
    """The confusion matrix in shares of each row, and the commonest mistakes in words.

    Args:
        counts: [c c], of pictures; row: what it is, column: what the model says.
        pairs: of `analysis.most_confused`.
        class_names: [c].
        title: of the figure.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(counts) <= 20
    figure = Figure(figsize=(13.5, 8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(5, 2))
    shown = left.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    left.set(title=title, xlabel="the model says", ylabel="it is")
    if few:
        left.set_xticks(range(len(counts)), class_names, rotation=45, ha="right", rotation_mode="anchor")
        left.set_yticks(range(len(counts)), class_names)
        for i, j in np.argwhere(counts):
            colour = "black" if shares[i, j] > 0.5 else "white"
            left.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=8, color=colour)
    else:
        left.set(xlabel="the model says (number of the class)", ylabel="it is (number of the class)")
    figure.colorbar(shown, ax=left, label="share of the pictures of a row", fraction=0.046)
    right.set_axis_off()
    lines = [f"{number:>4}  {_short(class_names[i])} taken for {_short(class_names[j])}" for i, j, number in pairs]
    right.set_title("Most confused (pictures)", loc="left")
    words = "\n".join(lines) or "no mistakes"
    right.text(0, 0.98, words, va="top", fontsize=9, linespacing=1.6, transform=right.transAxes)
    return figure


def plot_errors(
    images: np.ndarray, labels: Sequence[str], predictions: Sequence[str], probabilities: Sequence[float]
) -> Figure:
    """A sheet of wrong pictures, under each what it is and what the model says.

    Args:
        images: uint8 [b h w 3].
        labels: [b], names of the classes.
        predictions: [b], names of what the model says.
        probabilities: [b], how sure it is.
    """
    columns = 5
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(2.1 * columns, 2.6 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, image, label, prediction, probability in zip(
        panels.flat, images, labels, predictions, probabilities, strict=False
    ):
        axes.imshow(image)
        axes.set_title(f"{_short(label)}\nsays {_short(prediction)}, {probability:.0%}", fontsize=9)
    figure.suptitle("The surest mistakes" if len(images) else "No mistakes")
    return figure


def _short(name: str) -> str:
    return textwrap.shorten(name.replace("_", " "), 20, placeholder="…")
