"""The article's table of memory and time, row by row, beside what ring_jax is planned to need.

    python -m benchmarks.article_table --out benchmarks/results

Memory is that of the program compiled for A100-80GB GPUs: exact, but planned, not measured. Every time is predicted;
its inputs are printed below the table. The article states neither model nor pass: its times fit one causal attention of
32 heads of 128, forward and backward, so that operation stands beside a full training step of an 8B model. Rows of 64
and 128 GPUs go beyond the article, on 8-GPU hosts linked by 400 Gb/s InfiniBand.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from ring_jax import STRATEGIES
from ring_jax.planning import Cluster, Plan, Workload, find_model, leave_gpus_alone, make_plan, to_json

GPU = "a100-80gb"
HEADS, HEAD_DIM = 32, 128
K = 1024
HOST_MEMORY = int(2e12)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: tokens, GPUs, and the article's GB and milliseconds where it has them."""

    seq_len: int
    num_gpus: int
    article_gb: float | None = None
    article_ms: float | None = None

    @property
    def label(self) -> str:
        tokens = f"{self.seq_len // K}K" if self.seq_len < K * K else f"{self.seq_len // K**2}M"
        return f"{tokens}/{self.num_gpus}"


ROWS = (
    Row(128 * K, 4, 42.3, 1240),
    Row(128 * K, 8, 22.1, 680),
    Row(256 * K, 8, 44.8, 2510),
    Row(256 * K, 16, 23.5, 1320),
    Row(512 * K, 16, 47.2, 5100),
    Row(1024 * K, 32, 49.1, 11800),
    Row(1024 * K, 64),
    Row(1024 * K, 128),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile the article's rows; each takes half a minute to a minute and a half on two cores."""

    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where to write article_table.json and article_table.png. None: print only."""
    rows: int = len(ROWS)
    """Only the first rows."""
    training: bool = True
    """Whether to compile the 8B training step too, which takes longest."""


def ideal_seconds(plan: Plan) -> float:
    """The step if all communication were free and all GPUs equally busy."""
    hidden = ("exposed hops", "exposed exchange of weights", "exposed transfer to the host")
    return sum(seconds for part, seconds in plan.timing.parts.items() if part not in hidden)


def overhead(plan: Plan) -> float:
    """Time above ideal scaling, as a fraction (the article: 10 to 15 %)."""
    return plan.timing.seconds / ideal_seconds(plan) - 1


def latency_seconds(plan: Plan) -> float:
    """What the hops of all rings would take if they carried nothing: grows with the number of GPUs."""
    latency = plan.cluster.link_along("seq").latency
    return latency * sum(hop.count for hop in plan.timing.hops)


def plan_row(row: Row, model: str, console: Console) -> Plan:
    """The plan of one row for `model`, "attention" or a preset."""
    cluster = Cluster.of(GPU, f"seq={row.num_gpus}")
    found = find_model(model, heads=f"{HEADS}/{HEADS}", head_dim=HEAD_DIM, remat="layer", offload=False)
    workload = Workload(name=model, model=found, seq_len=row.seq_len)
    with console.status(f"compiling {model} {row.label} ..."):
        return make_plan(workload, cluster, host_memory=HOST_MEMORY, progress=lambda text: None)


def methods(seq_len: int, num_gpus: int, *, window: int = 4096) -> list[dict[str, Any]]:
    """The article's four methods for one attention layer of its shape, counted instead of asserted.

    Bytes are what one GPU sends forward, `held` what it must hold of queries, keys, values and output in bfloat16 at
    once, and `rounds` the transfers that wait for each other. Those that do not exist in ring_jax are counted from
    their papers: Ulysses (arXiv:2309.14509), Megatron sequence parallelism (arXiv:2205.05198, the all-gather and
    reduce-scatter around a layer's attention), and a causal window on one GPU (arXiv:2004.05150).
    """
    size = 2 * seq_len * HEADS * HEAD_DIM
    shard = size / num_gpus
    away = (num_gpus - 1) / num_gpus
    ring, ulysses, megatron = 2 * shard * (num_gpus - 1), 4 * shard * away, 2 * size * away
    counted = (
        ("ring", ring, num_gpus - 1, (2 + 2 * 2) * shard, "ring" in STRATEGIES),
        ("Ulysses", ulysses, 2, (4 + 4) * shard, "ulysses" in STRATEGIES),
        ("Megatron sequence parallel", megatron, 2, 4 * shard + size, False),
        (f"window of {window}", 0.0, 0, 4 * size, False),
    )
    return [dict(zip(("method", "sent", "rounds", "held", "exists"), row, strict=True)) for row in counted]


def main(args: Sequence[str] | None = None) -> None:
    """Prints the tables and writes the files."""
    config = tyro.cli(Config, args=args)
    leave_gpus_alone()
    console = Console(highlight=False)
    models = ("attention", "llama3-8b") if config.training else ("attention",)
    plans = {model: [plan_row(row, model, console) for row in ROWS[: config.rows]] for model in models}
    for model, found in plans.items():
        console.print(_table(model, ROWS[: config.rows], found), soft_wrap=True)
        for line in _source_lines(found):
            console.print(f"  {line}", soft_wrap=True, markup=False)
    console.print(_methods_table(1024 * K, 32))
    if config.out is not None:
        _write(config.out, ROWS[: config.rows], plans)
        console.print(f"wrote {config.out / 'article_table.json'} and {config.out / 'article_table.png'}")


def _source_lines(plans: Sequence[Plan]) -> list[str]:
    """What the predictions of all rows rest on, each once."""
    lines = [f"{what}: {source}" for plan in plans for what, source in plan.timing.sources.items()]
    return sorted(set(lines), key=lines.index)


def _describe(model: str) -> str:
    operation = f"attention of {HEADS} heads x {HEAD_DIM}, forward and backward"
    return operation if model == "attention" else f"{model} training step"


def _table(model: str, rows: Sequence[Row], plans: Sequence[Plan]) -> Table:
    table = Table(title=f"{_describe(model)}, {GPU}: memory planned, times predicted", title_justify="left")
    columns = ("row", "article GB", "planned GB", "article ms", "predicted ms", "over ideal", "latency ms")
    for column in columns:
        table.add_column(column, justify="right" if column != "row" else "left", overflow="fold")
    for row, plan in zip(rows, plans, strict=True):
        table.add_row(
            row.label,
            "-" if row.article_gb is None else f"{row.article_gb}",
            f"{plan.peak_memory_bytes / 1e9:.2f}" + ("" if plan.fits else " (too much)"),
            "-" if row.article_ms is None else f"{row.article_ms:,.0f}",
            f"{1e3 * plan.timing.seconds:,.0f}",
            f"{overhead(plan):.1%}",
            f"{1e3 * latency_seconds(plan):.1f}",
        )
    return table


def _methods_table(seq_len: int, num_gpus: int) -> Table:
    table = Table(title=f"four methods, one layer forward, {seq_len:,} tokens on {num_gpus} GPUs (counted)")
    for column in ("method", "sent by a GPU, GB", "rounds", "held by a GPU, GB", "in ring_jax"):
        table.add_column(column, justify="right" if column != "method" else "left", overflow="fold")
    for row in methods(seq_len, num_gpus):
        sizes = (f"{row['sent'] / 1e9:.2f}", f"{row['rounds']}", f"{row['held'] / 1e9:.2f}")
        table.add_row(row["method"], *sizes, "yes" if row["exists"] else "not yet")
    return table


def _write(folder: Path, rows: Sequence[Row], plans: dict[str, list[Plan]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found = [
        {"row": dataclasses.asdict(row), "plan": to_json(plan), "over_ideal": overhead(plan)}
        for model in plans
        for row, plan in zip(rows, plans[model], strict=True)
    ]
    content = {"rows": found, "methods": methods(1024 * K, 32)}
    (folder / "article_table.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _draw(folder / "article_table.png", rows, plans)


def _draw(path: Path, rows: Sequence[Row], plans: dict[str, list[Plan]]) -> None:
    """Memory above, time below, a column for each model."""
    figure, axes = plt.subplots(2, len(plans), figsize=(6 * len(plans), 8), layout="constrained", squeeze=False)
    for (memory, time), (model, planned) in zip(axes.T, plans.items(), strict=True):
        gigabytes = [plan.peak_memory_bytes / 1e9 for plan in planned]
        _bars(memory, rows, "ring_jax, planned", gigabytes, [row.article_gb for row in rows])
        memory.set(title=_describe(model), ylabel="GB per GPU", ylim=(0, 60))
        # The article's times are those of the bare operation: a training step of 8B weights is another thing.
        article = [row.article_ms for row in rows] if model == "attention" else []
        milliseconds = [1e3 * plan.timing.seconds for plan in planned]
        _bars(time, rows, "ring_jax, predicted", milliseconds, article)
        time.set(ylabel="milliseconds per step", yscale="log", ylim=(100, 1e6))
        time.set_xlabel("tokens / GPUs")
    figure.suptitle(f"{GPU}: memory planned by compile, times predicted; the article has no rows of 64 and 128 GPUs")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(ax: Axes, rows: Sequence[Row], label: str, ours: Sequence[float], article: Sequence[float | None]) -> None:
    """Ours beside the article's, where it has a figure; every bar with its value."""
    width = 0.4 if article else 0.6
    shown = [(place, value) for place, value in enumerate(article) if value is not None]
    groups = [(label, "tab:blue", -width / 2 if article else 0.0, list(enumerate(ours)))]
    if article:
        groups.append(("article", "silver", width / 2, shown))
    for name, color, shift, values in groups:
        bars = ax.bar([place + shift for place, _ in values], [v for _, v in values], width, label=name, color=color)
        ax.bar_label(bars, [f"{v:,.0f}" if v >= 100 else f"{v:.1f}" for _, v in values], fontsize=7)
    ax.set_xticks(range(len(rows)), [row.label for row in rows], fontsize=9)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="upper left", ncols=2)


if __name__ == "__main__":
    main()
