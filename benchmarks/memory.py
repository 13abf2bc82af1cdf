"""The planner against one real GPU: a training step's peak memory as planned and as measured.

    python -m benchmarks.memory --out benchmarks/results

Each pair of model and length is run in a process of its own, with the planner's default flags on a mesh of one GPU, and
planned by compile alone in another that does not see the GPU. Measured is the peak that jax's allocator reports after
the step, if the step raised it: weights, optimizer, batch and everything the step needs, but not the CUDA context,
which the planner counts among what stays free. The plan must be within 1 %, or the command fails. Times stand beside
it: the planner's prediction was made from rates of kernels and products, not from these steps.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console, Group
from rich.table import Table

from ring_jax import kernels
from ring_jax.cluster import GPUS, gpu_description
from ring_jax.kernels import Target
from ring_jax.mesh import make_mesh
from ring_jax.planning import Cluster, Workload, find_model, make_plan
from ring_jax.planning.memory import peak_bytes
from ring_jax.planning.workload import train_step
from ring_jax.training.config import parse_seq_len

from .processes import alone, fresh_processes
from .steps import median_step_seconds, random_batch
from .timing import environment

MAX_ERROR = 0.01
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the memory of training steps on one GPU beside the planner's figures."""

    pairs: tuple[str, ...] = ("small/128K", "medium/64K", "large/32K")
    """Models and lengths, as MODEL/TOKENS."""
    remat: str = "layer"
    """What the backward pass computes again, as in ring_jax.plan."""
    offload: bool = False
    """Keep what remat saves in the host's pinned memory, as in ring_jax.plan."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where to write memory-GPU.json, or memory-offload-GPU.json. None: print only."""

    @property
    def title(self) -> str:
        return f"remat {self.remat}" + (", offload" if self.offload else "")


def workload_of(pair: str, *, remat: str, offload: bool) -> Workload:
    """The training step of a pair such as "small/128K". Raises ValueError for what is no model or no length."""
    name, slash, seq_len = pair.partition("/")
    if not slash:
        raise ValueError(f"pair {pair!r}: write MODEL/TOKENS, such as small/128K")
    model = find_model(name, heads="", head_dim=0, remat=remat, offload=offload)
    return Workload(name=name, model=model, seq_len=parse_seq_len(seq_len))


def gpu_of(device_kind: str) -> str:
    """The name in `ring_jax.cluster.GPUS` of the GPU that calls itself `device_kind`. Raises ValueError."""
    for name in GPUS:
        if f'device_description_str: "{device_kind}"' in gpu_description(name):
            return name
    raise ValueError(f"there is no description of {device_kind!r} to plan with; there are {', '.join(GPUS)}")


def step_peak(before: Mapping[str, int], after: Mapping[str, int]) -> int:
    """Peak bytes of what ran between two readings of `device.memory_stats()`.

    Raises:
        ValueError: it did not raise the peak of the process, which therefore is that of something earlier.
    """
    if after["peak_bytes_in_use"] <= before["peak_bytes_in_use"]:
        raise ValueError(
            f"compiling and making the weights took {before['peak_bytes_in_use'] / 1e9:.2f} GB, more than the step: "
            "its own peak cannot be told; use a longer sequence"
        )
    return after["peak_bytes_in_use"]


def look_at_gpu(head_dims: Sequence[int]) -> dict[str, Any]:
    """The environment, and the kernel that is the default for each head dim on this GPU.

    Raises:
        ValueError: jax sees no NVIDIA GPU, or one that has no description.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise ValueError(
            f"benchmarks.memory needs a GPU, but jax sees only {device.device_kind}, which does not report its peak "
            "memory; `python -m ring_jax.plan` says what can be known without one"
        )
    target = Target.of_device(device)
    chosen = {head_dim: kernels.choose(None, kernels.Need(target, "bfloat16", head_dim)) for head_dim in head_dims}
    return {"environment": environment(), "gpu": gpu_of(device.device_kind), "implementations": chosen}


def measure(workload: Workload) -> dict[str, Any]:
    """Bytes and median seconds of a training step on the first GPU; must be the first to use it in its process."""
    step = train_step(workload, make_mesh({"seq": 1}))
    run = step.lower().compile()
    state = jax.block_until_ready(step.init(0))
    batch = jax.block_until_ready(step.place(random_batch(workload.batch, workload.seq_len, vocab_size=256)))
    device = jax.devices()[0]
    before = dict(device.memory_stats())
    seconds = median_step_seconds(run, state, batch, steps=STEPS, name=workload.name)
    analysis: Any = run.memory_analysis()
    return {
        "measured_bytes": step_peak(before, dict(device.memory_stats())),
        "compiled_there_bytes": peak_bytes(analysis),
        "before_step": {name: before[name] for name in ("bytes_in_use", "peak_bytes_in_use")},
        "argument_bytes": analysis.argument_size_in_bytes,
        "measured_seconds": seconds,
    }


def plan(workload: Workload, gpu: str) -> dict[str, Any]:
    """The planner's figures for the same step on one GPU of that name."""
    found = make_plan(workload, Cluster.of(gpu, "seq=1"), host_memory=int(2e12), progress=lambda text: None)
    return {"planned_bytes": found.peak_memory_bytes, "predicted_seconds": found.timing.seconds}


def main(args: Sequence[str] | None = None) -> int:
    """Prints the table and writes the file; returns the exit status: 0, 1 if a plan is off, 2 for what cannot be."""
    config = tyro.cli(Config, args=args)
    console = Console(highlight=False, markup=False)
    try:
        workloads = {pair: workload_of(pair, remat=config.remat, offload=config.offload) for pair in config.pairs}
        about, rows = _compare(workloads, console)
    except ValueError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    console.print(_tables(f"one training step on one {about['device']}, {config.title}", rows))
    if config.out is not None:
        kind = "memory-offload" if config.offload else "memory"
        path = config.out / f"{kind}-{about['device'].lower().replace(' ', '-')}.json"
        config.out.mkdir(parents=True, exist_ok=True)
        content = {"environment": about, "remat": config.remat, "offload": config.offload, "rows": rows}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {path}", soft_wrap=True)
    worst = max(abs(row["error"]) for row in rows)
    verdict = "within" if worst <= MAX_ERROR else "NOT within"
    console.print(f"planned memory is {verdict} {MAX_ERROR:.0%} of measured: at most {worst:.2%} off")
    return 0 if worst <= MAX_ERROR else 1


def _compare(workloads: Mapping[str, Workload], console: Console) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The environment, and a row for each pair; plans are made while the GPU measures."""
    seen = alone(look_at_gpu, sorted({workload.heads[2] for workload in workloads.values()}))
    measured, planned = {}, {}
    with fresh_processes(len(workloads), for_plans=True) as pool:
        for pair, workload in workloads.items():
            # The GPU's own choice of kernel: compile-only takes no notice of a compiler that jax distrusts there.
            chosen = seen["implementations"][workload.heads[2]]
            workload = dataclasses.replace(workload, implementation=chosen)
            planned[pair] = pool.submit(plan, workload, seen["gpu"])
            console.print(f"measuring {pair}, attention by {chosen} ...")
            measured[pair] = {"implementation": chosen} | alone(measure, workload)
        rows = [{"pair": pair} | measured[pair] | planned[pair].result() for pair in workloads]
    for row in rows:
        row["error"] = row["planned_bytes"] / row["measured_bytes"] - 1
    return seen["environment"], rows


def _tables(title: str, rows: Sequence[dict[str, Any]]) -> Group:
    """Memory first, then times."""
    memory = _table(f"{title}: memory", ("pair", "kernel", "planned MB", "compiled there MB", "measured MB", "error"))
    times = _table("step times", ("pair", "kernel", "predicted s", "measured s", "error"))
    for row in rows:
        sizes = (f"{row[name] / 1e6:,.1f}" for name in ("planned_bytes", "compiled_there_bytes", "measured_bytes"))
        memory.add_row(row["pair"], row["implementation"], *sizes, f"{row['error']:+.3%}")
        seconds = (f"{row[name]:.3f}" for name in ("predicted_seconds", "measured_seconds"))
        time_error = row["predicted_seconds"] / row["measured_seconds"] - 1
        times.add_row(row["pair"], row["implementation"], *seconds, f"{time_error:+.1%}")
    return Group(memory, times)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("pair", "kernel") else "right", overflow="fold")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
