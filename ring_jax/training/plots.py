"""The loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_INK, _MUTED, _GRID, _LINE = "#1f2430", "#6b7280", "#e5e7eb", "#2563eb"
_SMOOTHING_STEPS = 10


def plot_loss(path: Path, steps: Sequence[int], losses: Sequence[float], title: str) -> None:
    """Draws the loss of each step, in nats per byte, and its running mean to a PNG file."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=_LINE, alpha=0.3, linewidth=1.2, label="each step")
    mean = _running_mean(np.asarray(losses))
    axes.plot(
        steps, mean, color=_LINE, linewidth=2.2, solid_capstyle="round", label=f"mean of {_SMOOTHING_STEPS} steps"
    )
    axes.plot(steps[-1:], mean[-1:], marker="o", markersize=5, color=_LINE)
    axes.annotate(
        f"{mean[-1]:.2f}", (steps[-1], mean[-1]), xytext=(8, 0), textcoords="offset points", va="center", color=_INK
    )
    axes.set_title(title, loc="left", color=_INK, fontsize=11, pad=12)
    axes.set_xlabel("step", color=_MUTED)
    axes.set_ylabel("loss (nats per byte)", color=_MUTED)
    axes.margins(x=0.04)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.tick_params(colors=_MUTED, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.legend(frameon=False, labelcolor=_MUTED)
    figure.savefig(path, format="png")


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the last steps at each step; of fewer where fewer were made."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - _SMOOTHING_STEPS, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
