"""Draws the README's pictures, light and dark: `python docs/draw.py [folder]` (this folder if none is given).

The layouts come from `ring_jax.layout_positions` and the work from counting the pairs a causal mask leaves, so the
pictures show what the code does.
"""

import dataclasses
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from ring_jax.layouts import LAYOUTS, layout_positions

NUM_SHARDS = 4
SEQ_LEN = 16
SHARD_LEN = SEQ_LEN // NUM_SHARDS


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of one variant: `shards` for the four shards, from `empty` to `work` for no and full work."""

    name: str
    background: str
    text: str
    faint: str
    empty: str
    work: str
    on_shard: str
    shards: tuple[str, str, str, str]


LIGHT = Theme(
    name="light",
    background="#ffffff",
    text="#1f2328",
    faint="#656d76",
    empty="#eaeef2",
    work="#e3b341",
    on_shard="#ffffff",
    shards=("#2f6fb7", "#c2571a", "#2e8555", "#8a55a8"),
)
DARK = Theme(
    name="dark",
    background="#0d1117",
    text="#e6edf3",
    faint="#9198a1",
    empty="#21262d",
    work="#9e6a03",
    on_shard="#0d1117",
    shards=("#79b0f0", "#f0a060", "#6fc793", "#c79be0"),
)


def draw_ring(theme: Theme) -> Figure:
    """Four devices in a ring, and beside them which block of keys and values each one has at every step."""
    figure = Figure(figsize=(11, 4.6), facecolor=theme.background)
    _draw_devices(figure.add_axes((0.01, 0.02, 0.45, 0.96)), theme)
    _draw_timetable(figure.add_axes((0.5, 0.02, 0.49, 0.96)), theme)
    return figure


def draw_layouts(theme: Theme) -> Figure:
    """For every layout: the tokens of each shard, the causal mask in layout order, the work per shard and step."""
    figure = Figure(figsize=(11, 8), facecolor=theme.background)
    for column, layout in enumerate(LAYOUTS):
        left = 0.045 + column * 0.325
        positions = np.asarray(layout_positions(layout, SEQ_LEN, NUM_SHARDS)).reshape(NUM_SHARDS, SHARD_LEN)
        _draw_tokens(figure.add_axes((left, 0.69, 0.285, 0.27)), theme, layout, positions)
        _draw_mask(figure.add_axes((left + 0.03, 0.315, 0.225, 0.325)), theme, positions)
        _draw_work(figure.add_axes((left, 0.02, 0.285, 0.255)), theme, positions)
    return figure


def causal_work(positions: np.ndarray) -> np.ndarray:
    """Visible query-key pairs of each shard (rows) at each step (columns); `positions` are [shards, tokens each]."""
    ranks = range(len(positions))
    blocks = [[positions[rank][:, None] >= positions[rank - step] for step in ranks] for rank in ranks]
    return np.sum(blocks, axis=(2, 3))


def _draw_devices(axes: Axes, theme: Theme) -> None:
    _prepare(axes, (-2.75, 2.75), (-2.4, 2.4), aspect="equal")
    angles = np.arange(NUM_SHARDS) * math.tau / NUM_SHARDS
    centres = 1.6 * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    for rank, (x, y) in enumerate(centres):
        colour = theme.shards[rank]
        _box(axes, (x - 0.75, y - 0.53), (1.5, 1.06), face=theme.background, edge=colour)
        _text(axes, x, y + 0.33, f"device {rank}", theme.text, weight="bold")
        _box(axes, (x - 0.6, y - 0.38), (0.46, 0.42), face=theme.background, edge=colour)
        _text(axes, x - 0.37, y - 0.17, f"Q{rank}", theme.text, size=9.5, weight="bold")
        _box(axes, (x - 0.09, y - 0.38), (0.72, 0.42), face=colour, edge=colour)
        _text(axes, x + 0.27, y - 0.17, f"K{rank} V{rank}", theme.on_shard, size=9.5, weight="bold")
        arrow = FancyArrowPatch(
            (x, y),
            tuple(centres[(rank + 1) % NUM_SHARDS]),
            connectionstyle="arc3,rad=-0.36",
            arrowstyle="-|>",
            mutation_scale=17,
            color=colour,
            lw=2.4,
            shrinkA=52,
            shrinkB=52,
        )
        axes.add_patch(arrow)
    _text(axes, 0, 0.15, "keys and values\ngo round", theme.text)
    _text(axes, 0, -0.3, "queries stay", theme.faint)


def _draw_timetable(axes: Axes, theme: Theme) -> None:
    _prepare(axes, (-1.35, NUM_SHARDS + 0.05), (NUM_SHARDS + 1, -1))
    _text(axes, -1.3, -0.72, "what each device computes", theme.text, size=11, weight="bold", ha="left")
    for step in range(NUM_SHARDS):
        _text(axes, step + 0.44, -0.22, f"step {step}", theme.text)
    for rank in range(NUM_SHARDS):
        _text(axes, -0.12, rank + 0.4, f"device {rank}", theme.text, ha="right")
        for step in range(NUM_SHARDS):
            owner = (rank - step) % NUM_SHARDS
            _box(axes, (step, rank), (0.88, 0.8), face=theme.shards[owner], edge=theme.shards[owner])
            label = f"Q{rank}\nwith K{owner} V{owner}"
            _text(axes, step + 0.44, rank + 0.4, label, theme.on_shard, size=8.5, weight="bold")
    for hop in range(NUM_SHARDS - 1):
        line = {"arrowstyle": "-|>", "color": theme.faint}
        axes.annotate("", (hop + 1.14, NUM_SHARDS + 0.1), (hop + 0.74, NUM_SHARDS + 0.1), arrowprops=line)
        _text(axes, hop + 0.94, NUM_SHARDS + 0.32, "hop", theme.faint, size=9)
    note = (
        "Every step folds one block into the running output and logsumexp (float32).\n"
        "The next block travels while this one is computed."
    )
    _text(axes, -1.3, NUM_SHARDS + 0.78, note, theme.faint, size=9, ha="left")


def _draw_tokens(axes: Axes, theme: Theme, layout: str, positions: np.ndarray) -> None:
    _prepare(axes, (-2.3, SEQ_LEN + 0.1), (NUM_SHARDS + 1.2, -1.1))
    _text(axes, SEQ_LEN / 2 - 1, -0.75, layout, theme.text, size=13, weight="bold")
    _text(axes, -0.35, 0.5, "sequence", theme.faint, size=8, ha="right")
    for rank, tokens in enumerate(positions):
        top = rank + 1.15
        _text(axes, -0.35, top + 0.45, f"shard {rank}", theme.text, size=8, ha="right")
        _fill(axes, (0, top + 0.42), (SEQ_LEN, 0.06), theme.empty)
        for token in tokens:
            _fill(axes, (token + 0.05, 0.05), (0.9, 0.9), theme.shards[rank])
            _fill(axes, (token + 0.05, top), (0.9, 0.9), theme.shards[rank])
            _text(axes, token + 0.5, top + 0.47, str(token), theme.on_shard, size=6.5, weight="bold")


def _draw_mask(axes: Axes, theme: Theme, positions: np.ndarray) -> None:
    _prepare(axes, (-0.1, SEQ_LEN + 0.1), (SEQ_LEN + 0.1, -0.1), aspect="equal")
    _text(axes, SEQ_LEN / 2, -1.15, "causal mask in layout order: keys \N{RIGHTWARDS ARROW}", theme.faint, size=8)
    _text(axes, -1, SEQ_LEN / 2, "queries \N{RIGHTWARDS ARROW}", theme.faint, size=8, rotation=270)
    order = positions.reshape(-1)
    for row, query_position in enumerate(order):
        for column, key_position in enumerate(order):
            colour = theme.shards[row // SHARD_LEN] if query_position >= key_position else theme.empty
            _fill(axes, (column + 0.06, row + 0.06), (0.88, 0.88), colour)
    for edge in range(0, SEQ_LEN + 1, SHARD_LEN):
        axes.plot([edge, edge], [0, SEQ_LEN], color=theme.faint, lw=0.9)
        axes.plot([0, SEQ_LEN], [edge, edge], color=theme.faint, lw=0.9)


def _draw_work(axes: Axes, theme: Theme, positions: np.ndarray) -> None:
    _prepare(axes, (-1.25, NUM_SHARDS + 0.75), (NUM_SHARDS + 1.25, -1.05))
    work = causal_work(positions)
    slowest = work.max(axis=0)
    colours = LinearSegmentedColormap.from_list("work", [theme.empty, theme.work])
    right, bottom = NUM_SHARDS + 0.4, NUM_SHARDS + 0.38
    _text(axes, NUM_SHARDS / 2, -0.85, "work: visible query-key pairs", theme.faint, size=8)
    _text(axes, right, -0.3, "sum", theme.faint, size=8)
    for rank in range(NUM_SHARDS):
        _text(axes, -0.15, rank + 0.5, f"shard {rank}", theme.text, size=8, ha="right")
        _text(axes, right, rank + 0.5, str(work[rank].sum()), theme.faint, size=8)
        for step, pairs in enumerate(work[rank]):
            _fill(axes, (step + 0.03, rank + 0.05), (0.94, 0.9), colours(pairs / SHARD_LEN**2))
            _text(axes, step + 0.5, rank + 0.5, str(pairs), theme.text, size=8)
    _text(axes, -0.15, bottom, "slowest", theme.text, size=8, ha="right")
    for step, pairs in enumerate(slowest):
        _text(axes, step + 0.5, -0.3, f"step {step}", theme.text, size=8)
        _text(axes, step + 0.5, bottom, str(pairs), theme.text, size=8)
    _text(axes, right, bottom, str(slowest.sum()), theme.text, size=8, weight="bold")
    even = work.sum() / NUM_SHARDS
    _text(axes, right + 0.22, bottom + 0.57, f"an even split would take {even:g}", theme.faint, size=8, ha="right")


def _prepare(axes: Axes, xlim: tuple[float, float], ylim: tuple[float, float], aspect: str = "auto") -> None:
    axes.set(xlim=xlim, ylim=ylim, aspect=aspect)
    axes.axis("off")


def _text(axes: Axes, x: float, y: float, text: str, colour: str, *, size: float = 10, ha: str = "center", **style):
    axes.text(x, y, text, color=colour, fontsize=size, ha=ha, va="center", **style)


def _fill(axes: Axes, corner: tuple[float, float], size: tuple[float, float], colour) -> None:
    axes.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor="none"))


def _box(axes: Axes, corner: tuple[float, float], size: tuple[float, float], *, face: str, edge: str) -> None:
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.5))


def main(folder: Path) -> None:
    # Text as outlines looks the same on every machine; the fixed salt keeps the files the same from run to run.
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "ring_jax"})
    for theme in (LIGHT, DARK):
        for name, draw in (("ring", draw_ring), ("layouts", draw_layouts)):
            path = folder / f"{name}-{theme.name}.svg"
            draw(theme).savefig(path, metadata={"Date": None})
            print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
