"""Arrays and records to matplotlib figures. Figures are made without pyplot: no window, no global state."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

_TRAIN, _TEST = "#0072B2", "#D55E00"  # blue and vermilion of Okabe and Ito's palette, told apart by the colour-blind


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


def _curve(axes: Any, records: Sequence[dict[str, Any]], key: str, **style: Any) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    axes.plot([step for step, _ in points], [value for _, value in points], **style)
