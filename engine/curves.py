"""A picture of a run: loss, accuracy and learning rate over the updates; the only importer of
matplotlib in engine/.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from engine.logs import read_metrics
from utils import RunError

BLUE, GREY, OTHERS = "#2563eb", "#4b5563", ("#e8590c", "#2f9e44", "#9c36b5", "#0c8599")
TRAINING = (
    "train",
    "epoch",
)  # kinds written while training: at single updates, and means over an epoch


class CurveError(RunError):
    """Curves that cannot be drawn, in one line."""


@dataclass(frozen=True)
class Curve:
    """Values over updates; NaN is a gap."""

    label: str
    steps: list[int]
    values: list[float]
    colour: str


def plot_curves(metrics_jsonl: str | Path, png: str | Path) -> Path:
    """Draws metrics.jsonl into a PNG of 1800 x 540 pixels and returns its path.

    Read are: loss and lr of kinds "train" and "epoch", and of every other kind each name that
    contains "loss" or "acc1", one curve each; "ema" in a name or kind marks averaged weights. A
    panel without values stays empty.
    Raises: CurveError if there is nothing to draw or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: no global state, no display
    except ImportError as problem:
        raise CurveError(
            "LOG.PLOT is on but matplotlib is not installed: `pip install matplotlib`, or set it to"
            " False"
        ) from problem
    entries = read_metrics(metrics_jsonl)
    training = {
        (kind, name): collect(entries, kind, name) for kind in TRAINING for name in ("loss", "lr")
    }
    losses, accuracies = validation_curves(entries, "loss"), validation_curves(entries, "acc1")
    if not (losses or accuracies or any(steps for steps, _ in training.values())):
        raise CurveError(f"{metrics_jsonl}: no entry has a loss, an accuracy or a learning rate")
    figure = Figure(figsize=(12, 3.6), dpi=150, layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    _draw_loss(left, training["train", "loss"], training["epoch", "loss"], losses)
    _draw_accuracy(middle, accuracies)
    _draw_rate(
        right, training["train", "lr"] if training["train", "lr"][0] else training["epoch", "lr"]
    )
    figure.savefig(png)
    return Path(png)


def collect(entries: list[dict], kind: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one number."""
    found = [
        (entry["step"], entry[name]) for entry in entries if entry["kind"] == kind and name in entry
    ]
    return [step for step, _ in found], [math.nan if value is None else value for _, value in found]


def validation_curves(entries: list[dict], word: str) -> list[Curve]:
    """A curve for each number of a validation kind whose name contains `word`, in order of
    appearance.
    """
    names = {
        (e["kind"], name): None
        for e in entries
        if e["kind"] not in TRAINING
        for name in e
        if word in name
    }
    return [
        Curve(_label(kind, name, word), *collect(entries, kind, name), OTHERS[i % len(OTHERS)])
        for i, (kind, name) in enumerate(names)
    ]


def _label(kind: str, name: str, word: str) -> str:
    if "ema" in f"{kind} {name}":
        return "validation, averaged weights"
    return "validation" if name == word and kind in ("eval", "val") else f"{kind} {name}"


def _draw_loss(axes, single: tuple, mean: tuple, validation: list[Curve]) -> None:
    _style(axes, "Loss", "cross-entropy")
    steps, values = single
    if len(values) > 40:
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        values = smooth(values, len(values) // 40)
    if len(mean[0]) > 1:
        steps, values = mean
    curves = [Curve("training", steps, values, BLUE)] if steps else []
    for curve in curves + validation:
        axes.plot(
            curve.steps,
            curve.values,
            color=curve.colour,
            linewidth=1.8,
            label=curve.label,
            **_dots(curve.steps),
        )
    if curves + validation:
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)


def _draw_accuracy(axes, validation: list[Curve]) -> None:
    _style(axes, "Accuracy", "top-1, %")
    for curve in validation:
        best = max((value for value in curve.values if not math.isnan(value)), default=math.nan)
        label = f"{curve.label}, best {best:.2f} %"
        axes.plot(
            curve.steps,
            curve.values,
            color=curve.colour,
            linewidth=1.8,
            label=label,
            **_dots(curve.steps),
        )
        if best in curve.values:
            step = curve.steps[curve.values.index(best)]
            axes.plot(
                [step],
                [best],
                color=curve.colour,
                marker="o",
                markersize=7,
                markeredgecolor="white",
            )
    if validation:
        axes.set_ylim(top=101)
        axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_rate(axes, rate: tuple) -> None:
    steps, values = rate
    exponent = math.floor(math.log10(max(values))) if values and max(values) > 0 else 0
    _style(axes, "Learning rate", f"first group, $\\times 10^{{{exponent}}}$")
    if steps:
        axes.plot(
            steps,
            [value / 10**exponent for value in values],
            color=GREY,
            linewidth=1.8,
            **_dots(steps),
        )
        axes.set_ylim(bottom=0)


def _style(axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("update", fontsize=10)
    axes.set_ylabel(unit, fontsize=10)
    axes.tick_params(labelsize=9, length=0)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")


def _dots(steps: list[int]) -> dict:
    return {"marker": "o", "markersize": 3} if len(steps) <= 20 else {}


def smooth(values: list[float], width: int) -> list[float]:
    """Centred mean over 2 width + 1 values, fewer at the ends; NaN values are left out of the
    means.
    """
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - width) : i + width + 1] if not math.isnan(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means
