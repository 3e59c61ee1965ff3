"""The picture of a run."""

import math
import struct

import pytest

from engine.curves import (
    BLUE,
    Curve,
    CurveError,
    TimeAxis,
    _draw_accuracy,
    _draw_loss,
    plot_curves,
    smooth,
    training_curves,
    validation_curves,
)
from engine.logs import MetricLog, read_metrics


def write_run(folder, epochs=6, per_epoch=12):
    with MetricLog(folder, tensorboard=False) as log:
        for epoch in range(epochs):
            for step in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1):
                log.write(
                    step, epoch, "train", loss=2 * math.exp(-step / 30), lr=1e-3 * (1 - step / 200)
                )
            log.write(step, epoch, "epoch", train_loss=2 * math.exp(-step / 30))
            log.write(
                step,
                epoch,
                "eval",
                loss=math.exp(-step / 30),
                acc1=100 - 80 * math.exp(-step / 30),
                ema_acc1=50.0 + epoch,
            )
    return folder / "metrics.jsonl"


def size_of(png):
    header = png.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:24])


def colours_in(png):
    from matplotlib.image import imread

    pixels = (imread(png)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return {
        f"#{red:02x}{green:02x}{blue:02x}"
        for red, green, blue in {tuple(pixel) for pixel in pixels.tolist()}
    }


def test_picture_is_readable_at_the_width_of_a_readme_and_shows_every_curve(tmp_path):
    png = plot_curves(write_run(tmp_path), tmp_path / "curves.png")
    assert size_of(png) == (1800, 540) and png.stat().st_size < 400_000
    assert {"#ffffff", "#2563eb", "#e8590c", "#2f9e44", "#4b5563"} <= colours_in(png)


def test_validation_curves_are_found_by_name_and_told_apart():
    entries = [
        {"step": 1, "kind": "eval", "acc1": 50.0, "acc5": 90.0, "ema_acc1": 40.0},
        {"step": 1, "kind": "epoch", "acc1": 1.0},
        {"step": 2, "kind": "eval", "acc1": None},
    ]
    plain, averaged = validation_curves(entries, "acc1")
    assert (plain.label, averaged.label) == ("validation", "validation, averaged weights")
    assert plain.steps == [1, 2] and math.isnan(plain.values[1])
    assert averaged.values == [40.0]
    assert plain.colour != averaged.colour


def test_the_training_loss_is_the_mean_of_an_epoch_over_faint_single_updates(tmp_path):
    entries = read_metrics(write_run(tmp_path))
    single, mean = training_curves(entries, "with label smoothing")
    assert (single.label, len(single.steps)) == ("", 72)
    assert (mean.label, mean.steps) == ("training, with label smoothing", [12, 24, 36, 48, 60, 72])
    updates = [entry for entry in entries if entry["kind"] == "train"]
    assert [curve.label for curve in training_curves(updates)] == ["", "training"]
    assert [curve.steps for curve in training_curves(updates[:9])] == [list(range(1, 10))]


def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def test_the_legend_says_why_the_training_loss_is_not_the_validations():
    panel = axes()
    training = Curve("training, with label smoothing", [1, 2], [2.0, 1.0], BLUE)
    validation = Curve("validation", [1, 2], [1.0, 0.1], "#e8590c")
    _draw_loss(panel, TimeAxis(), [training], [validation])
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["training, with label smoothing", "validation"]


@pytest.mark.parametrize(
    "updates, xs, label",
    [(0, [22, 44], "update"), (22, [1, 2], "epoch (22 updates each)")],
)
def test_the_horizontal_axis_is_in_epochs_where_their_length_is_known(updates, xs, label):
    panel = axes()
    _draw_accuracy(panel, TimeAxis(updates), [Curve("validation", [22, 44], [50.0, 60.0], BLUE)])
    curve, best = panel.get_lines()
    assert list(curve.get_xdata()) == xs and list(best.get_xdata()) == xs[1:]
    assert panel.get_xlabel() == label


@pytest.mark.parametrize("kept", ["train", "epoch", "eval"])
def test_a_run_with_one_kind_of_entry_is_drawn(tmp_path, kept):
    path = write_run(tmp_path)
    path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if f'"kind": "{kept}"' in line)
    )
    assert size_of(plot_curves(path, tmp_path / "curves.png")) == (1800, 540)


def test_gaps_and_a_diverged_run_are_drawn(tmp_path):
    with MetricLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 60):
            log.write(step, 0, "train", loss=math.nan if step > 30 else 1.0, lr=0.0)
        log.write(60, 0, "eval", loss=math.nan, acc1=math.nan)
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_nothing_to_draw_is_said_in_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": 0, "kind": "train", "skipped": 0}\n'
    )
    with pytest.raises(CurveError, match="no entry has a loss"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_smoothing_keeps_a_constant_and_skips_gaps():
    assert smooth([2.0] * 7, 3) == [2.0] * 7
    assert smooth([1.0, math.nan, 3.0], 1) == [1.0, 2.0, 3.0]
    assert smooth([0.0, 3.0, 0.0, 3.0], 1) == pytest.approx([1.5, 1.0, 2.0, 1.5])
