"""Every mesh and layout of a model on the devices at hand: speed, and memory measured beside planned.

    python -m benchmarks.mesh --model tiny --seq-len 4K --out benchmarks/results

Runs the trainer's own step on random tokens. Without a GPU it runs on 8 virtual CPU devices: that shows that every mesh
works and how memory divides, and says nothing about speed on a cluster, which the output says too.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import matplotlib.pyplot as plt
import tyro
from rich.console import Console
from rich.table import Table

from ring_jax import LAYOUTS, STRATEGIES
from ring_jax.mesh import format_mesh, make_mesh
from ring_jax.modules import AttentionOptions
from ring_jax.planning.hardware import DATASHEETS
from ring_jax.planning.memory import peak_bytes
from ring_jax.planning.planner import meshes
from ring_jax.planning.timing import model_flops
from ring_jax.planning.workload import Workload
from ring_jax.presets import find_preset
from ring_jax.training.config import parse_seq_len
from ring_jax.training.optimizer import OptimizerConfig
from ring_jax.training.step import StepConfig, TrainStep

from .memory import gpu_of
from .processes import CPU_DEVICES, alone
from .steps import median_step_seconds, random_batch
from .timing import environment


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the training step on every data x seq x tensor mesh of the devices at hand."""

    model: str = "tiny"
    seq_len: str = "4K"
    batch: int = 2
    layers: int = 0
    """Run only so many of the model's layers, to measure on one GPU what many share. 0: all."""
    remat: str = "attention"
    layouts: tuple[str, ...] = LAYOUTS
    strategies: tuple[str, ...] = STRATEGIES
    steps: int = 5
    """Timed steps, after one that is not."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where to write mesh-MODEL.json and .png. None: print only."""

    def __post_init__(self):
        if self.layers < 0:
            raise ValueError(f"layers must be at least 0 (all of the model's), got {self.layers}")

    @property
    def title(self) -> str:
        return self.model + (f" with {self.layers} of its layers" if self.layers else "")

    @property
    def settings(self) -> dict[str, Any]:
        """What the times depend on."""
        return {name: getattr(self, name) for name in ("model", "layers", "seq_len", "batch", "remat")}


def configurations(config: Config, num_devices: int) -> Iterator[tuple[dict[str, int], AttentionOptions]]:
    """Every mesh with every layout and strategy; a ring of one has only one layout."""
    kv_heads = find_preset(config.model).num_kv_heads
    assert kv_heads is not None
    for shape in meshes(num_devices, config.batch, kv_heads):
        for layout in config.layouts if shape["seq"] > 1 else config.layouts[:1]:
            for strategy in config.strategies:
                yield shape, AttentionOptions(layout=layout, strategy=strategy)


def measure(config: Config, shape: dict[str, int], attention: AttentionOptions) -> dict[str, Any]:
    """One row: median seconds of a step, tokens/s, planned and (on GPUs) measured bytes of the fullest device."""
    on_gpu = jax.devices()[0].platform == "gpu"
    seq_len = parse_seq_len(config.seq_len)
    dtype = "bfloat16" if on_gpu else "float32"
    model = dataclasses.replace(find_preset(config.model), dtype=dtype, remat=config.remat, attention=attention)
    model = dataclasses.replace(model, num_layers=config.layers or model.num_layers)
    step = TrainStep(StepConfig(model, OptimizerConfig(), make_mesh(shape), seq_len, config.batch, config.steps + 1))
    run = step.lower().compile()
    batch = step.place(random_batch(config.batch, seq_len, model.vocab_size))
    name = f"{config.title} on {format_mesh(shape)}"
    median = median_step_seconds(run, step.init(0), batch, steps=config.steps, name=name)
    row = {
        "mesh": format_mesh(shape),
        "layout": attention.layout,
        "strategy": attention.strategy,
        "step_seconds": median,
        "tokens_per_second": config.batch * seq_len / median,
        "planned_bytes": peak_bytes(run.memory_analysis()),
        "measured_bytes": max(d.memory_stats()["peak_bytes_in_use"] for d in jax.devices()) if on_gpu else None,
        "mfu": None,
    }
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        workload = Workload(name=config.model, model=model, seq_len=seq_len, batch=config.batch)
        row["mfu"] = model_flops(workload) / median / math.prod(shape.values()) / peak
    return row


def peak_flops(device_kind: str) -> float | None:
    """The datasheet's dense bfloat16 FLOP/s of a GPU that calls itself `device_kind`, None if that is not known."""
    try:
        return DATASHEETS[gpu_of(device_kind)].bf16_flops
    except ValueError:
        return None


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table and writes the files."""
    config = tyro.cli(Config, args=args)
    console = Console(highlight=False)
    about, num_devices = alone(_look_round)
    if "note" in about:
        console.print(about["note"])
    rows = []
    for shape, attention in configurations(config, num_devices):
        with console.status(f"{format_mesh(shape)} {attention.layout} ..."):
            rows.append(alone(measure, config, shape, attention))
    console.print(_table(config, rows))
    if config.out is not None:
        _write(config, about, rows)


def _look_round() -> tuple[dict[str, str], int]:
    about = environment()
    if jax.devices()[0].platform == "cpu":
        about["note"] = f"{CPU_DEVICES} virtual CPU devices of one machine: speeds say nothing about a cluster"
    return about, len(jax.devices())


def _table(config: Config, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{config.title}, {config.batch} x {config.seq_len} tokens, remat {config.remat}")
    columns = ("mesh", "layout", "strategy", "step, s", "tokens/s", "planned, MB", "measured, MB", "MFU")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in sorted(rows, key=lambda row: row["step_seconds"]):
        measured = "-" if row["measured_bytes"] is None else f"{row['measured_bytes'] / 1e6:,.1f}"
        table.add_row(
            row["mesh"],
            row["layout"],
            row["strategy"],
            f"{row['step_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['planned_bytes'] / 1e6:,.1f}",
            measured,
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
        )
    return table


def _write(config: Config, about: dict[str, str], rows: list[dict[str, Any]]) -> None:
    assert config.out is not None
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / f"mesh-{config.model}.json"
    path.write_text(
        json.dumps({"environment": about, "config": config.settings, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    figure, ax = plt.subplots(figsize=(7, 1 + 0.3 * len(rows)), layout="constrained")
    ax.barh([f"{row['mesh']} {row['layout']}" for row in rows], [row["tokens_per_second"] for row in rows])
    ax.set(xlabel="tokens/s", title=f"{config.title} on {about['device']} devices")
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
