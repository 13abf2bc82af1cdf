"""Twice the GPUs at the same length: does the activation memory halve? Planned by compile, no GPU needed.

    python -m benchmarks.doubling --out benchmarks/results

Activation memory is what grows with the tokens of a GPU: what remat saves and the attention working set, at the peak of
the bare operation, and what remat saves in a training step.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import matplotlib.pyplot as plt
import tyro
from matplotlib.ticker import NullLocator
from rich.console import Console

from ring_jax.planning import Cluster, Plan, Workload, find_model, leave_gpus_alone, make_plan
from ring_jax.training.config import parse_seq_len

MAX_DEVIATION = 0.05


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile one length on 8, 16, 32 ... GPUs."""

    seq_len: str = "1M"
    gpus: tuple[int, ...] = (8, 16, 32, 64)
    gpu: str = "h100"
    model: str = "llama3-8b"
    """A preset, or attention."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where to write doubling-MODEL.json and .png. None: print only."""


def activation_bytes(plan: Plan) -> int:
    """Memory of one GPU that is proportional to its tokens."""
    parts = plan.memory.parts
    if plan.workload.is_attention:
        return plan.peak_memory_bytes - parts["other"] - parts["between buffers"]
    return parts["saved activations"]


def ratios(sizes: Sequence[int]) -> list[float]:
    """Each size over half of the one before: 1 where doubling halves."""
    return [2 * after / before for before, after in itertools.pairwise(sizes)]


def main(args: Sequence[str] | None = None) -> None:
    """Prints the sizes and writes the chart."""
    config = tyro.cli(Config, args=args)
    leave_gpus_alone()
    console = Console(highlight=False)
    seq_len = parse_seq_len(config.seq_len)
    model = find_model(config.model, heads="32/32", head_dim=128, remat="layer", offload=False)
    workload = Workload(name=config.model, model=model, seq_len=seq_len)
    sizes, peaks = [], []
    for count in config.gpus:
        with console.status(f"compiling {config.model} on {count} GPUs ..."):
            cluster = Cluster.of(config.gpu, f"seq={count}")
            plan = make_plan(workload, cluster, host_memory=int(2e12), progress=lambda text: None)
        sizes.append(activation_bytes(plan))
        peaks.append(plan.peak_memory_bytes)
        console.print(f"{count:4d} GPUs: {sizes[-1] / 1e9:.3f} GB of activations, peak {peaks[-1] / 1e9:.2f}")
    found = ratios(sizes)
    worst = max(abs(ratio - 1) for ratio in found)
    verdict = "halves" if worst <= MAX_DEVIATION else "does NOT halve"
    console.print(f"doubling {verdict}: within {worst:.2%} (limit {MAX_DEVIATION:.0%})")
    if config.out is not None:
        _write(config, sizes, peaks, found)


def _write(config: Config, sizes: Sequence[int], peaks: Sequence[int], found: Sequence[float]) -> None:
    assert config.out is not None
    config.out.mkdir(parents=True, exist_ok=True)
    content = {
        "model": config.model,
        "seq_len": config.seq_len,
        "gpu": config.gpu,
        "jax": jax.__version__,
        "gpus": config.gpus,
        "activation_bytes": sizes,
        "peak_bytes": peaks,
        "ratio_to_half": found,
    }
    path = config.out / f"doubling-{config.model}.json"
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    _draw(path.with_suffix(".png"), config, [size / 1e9 for size in sizes])


def _draw(path: Path, config: Config, gigabytes: Sequence[float]) -> None:
    """Both axes logarithmic, so that halving is a straight line."""
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ideal = [gigabytes[0] * config.gpus[0] / count for count in config.gpus]
    ax.plot(config.gpus, ideal, "--", color="silver", label="half for every doubling")
    ax.plot(config.gpus, gigabytes, "o", color="tab:blue", label="planned by compile")
    for count, size in zip(config.gpus, gigabytes, strict=True):
        ax.annotate(f"{size:.2f}", (count, size), textcoords="offset points", xytext=(8, 4), fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="activations of one GPU, GB")
    ax.set_title(f"{config.model}, {config.seq_len} tokens, {config.gpu}", loc="left")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    ax.set_xticks(config.gpus)
    ax.set_yticks(
        [2.0**power for power in range(math.floor(math.log2(min(ideal))), math.ceil(math.log2(ideal[0])) + 1)]
    )
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
