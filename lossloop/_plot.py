"""The picture of a history: a matplotlib figure, made without pyplot."""

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Inches: the width of the text on A4 paper.
WIDTH = 6.3
# Points, of all text but the title.
TEXT = 8
# The palette of Okabe and Ito (2008), which colour-blind readers can tell apart. As
# training is solid and validation dashed, and metrics have markers, grey will do too.
BLACK, RED, BLUE = "#222222", "#D55E00", "#0072B2"
METRICS = [*zip((BLUE, "#009E73", "#CC79A7", "#E69F00"), "os^D", strict=True)]
# Letters of a label.
LONGEST = 32
# The arithmetic of the axes overflows beyond, so that it counts as infinite.
LARGEST = 1e300


class Line(NamedTuple):
    """How a column is drawn."""

    column: str
    label: str
    colour: str
    dashes: str
    marker: str = ""


class Panel(NamedTuple):
    """Lines that share their axes."""

    ylabel: str
    height: float  # inches
    lines: list[Line]


class Picture(Figure):
    """A figure that a notebook shows, though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        """What IPython asks for."""
        png = BytesIO()
        self.savefig(png, format="png", dpi=100, bbox_inches="tight")
        return png.getvalue()


def plot_history(
    columns: Mapping[str, Sequence[Any]],
    *,
    best_epoch: int | None = None,
    diagnosis: Any = None,
    title: str | None = None,
) -> Figure:
    """Draws the columns of a history; see `History.plot`.

    Args:
        columns: By name, all of the same length; None where there is no value.
        best_epoch: The epoch of the lowest finite `val_loss`, which is marked.
        diagnosis: What to say of the curves; see `History.plot`.
        title: Above all.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no number to draw.
        TypeError: If `diagnosis` is something else.

    Example:
        >>> figure = plot_history({"epoch": [1, 2], "train_loss": [0.5, 0.25]})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss']
    """
    if diagnosis is not None and not hasattr(diagnosis, "findings"):
        raise TypeError(
            f"History.plot(diagnosis=...) must be a diagnosis, which has findings, got "
            f"{diagnosis!r}."
        )
    columns = {
        name: [value if isinstance(value, Real) else None for value in values]
        for name, values in columns.items()
        if any(isinstance(value, Real) for value in values)
    }
    panels = _panels(columns)
    if not panels:
        raise ValueError(
            f"History.plot: there is nothing to draw, no epoch has a loss or a metric. "
            f"The columns with numbers are {tuple(columns)}."
        )
    epochs = np.arange(1.0, len(columns[panels[0].lines[0].column]) + 1)
    if None not in columns.get("epoch", [None]):
        epochs = np.array(columns["epoch"], float)
    heights = [panel.height for panel in panels]
    figure = Picture(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    grid = figure.subplots(
        len(panels), sharex=True, squeeze=False, height_ratios=heights
    )
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        _draw(axes, panel, epochs, columns)
        if best_epoch is not None:
            axes.axvline(best_epoch, color="0.4", lw=0.8, ls=(0, (1, 2)), zorder=1)
    top, bottom = grid[0, 0], grid[-1, 0]
    bottom.set_xlabel("epoch", fontsize=TEXT)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(epochs) == 1:
        bottom.set_xlim(epochs[0] - 1, epochs[0] + 1)
    if best_epoch is not None:
        value = min(v for v in columns["val_loss"] if v is not None and np.isfinite(v))
        if abs(value) < LARGEST:
            top.plot(best_epoch, value, "o", ms=5, mfc="white", mec=RED, zorder=3)
        # At the top there is most room, and on this side of the line.
        left = best_epoch > (epochs[0] + epochs[-1]) / 2
        top.annotate(
            f"best epoch {best_epoch}: {value:.4g}",
            (best_epoch, 1),
            (-4 if left else 4, -3),
            xycoords=top.get_xaxis_transform(),
            textcoords="offset points",
            ha="right" if left else "left",
            va="top",
            fontsize=TEXT,
            bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1},
        )
    if diagnosis is not None:
        said = diagnosis.primary
        for finding in diagnosis.findings:
            if finding.name == diagnosis.primary:
                said = f"{diagnosis.primary}: {finding.advice}"
                break
        for finding in diagnosis.findings:
            start = finding.evidence.get("best_epoch")
            if finding.name == "overfit" and start is not None:
                top.axvspan(start, diagnosis.as_of_epoch, color="0.9", lw=0, zorder=0)
                said = f"{said} Shaded: after the best epoch, {start}."
        top.set_title(textwrap.fill(said, 95), loc="left", fontsize=TEXT)
    if title is not None:
        figure.suptitle(title, fontsize=TEXT + 2, fontweight="bold")
    return figure


def _panels(columns: Mapping[str, Any]) -> list[Panel]:
    """The panels that there are data for, from the top."""
    validation = "validation ± SE" if "val_se" in columns else "validation"
    losses = [
        Line("train_loss", "training", BLACK, "-"),
        Line("frozen_train_loss", "training, frozen", BLUE, ":"),
        Line("val_loss", validation, RED, "--"),
    ]
    known = {line.column for line in losses} | {"val_se"}
    found = [
        (name, *name.split("_", 1))
        for name in columns
        if name.startswith(("train_", "val_")) and name not in known
    ]
    metrics = list(dict.fromkeys(metric for _, _, metric in found))
    lines: list[Line] = []
    for name, prefix, metric in found:
        data, dashes = ("training", "-") if prefix == "train" else ("validation", "--")
        colour, marker = METRICS[metrics.index(metric) % len(METRICS)]
        if len(metrics) == 1:
            lines.append(Line(name, data, colour, dashes))
        else:
            lines.append(Line(name, f"{metric}, {data}", colour, dashes, marker))
    changes = len({*columns.get("lr", ())} - {None}) > 1
    panels = [
        Panel("loss", 2.6, [line for line in losses if line.column in columns]),
        Panel(
            metrics[0] if len(metrics) == 1 else "metrics",
            max(1.6, 0.18 * len(lines)),  # room for a legend of all of them
            lines,
        ),
        Panel("learning rate", 1.0, [Line("lr", "", BLACK, "-")] if changes else []),
    ]
    return [panel for panel in panels if panel.lines]


def _draw(axes: Any, panel: Panel, epochs: Any, columns: Mapping[str, Any]) -> None:
    """Draws a panel, with what is not finite marked at its top."""
    curves: list[Any] = []
    drawn: list[Any] = []
    ends: list[float] = []  # where a label beside the axes would stand, or NaN
    for column, label, colour, dashes, marker in panel.lines:
        there = np.array([value is not None for value in columns[column]])
        x, y = epochs[there], np.array(columns[column], float)[there]
        fine = np.abs(y) < LARGEST  # NaN is not
        (curve,) = axes.plot(
            x,
            np.where(fine, y, np.nan),
            color=colour,
            ls=dashes,
            lw=1.4,
            label=_short(label),
        )
        # A point between gaps has no line to be seen by.
        around = np.pad(fine, 1)
        dots = fine & ~around[:-2] & ~around[2:]
        if marker:
            dots[:: len(dots) // 8 + 1] = True
        if dots.any():
            curve.set(marker=marker or "o", ms=4, markevery=np.flatnonzero(dots))
        if not fine.all():  # a line of no points would stand in the figure's corner
            axes.plot(
                x[~fine],
                np.ones(len(x[~fine])),
                "x",
                color=colour,
                clip_on=False,
                transform=axes.get_xaxis_transform(),
            )
        if column == "val_loss" and "val_se" in columns:
            error = np.array(columns["val_se"], float)[there]
            error[~(fine & (np.abs(error) < LARGEST))] = np.nan
            axes.fill_between(x, y - error, y + error, color=colour, alpha=0.2, lw=0)
        curves.append(curve)
        drawn.append(y[fine])
        ends.append(y[-1] if fine[-1] and x[-1] == epochs[-1] != epochs[0] else np.nan)
    values = np.concatenate(drawn)
    if not len(values):
        axes.set_yticks([])
    elif panel.ylabel == "loss" and 0 < values.min() < values.max() / 100:
        margin = (values.max() / values.min()) ** 0.05
        axes.set_yscale("log")
        axes.set_ylim(values.min() / margin, values.max() * margin)
    axes.set_ylabel(_short(panel.ylabel), fontsize=TEXT)
    axes.tick_params(labelsize=TEXT)
    axes.yaxis.get_offset_text().set_fontsize(TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="0.92")
    axes.set_axisbelow(True)
    if panel.ylabel == "learning rate":
        return
    points = [(epochs[-1], end) for end in ends]
    levels: Any = (axes.transScale + axes.transLimits).transform(points)[:, 1]
    # Ticks, titles and the like take about a quarter of the height.
    gaps: Any = np.diff(np.sort(levels))
    apart = gaps * panel.height * 72 * 0.75
    if np.isfinite(levels).all() and (apart > 1.2 * TEXT).all():
        for curve, end in zip(curves, ends, strict=True):
            axes.annotate(
                curve.get_label(),
                (1, end),
                (4, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                va="center",
                color=curve.get_color(),
                fontsize=TEXT,
                annotation_clip=False,
            )
    else:
        axes.legend(
            handles=[curves[i] for i in np.argsort(-np.array(ends))],
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            frameon=False,
            fontsize=TEXT,
            handlelength=2.6,
        )


def _short(name: str) -> str:
    """A name that leaves room for the curves."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
