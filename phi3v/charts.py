"""
The figures of a report, drawn by matplotlib: as SVG whose ink is the colour of the text around it,
so that light and dark pages can show it, and as one PNG for a model card.
"""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .results import Answer, Run

# One for each run. They can be told from white and from black.
COLOURS = ("#3b82f6", "#d97706", "#059669", "#a855f7", "#ef4444", "#0891b2")
INK = "#012345"  # stands for the colour of the text until the SVG is written
WIDTH, HEIGHT = 5.4, 3.2  # inches; at 72 units each, a phone shows it nearly in full size
MOST_POINTS = 300  # of a curve; more are averaged, which keeps the file small
NAMED, NUMBERED = 30, 12  # up to so many classes have their names, and numbers in their cells
OTHER = "(other)"
CURVES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "samples_per_second": "Samples per second",
    "mfu": "MFU: share of the GPUs' peak",
    "tflops_per_second": "TFLOP/s per process",
    "data_wait": "Share of the time waiting for data",
    "peak_memory_gb_per_process": "Peak memory per process, GB",
}


class Chart(NamedTuple):
    title: str
    draw: Callable[[Axes], None]
    height: float = HEIGHT


def charts(runs: list[Run]) -> Iterator[Chart]:
    """The figures that there is something for."""
    metrics = [name for run in runs for each in run.evaluations for name in each.metrics]
    for metric in dict.fromkeys(metric for metric, _ in metrics):
        yield Chart(f"{metric} by step", partial(_metric, runs=runs, name=metric))
    for field, title in CURVES.items():
        if any(field in entry for run in runs for entry in run.log):
            yield Chart(title, partial(_curve, runs=runs, field=field))
    for number, run in enumerate(runs):
        if classes := classes_of(run):
            of = f" of {run.name}" if len(runs) > 1 else ""
            title = f"Confusion matrix{of}, {run.last.label}"
            draw = partial(_confusion, run=run, classes=classes, tint=colour(number))
            yield Chart(title, draw, 1.3 * HEIGHT)
    if any(positives(run) for run in runs):
        yield Chart("ROC curve", partial(_roc, runs=runs), 1.3 * HEIGHT)
    scored = [None if classes_of(run) else _histogram_of_scores(run) for run in runs]
    if any(scored):
        yield Chart("ANLS of a sample", partial(_bars, parts=scored, label="ANLS, 0 to 1"))
    lengths = [_histogram_of_lengths(run) for run in runs]
    if any(lengths):
        yield Chart("Length of a training sample", partial(_bars, parts=lengths, label="tokens"))


def colour(number: int) -> str:
    """Of a run."""
    return COLOURS[number % len(COLOURS)]


def svg(chart: Chart) -> str:
    """A chart as an element of an HTML page."""
    with _style(INK):
        figure = Figure(figsize=(WIDTH, chart.height), layout="constrained")
        chart.draw(figure.subplots())
        file, none = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=none)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # What only a file of its own needs; `id`s of groups, which other figures have too.
    text = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"(?=[^<]*viewBox)', "", text)
    text = re.sub(r' (xmlns|version)="[^"]*"| id="[\w.]+_\d+"', "", text)
    return re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)


def png(drawn: list[Chart]) -> bytes:
    """All charts in one picture, on white."""
    rows = math.ceil(len(drawn) / 2)
    with _style("black"):
        figure = Figure(figsize=(2 * WIDTH, 1.1 * HEIGHT * rows), layout="constrained", dpi=80)
        axes = figure.subplots(rows, 2, squeeze=False).flat
        for axis, chart in zip(axes, drawn, strict=False):
            chart.draw(axis)
            axis.set_title(chart.title)
        for axis in axes[len(drawn) :]:
            axis.set_axis_off()
        file, small = io.BytesIO(), io.BytesIO()
        figure.savefig(file, format="png")
    Image.open(file).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return small.getvalue()


@contextlib.contextmanager
def _style(ink: str) -> Iterator[None]:
    """matplotlib's settings while something is drawn. Characters that it has no font for pass."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings = {
        **dict.fromkeys(inked, ink),
        **{"grid.color": ink, "grid.alpha": 0.15, "axes.grid": True, "font.size": 11},
        **{"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
        **{"svg.fonttype": "none", "svg.hashsalt": "phi3v", "text.parse_math": False},
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings(action="ignore"):
        yield


def _metric(axes: Axes, runs: list[Run], name: str) -> None:
    """
    A metric of every evaluation; of one run, the first and the last in figures, and a line for each
    dataset of a mixture.
    """
    lines = [(run, (name, "")) for run in runs]
    if len(runs) == 1:
        known = dict.fromkeys(key for each in runs[0].evaluations for key in each.metrics)
        lines += [(runs[0], key) for key in known if key[0] == name and key[1]]
    for number, (run, key) in enumerate(lines):
        points = [(e.step, e.metrics[key]) for e in run.evaluations if key in e.metrics]
        if points:
            style = {"linestyle": "--" if key[1] else "-", "label": _short(key[1] or "all")}
            axes.plot(*zip(*points, strict=True), "o", color=colour(number), **style)
        # Those of several lines would cover each other; the page has a table of them.
        for step, value in {points[0], points[-1]} if points and len(lines) == 1 else ():
            place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{value:.3f}", (step, value), **place)
    axes.margins(0.12, 0.2)
    if all(0 <= value <= 1 for line in axes.lines for value in line.get_ydata()):
        axes.set_ylim(-0.05, 1.15)
    _steps(axes)
    _legend(axes, runs)


def _curve(axes: Axes, runs: list[Run], field: str) -> None:
    """What was logged in training; of one run, the loss of each dataset of a mixture too."""
    lines = [(run, field) for run in runs]
    if len(runs) == 1 and field == "loss":
        lines += [(runs[0], name) for name in runs[0].dataset_losses]
    for number, (run, name) in enumerate(lines):
        steps, values = (_thinned(each) for each in run.curve(name))
        marker = "o" if len(steps) <= 3 else None
        label = _short("all" if name == field else name.removeprefix("loss_"))
        axes.plot(steps, values, marker=marker, linewidth=1.5, color=colour(number), label=label)
    axes.margins(x=0.02)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    _steps(axes)
    _legend(axes, runs)


def _legend(axes: Axes, runs: list[Run]) -> None:
    """Of the datasets of one run. The page itself says which colour is which of several."""
    if len(runs) == 1 and len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=10, borderpad=0)


def _thinned(values: list[float]) -> list[float]:
    """At most MOST_POINTS averages of neighbours."""
    size = math.ceil(len(values) / MOST_POINTS) or 1
    return [float(np.mean(values[i : i + size])) for i in range(0, len(values), size)]


def _steps(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


# ---- Answers


def classes_of(run: Run) -> list[str]:
    """The classes that answers name; none where answers are free texts."""
    rows = run.last.answers.values()
    classes = sorted({row.answers[0] for row in rows})
    few = len(classes) <= max(2, len(rows) / 2)
    return classes if few and all(len(row.answers) == 1 for row in rows) else []


def _confusion(axes: Axes, run: Run, classes: list[str], tint: str) -> None:
    """True classes are rows; a predicted one that is none of them goes to the last column."""
    counts = np.zeros((len(classes), len(classes) + 1), int)
    for row in run.last.answers.values():
        known = row.text in classes
        column = classes.index(row.text) if known else len(classes)
        counts[classes.index(row.answers[0]), column] += 1
    columns = [*classes, OTHER] if counts[:, -1].any() else classes
    counts = counts[:, : len(columns)]
    cells = np.zeros((*counts.shape, 4))
    cells[..., :3] = matplotlib.colors.to_rgb(tint)
    # By transparency, so that a light or dark page is what 0 looks like.
    cells[..., 3] = 0.7 * counts / counts.sum(1, keepdims=True)
    axes.imshow(cells, interpolation="none", aspect="auto")
    axes.grid(False)
    axes.set(xlabel="predicted", ylabel="true", xticks=[], yticks=[])
    if len(columns) <= NUMBERED:
        for (y, x), count in np.ndenumerate(counts):
            axes.text(x, y, count or "", ha="center", va="center")
    if len(columns) <= NAMED:
        size = 11 if len(columns) <= NUMBERED else 7
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        turned = {} if max(map(len, columns)) * len(columns) < 40 else turned
        axes.set_xticks(range(len(columns)), map(_short, columns), fontsize=size, **turned)
        axes.set_yticks(range(len(classes)), map(_short, classes), fontsize=size)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def positives(run: Run) -> list[tuple[bool, float]]:
    """Of every sample whether the first choice is right, and its probability."""
    rows: list[Answer] = [row for row in run.last.answers.values() if row.probability is not None]
    found = [(run.choices[0] in row.answers, row.probability) for row in rows if run.choices]
    return found if len({truth for truth, _ in found}) == 2 else []


def _roc(axes: Axes, runs: list[Run]) -> None:
    from sklearn.metrics import roc_curve  # a second, which only this one needs

    axes.plot([0, 1], [0, 1], "--", color=matplotlib.rcParams["text.color"], alpha=0.4)
    for number, run in enumerate(runs):
        if found := positives(run):
            false, true, _ = roc_curve(*zip(*found, strict=True))
            axes.plot(false, true, color=colour(number), clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set(xlabel="false positives, share", ylabel="true positives, share")


Histogram = tuple[np.ndarray, list[int], float]  # where bars begin, their counts, their width


def _histogram_of_scores(run: Run) -> Histogram:
    counts, edges = np.histogram([a.score for a in run.last.answers.values()], 20, (0, 1))
    return edges[:-1], counts.tolist(), 0.05


def _histogram_of_lengths(run: Run) -> Histogram | None:
    if lengths := run.summary("train_lengths"):
        # A bar of width 1 stands above its number.
        return np.subtract(lengths["from"], 0.5), lengths["samples"], lengths["width"]
    return None


def _bars(axes: Axes, parts: list[Histogram | None], label: str) -> None:
    for number, part in enumerate(parts):
        if part:
            starts, counts, width = part
            shares, style = np.divide(counts, sum(counts)), {"alpha": 0.9 if number == 0 else 0.6}
            axes.bar(starts, shares, width, align="edge", color=colour(number), **style)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=width >= 1, min_n_ticks=1))
    axes.set(xlabel=label, ylabel="share of samples")
    axes.grid(False, axis="x")
