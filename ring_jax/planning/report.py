"""A plan as text for people and as JSON for programs."""

import dataclasses
import statistics
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from ..mesh import format_mesh
from ..model import TransformerConfig
from .planner import Plan, advice
from .rates import check_rates


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything of a plan. `peak_memory_bytes` is device memory of one GPU; host memory stands apart."""
    timing = plan.timing
    model = plan.workload.model
    return {
        "peak_memory_bytes": plan.peak_memory_bytes,
        "fits": plan.fits,
        "headroom_bytes": plan.headroom,
        "device_memory_bytes": plan.cluster.device_memory,
        "usable_memory_bytes": plan.cluster.usable_memory,
        "memory_bytes": dict(plan.memory.parts),
        "host_bytes_per_gpu": plan.memory.host_bytes,
        "host_bytes_per_host": plan.host_bytes,
        "host_memory_bytes": plan.host_memory,
        "workload": {
            "model": plan.workload.name,
            "seq_len": plan.workload.seq_len,
            "batch": plan.workload.batch,
            "layout": plan.workload.layout,
            "implementation": plan.implementation,
            "remat": model.remat if isinstance(model, TransformerConfig) else None,
            "offload": model.offload if isinstance(model, TransformerConfig) else False,
        },
        "cluster": {
            "gpu": plan.cluster.gpu,
            "mesh": dict(plan.cluster.mesh),
            "hosts": plan.cluster.hosts,
            "gpus_per_host": plan.cluster.gpus_per_host,
            "link": plan.cluster.link_along("seq").name,
        },
        "predicted": {
            "step_seconds": timing.seconds,
            "tokens_per_second": timing.tokens_per_second,
            "mfu": timing.mfu,
            "seconds": dict(timing.parts),
            "hops": [dataclasses.asdict(hop) | {"exposed_seconds": hop.exposed_seconds} for hop in timing.hops],
            "sources": dict(timing.sources),
        },
        "schedule": {"permutes": timing.total_permutes, "exposed_permutes": timing.exposed_permutes},
        "advice": advice(plan),
        "compile_seconds": plan.compile_seconds,
    }


def to_text(plan: Plan) -> RenderableType:
    """What a person wants to know, in the order of the questions: does it fit, why, how long does it take."""
    lines: list[RenderableType] = [_headline(plan), "", _memory_table(plan), _host_line(plan), *_advice(plan), ""]
    if plan.timing.hops:
        lines += [_hop_table(plan), _schedule_line(plan), ""]
    return Group(*lines, _time_table(plan), *_sources(plan), _check_line())


def ranking(plans: list[Plan]) -> RenderableType:
    """Meshes of the same GPUs, fastest first; those that do not fit come last."""
    table = Table(title="meshes, fastest first (times predicted)", title_justify="left")
    for column in ("mesh", "memory per GPU, GB", "fits", "step, s (predicted)", "tokens/s (predicted)", "MFU"):
        table.add_column(column, justify="right" if column != "mesh" else "left", overflow="fold")
    for plan in ranked(plans):
        table.add_row(
            format_mesh(plan.cluster.mesh),
            _gigabytes(plan.peak_memory_bytes),
            "yes" if plan.fits else "no",
            f"{plan.timing.seconds:.3g}",
            f"{plan.timing.tokens_per_second:,.0f}",
            f"{plan.timing.mfu:.1%}",
        )
    return table


def ranked(plans: list[Plan]) -> list[Plan]:
    """Those that fit first, then by predicted time."""
    return sorted(plans, key=lambda plan: (not plan.fits, plan.timing.seconds))


def _headline(plan: Plan) -> str:
    workload, cluster = plan.workload, plan.cluster
    model = workload.model
    remat = ""
    if isinstance(model, TransformerConfig):
        remat = f", remat {model.remat}" + (", offload" if model.offload else "")
    kind = "forward and backward" if workload.is_attention else "one training step"
    return (
        f"{workload.name}, {workload.seq_len:,} tokens x {workload.batch}, {kind}, on {cluster.num_gpus} x "
        f"{cluster.gpu} ({cluster.hosts} x {cluster.gpus_per_host}), mesh {format_mesh(cluster.mesh)}\n"
        f"layout {workload.layout}, attention by {plan.implementation}{remat}; compiled in "
        f"{plan.compile_seconds:.0f} s"
    )


def _memory_table(plan: Plan) -> Table:
    table = Table(title="memory of each GPU, GB = 10^9 bytes (exact for the compiled program)", title_justify="left")
    table.add_column("part")
    table.add_column("GB", justify="right")
    for part, size in plan.memory.parts.items():
        if size:
            table.add_row(part, _gigabytes(size))
    table.add_section()
    table.add_row("peak", _gigabytes(plan.peak_memory_bytes))
    usable = f"usable of {_gigabytes(plan.cluster.device_memory)}: 6 % stays free for NCCL, CUDA and fragmentation"
    table.add_row(usable, _gigabytes(plan.cluster.usable_memory))
    verdict = "FITS, headroom" if plan.headroom >= 0 else "DOES NOT FIT, too much by"
    table.add_row(verdict, _gigabytes(abs(plan.headroom)))
    return table


def _host_line(plan: Plan) -> str:
    if not plan.memory.host_bytes:
        return "host memory: nothing is offloaded"
    verdict = "fits in" if plan.host_bytes <= plan.host_memory else "DOES NOT FIT in"
    return (
        f"host memory: {_gigabytes(plan.memory.host_bytes)} GB pinned for each GPU, {_gigabytes(plan.host_bytes)} GB "
        f"on each host: {verdict} {_gigabytes(plan.host_memory)} GB (--host-memory)"
    )


def _advice(plan: Plan) -> list[str]:
    return [f"try: {line}" for line in advice(plan)]


def _hop_table(plan: Plan) -> Table:
    table = Table(title="hops of the ring (times predicted)", title_justify="left")
    columns = ("ring", "hops", "MB sent by each GPU", "on the link, ms", "kernel beside it, ms", "exposed, ms")
    for column in columns:
        table.add_column(column, justify="right" if column != "ring" else "left", overflow="fold")
    for hop in plan.timing.hops:
        exposed = f"{1e3 * hop.exposed_seconds:.3g}" if hop.exposed_seconds else "hidden"
        times = (f"{1e3 * seconds:.3g}" for seconds in (hop.link_seconds, hop.kernel_seconds))
        table.add_row(hop.ring, f"{hop.count}", f"{hop.num_bytes / 1e6:.1f}", *times, exposed)
    return table


def _schedule_line(plan: Plan) -> str:
    timing = plan.timing
    return (
        f"compiled schedule: {timing.total_permutes} permutes, {timing.exposed_permutes} of them without an attention "
        "kernel beside them"
    )


def _time_table(plan: Plan) -> Table:
    timing = plan.timing
    table = Table(title="predicted time of one step", title_justify="left")
    table.add_column("part")
    table.add_column("seconds (predicted)", justify="right")
    for part, seconds in timing.parts.items():
        table.add_row(part, f"{seconds:.3g}")
    table.add_section()
    table.add_row("step", f"{timing.seconds:.3g}")
    table.add_row("tokens/s", f"{timing.tokens_per_second:,.0f}")
    table.add_row("MFU", f"{timing.mfu:.1%}")
    return table


def _sources(plan: Plan) -> list[str]:
    return [f"  {what}: {source}" for what, source in plan.timing.sources.items()]


def _check_line() -> str:
    errors = [abs(check.error) for check in check_rates()]
    return (
        f"  time model against {len(errors)} measurements, each left out of its own prediction: median error "
        f"{statistics.median(errors):.1%}, largest {max(errors):.1%}"
    )


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f}" if num_bytes >= 1e9 else f"{num_bytes / 1e9:.3f}"
