"""How much of one GPU's peak rate a training step reaches at several lengths: a few layers of a model and its head.

    python -m benchmarks.mfu --out benchmarks/results

MFU is the model's FLOPs over the step's time and the datasheet's dense bfloat16 rate; `COUNTED` says what they are.
Time is that of the trainer's whole step, optimizer included, on random tokens. Few layers carry the head of the whole
model, so every row has the share of the FLOPs that is the head's, and what it would be with all layers. Each length
runs in a process of its own and is written at once; one that fails, for want of memory or otherwise, is a row that says
why. Without a GPU it runs on the CPU (`--model tiny --layers 2 --seq-len 512 1K`): that gives no MFU, and speeds that
mean nothing.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import matplotlib.pyplot as plt
import tyro
from rich.console import Console
from rich.table import Table

from ring_jax import kernels
from ring_jax.checkpoint import write_atomically
from ring_jax.kernels import Target
from ring_jax.modules import AttentionOptions
from ring_jax.planning.hardware import DATASHEETS
from ring_jax.planning.timing import flops_by_part
from ring_jax.planning.workload import Workload
from ring_jax.presets import find_preset
from ring_jax.training.config import parse_seq_len

from . import mesh
from .processes import alone
from .timing import environment

COUNTED = (
    "model FLOPs of a step: 6 for each token and weight of the layers' matrices (projections, feed-forward) and of the "
    "head; attention 6 T^2 N H a layer and sequence, which is half of all pairs (causal), forward and twice that "
    "backward; nothing for the embedding's look-up, norms, softmax, optimizer and what is computed again"
)
_PARTS = ("attention", "layers", "head")


@dataclasses.dataclass(frozen=True)
class Config:
    """Time a training step of a few layers on one GPU at several lengths, beside the GPU's peak rate."""

    model: str = "llama3-8b"
    layers: int = 4
    """So many layers of the model's shape: with all 32 of llama3-8b, weights and optimizer fill a GPU. 0: all."""
    batch: int = 1
    seq_len: tuple[str, ...] = ("8K", "16K", "32K", "64K", "128K")
    remat: str = "attention"
    """What the backward pass computes again, as in ring_jax.train."""
    steps: int = 3
    """Timed steps, after one that is not."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where to write mfu-DEVICE.json and .png. None: print only."""


def workloads_of(config: Config) -> dict[str, Workload]:
    """The training step at each length, the shortest first. Raises ValueError for the first senseless option."""
    for name, least in (("layers", 0), ("batch", 1), ("steps", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(config, name)}")
    if not config.seq_len:
        raise ValueError("--seq-len needs at least one length, such as 8K 128K")
    preset = find_preset(config.model)
    model = dataclasses.replace(preset, remat=config.remat, num_layers=config.layers or preset.num_layers)
    tokens = {text: parse_seq_len(text) for text in config.seq_len}
    if not all(tokens.values()):
        raise ValueError("--seq-len must be at least 1 token")
    return {
        text: Workload(name=config.model, model=model, seq_len=seq_len, batch=config.batch)
        for text, seq_len in sorted(tokens.items(), key=lambda item: item[1])
    }


def count(workload: Workload) -> dict[str, float]:
    """Model FLOPs of a step, and the share of each part: attention, the layers' matrices, the head (0 to 1, in all 1).

    `head_share_all_layers` is the head's with as many layers as the preset has.
    """
    layers = find_preset(workload.name).num_layers
    whole = dataclasses.replace(workload, model=dataclasses.replace(workload.model, num_layers=layers))
    flops, flops_of_whole = flops_by_part(workload), flops_by_part(whole)
    total = sum(flops.values())
    shares = {f"{part}_share": flops[part] / total for part in _PARTS}
    head_share = flops_of_whole["head"] / sum(flops_of_whole.values())
    return {"model_flops": total} | shares | {"head_share_all_layers": head_share}


def measure(config: Config, seq_len: str) -> dict[str, Any]:
    """Seconds of a step, tokens/s, planned and measured bytes, MFU; or, under `failed`, why there are none."""
    at_length = mesh.Config(
        model=config.model,
        seq_len=seq_len,
        batch=config.batch,
        layers=config.layers,
        remat=config.remat,
        steps=config.steps,
    )
    try:
        row = alone(mesh.measure, at_length, {"seq": 1}, AttentionOptions())
    except Exception as error:  # out of memory, a process that was killed: the other lengths may still fit
        return {"failed": _reason(error)}
    return {name: row[name] for name in ("step_seconds", "tokens_per_second", "planned_bytes", "measured_bytes", "mfu")}


def look_at_device(head_dim: int) -> dict[str, Any]:
    """The environment, the attention kernel that is the default there, and the peak rate in FLOP/s if it is known."""
    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    about, peak = environment(), mesh.peak_flops(device.device_kind)
    if not on_gpu:
        about["note"] = "measured on a CPU: that shows that it runs; its speeds mean nothing for a GPU"
    elif peak is None:
        known = ", ".join(sheet.name for sheet in DATASHEETS.values())
        about["note"] = f"no MFU: the peak rate of {device.device_kind!r} is not known; known are {known}"
    need = kernels.Need(Target.of_device(device), "bfloat16" if on_gpu else "float32", head_dim)
    return {"environment": about, "implementation": kernels.choose(None, need), "peak_flops": peak}


def main(args: Sequence[str] | None = None) -> int:
    """Prints the table and writes the files; returns the exit status: 0, 1 if no length ran, 2 for what cannot be."""
    config = tyro.cli(Config, args=args)
    console = Console(highlight=False, markup=False)
    try:
        workloads = workloads_of(config)
    except ValueError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    about = alone(look_at_device, next(iter(workloads.values())).heads[2])
    content = about | {"config": _settings(config), "counted": COUNTED, "rows": []}
    path = None
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        path = config.out / f"mfu-{about['environment']['device'].lower().replace(' ', '-')}.json"
    rows = content["rows"]
    for seq_len, workload in workloads.items():
        console.print(f"measuring {seq_len} tokens, attention by {about['implementation']} ...")
        rows.append({"seq_len": workload.seq_len} | count(workload) | measure(config, seq_len))
        if path is not None:  # after every length: whoever runs out of time keeps what was measured
            write_atomically(path, json.dumps(content, indent=1) + "\n")
    _report(console, config, content)
    measured = [row for row in rows if "failed" not in row]
    if path is not None:
        console.print(f"wrote {path}", soft_wrap=True)
        if measured:
            _draw(path.with_suffix(".png"), config, about["environment"], measured)
    return 0 if measured else 1


def _settings(config: Config) -> dict[str, Any]:
    """What the times depend on."""
    return {name: getattr(config, name) for name in ("model", "layers", "batch", "remat", "steps")}


def _title(config: Config, about: dict[str, str]) -> str:
    layers = config.layers or find_preset(config.model).num_layers
    return f"{config.model} with {layers} layers on one {about['device']}, batch {config.batch}, remat {config.remat}"


def _reason(error: Exception) -> str:
    """One line. Other resources that XLA calls exhausted, such as a kernel's shared memory, are not allocated."""
    text = next(iter(str(error).splitlines()), "")[:200]
    is_memory = "out of memory" in text.lower() or ("RESOURCE_EXHAUSTED" in text and "allocat" in text.lower())
    return f"{'out of memory' if is_memory else type(error).__name__}: {text}"


def _report(console: Console, config: Config, content: dict[str, Any]) -> None:
    """The tables, and below them why rows are missing and what the figures are not."""
    about, rows = content["environment"], content["rows"]
    console.print(_speed_table(_title(config, about), rows))
    console.print(_flops_table(find_preset(config.model).num_layers, rows))
    lines = [f"{row['seq_len']:,} tokens: {row['failed']}" for row in rows if "failed" in row]
    lines.append(COUNTED)
    if config.layers not in (0, find_preset(config.model).num_layers):
        lines.append(f"this is not the MFU of {config.model} with all its layers: there the head's share is another")
    for line in [*lines, *([about["note"]] if "note" in about else [])]:
        console.print(line, soft_wrap=True)


def _speed_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = _table(title, ("tokens", "step s", "tokens/s", "MFU", "planned MB", "measured MB"))
    for row in rows:
        table.add_row(
            f"{row['seq_len']:,}",
            _cell(row, "step_seconds", "{:.3f}"),
            _cell(row, "tokens_per_second", "{:,.0f}"),
            _cell(row, "mfu", "{:.1%}"),
            _cell(row, "planned_bytes", "{:,.1f}", 1e-6),
            _cell(row, "measured_bytes", "{:,.1f}", 1e-6),
        )
    return table


def _flops_table(all_layers: int, rows: Sequence[dict[str, Any]]) -> Table:
    head = f"head, if {all_layers} layer{'s' if all_layers > 1 else ''}"
    table = _table("model FLOPs of a step", ("tokens", "TFLOPs", *_PARTS, head))
    for row in rows:
        shares = (f"{row[name]:.1%}" for name in (*(f"{part}_share" for part in _PARTS), "head_share_all_layers"))
        table.add_row(f"{row['seq_len']:,}", f"{row['model_flops'] / 1e12:,.3g}", *shares)
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _cell(row: dict[str, Any], name: str, pattern: str, scale: float = 1.0) -> str:
    value = row.get(name)
    return "-" if value is None else pattern.format(scale * value)


def _draw(path: Path, config: Config, about: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """MFU above, or tokens/s where there is none; below it what the FLOPs are made of."""
    lengths = [f"{row['seq_len']:,}" for row in rows]
    figure, (speed, parts) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    if any(row["mfu"] is None for row in rows):
        bars = speed.bar(lengths, [row["tokens_per_second"] for row in rows], color="silver")
        speed.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        speed.set_ylabel("tokens/s")
    else:
        bars = speed.bar(lengths, [100 * row["mfu"] for row in rows], color="tab:blue")
        speed.bar_label(bars, fmt="{:.1f}", fontsize=8)
        speed.set(ylabel="MFU, %", ylim=(0, 100))
    bottom = [0.0] * len(rows)
    for part, label in zip(_PARTS, ("attention", "layers' matrices", "head"), strict=True):
        heights = [100 * row[f"{part}_share"] for row in rows]
        parts.bar(lengths, heights, bottom=bottom, label=label)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    parts.set(xlabel="tokens", ylabel="share of the FLOPs, %", ylim=(0, 100))
    parts.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for panel in (speed, parts):
        panel.spines[["top", "right"]].set_visible(False)
    speed.set_title("\n".join((_title(config, about), about.get("note", ""))).strip(), loc="left", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
