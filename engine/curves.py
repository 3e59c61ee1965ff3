"""A picture of a run: loss, accuracy and learning rate over the epochs; the only importer of
matplotlib in engine/.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from engine.logs import read_metrics
from utils import RunError

BLUE = "#2563eb"
GREY = "#4b5563"
OTHERS = ("#e8590c", "#2f9e44", "#9c36b5", "#0c8599")
TRAINING = ("train", "epoch")  # kinds written in training: of single updates, and epoch means


class CurveError(RunError):
    """Curves that cannot be drawn, in one line."""


@dataclass(frozen=True)
class Curve:
    """Values over updates; NaN is a gap."""

    label: str
    steps: list[float]
    values: list[float]
    colour: str


@dataclass(frozen=True)
class TimeAxis:
    """The horizontal axis: epochs, or updates where `updates_per_epoch` is 0 (not known)."""

    updates_per_epoch: int = 0

    @property
    def label(self) -> str:
        if not self.updates_per_epoch:
            return "update"
        plural = "" if self.updates_per_epoch == 1 else "s"
        return f"epoch ({self.updates_per_epoch} update{plural} each)"

    def positions(self, steps: list[float]) -> list[float]:
        """Where updates lie on the axis."""
        return [step / (self.updates_per_epoch or 1) for step in steps]


def plot_curves(
    metrics_jsonl: str | Path,
    png: str | Path,
    *,
    updates_per_epoch: int = 0,
    training_loss: str = "",
) -> Path:
    """Draws metrics.jsonl into a PNG of 1800 x 540 pixels and returns its path.

    Read are: loss and lr of kind "train", train_loss of kind "epoch", and of every other kind each
    name that contains "loss" or "acc1", one curve each; "ema" in a name or kind marks averaged
    weights. A panel without values stays empty.

    Args:
        updates_per_epoch: the axis shows epochs; 0: updates.
        training_loss: why the training loss is not comparable with the validation's, such as "with
            label smoothing"; stands in the legend.
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
    training = training_curves(entries, training_loss)
    rate = Curve("", *collect(entries, "train", "lr"), GREY)
    losses = validation_curves(entries, "loss")
    accuracies = validation_curves(entries, "acc1")
    if not (training or rate.steps or losses or accuracies):
        raise CurveError(f"{metrics_jsonl}: no entry has a loss, an accuracy or a learning rate")
    figure = Figure(figsize=(12, 3.6), dpi=150, layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    time = TimeAxis(updates_per_epoch)
    _draw_loss(left, time, training, losses)
    _draw_accuracy(middle, time, accuracies)
    _draw_rate(right, time, rate)
    for panel in (left, middle, right):
        panel.set_xlim(left=0)
        panel.locator_params(axis="x", integer=True)
    figure.savefig(png)
    return Path(png)


def collect(entries: list[dict], kind: str, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one number."""
    found = [entry for entry in entries if entry["kind"] == kind and name in entry]
    steps = [entry["step"] for entry in found]
    values = [math.nan if entry[name] is None else entry[name] for entry in found]
    return steps, values


def training_curves(entries: list[dict], training_loss: str = "") -> list[Curve]:
    """The training loss: means over epochs, or of a run of one epoch its updates, smoothed; before
    it, without a label, the single updates where they are many.
    """
    label = f"training, {training_loss}" if training_loss else "training"
    steps, values = collect(entries, "train", "loss")
    mean_steps, means = collect(entries, "epoch", "train_loss")
    many = len(values) > 40
    curves = []
    if many:
        curves.append(Curve("", steps, values, BLUE))
    if len(means) > 1 or (means and not values):
        curves.append(Curve(label, mean_steps, means, BLUE))
    elif values:
        shown = smooth(values, len(values) // 40) if many else values
        curves.append(Curve(label, steps, shown, BLUE))
    return curves


def validation_curves(entries: list[dict], word: str) -> list[Curve]:
    """A curve for each number of a validation kind whose name contains `word`, in order of
    appearance.
    """
    names = {
        (entry["kind"], name): None
        for entry in entries
        if entry["kind"] not in TRAINING
        for name in entry
        if word in name
    }
    return [
        Curve(_label(kind, name, word), *collect(entries, kind, name), OTHERS[i % len(OTHERS)])
        for i, (kind, name) in enumerate(names)
    ]


def _label(kind: str, name: str, word: str) -> str:
    if "ema" in f"{kind} {name}":
        return "validation, averaged weights"
    if name == word and kind in ("eval", "val"):
        return "validation"
    return f"{kind} {name}"


def _draw_loss(axes, time: TimeAxis, training: list[Curve], validation: list[Curve]) -> None:
    _style(axes, time, "Loss", "cross-entropy")
    for curve in training + validation:
        if curve.label:
            _plot(axes, time, curve, label=curve.label)
        else:
            _plot(axes, time, curve, alpha=0.25, linewidth=0.8)
    if training or validation:
        axes.update_datalim([(0, 0)])  # 0 counts for the margin above the largest value
        axes.autoscale_view()
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)


def _draw_accuracy(axes, time: TimeAxis, validation: list[Curve]) -> None:
    _style(axes, time, "Accuracy", "top-1, %")
    for curve in validation:
        best = max((value for value in curve.values if not math.isnan(value)), default=math.nan)
        _plot(axes, time, curve, label=f"{curve.label}, best {best:.2f} %")
        if best in curve.values:
            step = curve.steps[curve.values.index(best)]
            axes.plot(
                time.positions([step]),
                [best],
                color=curve.colour,
                marker="o",
                markersize=7,
                markeredgecolor="white",
            )
    if validation:
        axes.set_ylim(top=101)
        axes.legend(frameon=False, fontsize=9)


def _draw_rate(axes, time: TimeAxis, rate: Curve) -> None:
    largest = max(rate.values, default=0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    _style(axes, time, "Learning rate", f"first group, $\\times 10^{{{exponent}}}$")
    if rate.steps:
        scaled = [value / 10**exponent for value in rate.values]
        _plot(axes, time, Curve("", rate.steps, scaled, rate.colour))
        axes.set_ylim(bottom=0)


def _plot(axes, time: TimeAxis, curve: Curve, **style) -> None:
    """A line, with a dot at each of its values where these are few."""
    if len(curve.steps) <= 20:
        style |= {"marker": "o", "markersize": 3}
    style = {"linewidth": 1.8, "color": curve.colour, **style}
    axes.plot(time.positions(curve.steps), curve.values, **style)


def _style(axes, time: TimeAxis, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(time.label, fontsize=10)
    axes.set_ylabel(unit, fontsize=10)
    axes.tick_params(labelsize=9, length=0)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")


def smooth(values: list[float], width: int) -> list[float]:
    """Centred mean over 2 width + 1 values, fewer at the ends; NaN values are left out of the
    means.
    """
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - width) : i + width + 1] if not math.isnan(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means
