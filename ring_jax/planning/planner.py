"""One plan: compile the step for the cluster, read its memory and schedule, predict its time."""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import jax

from ..cluster import read_schedule
from ..mesh import quiet_cuda_plugin
from ..model import TransformerConfig
from .hardware import Cluster
from .memory import MemorySplit, compile_with_memory
from .timing import Timing, predict
from .workload import Workload, lower

Progress = Callable[[str], None]


class CompileError(RuntimeError):
    """XLA could not compile the step; the message names the step and XLA's reason."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs and how long it takes. Memory and schedule are those of the compiled program."""

    workload: Workload
    cluster: Cluster
    implementation: str
    memory: MemorySplit
    timing: Timing
    host_memory: int
    """Bytes of one host."""
    compile_seconds: float

    @property
    def peak_memory_bytes(self) -> int:
        """Of one GPU; memory on the host is not in it."""
        return self.memory.device_bytes

    @property
    def host_bytes(self) -> int:
        """Pinned memory of one host, for all of its GPUs."""
        return self.memory.host_bytes * self.cluster.gpus_per_host

    @property
    def headroom(self) -> int:
        """Bytes of one GPU left free, after what is reserved; negative if the step does not fit."""
        return self.cluster.usable_memory - self.peak_memory_bytes

    @property
    def fits(self) -> bool:
        return self.headroom >= 0 and self.host_bytes <= self.host_memory


def leave_gpus_alone() -> None:
    """For programs that only plan: a GPU of this machine is not taken, and XLA's remarks on programs are not shown.

    Must run before the first use of jax.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    quiet_cuda_plugin()


def make_plan(workload: Workload, cluster: Cluster, *, host_memory: int, progress: Progress) -> Plan:
    """Compiles and reads one step.

    Raises:
        ValueError, NotImplementedError: options that make no step, see `workload.lower`.
        CompileError: XLA refused.
        RuntimeError: no CUDA plugin, see `compile_only_devices`.
    """
    began = time.monotonic()
    what = f"{workload.name}, {workload.seq_len:,} tokens, on {cluster.num_gpus} x {cluster.gpu}"
    implementation = workload.chosen_implementation(cluster)
    progress(f"tracing {what}")
    lowered, shapes = lower(workload, cluster)
    progress(f"compiling {what}")
    step = "the attention operation" if workload.is_attention else "the training step"
    try:
        compiled, memory = compile_with_memory(lowered, shapes)
    except Exception as error:
        # Whatever XLA, ptxas or a kernel's compiler raises: jax has no common type for these.
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CompileError(f"compiling {step} of {what} failed: {reason}") from error
    _, num_kv_heads, head_dim = workload.heads
    heads = max(1, num_kv_heads // cluster.mesh.get("tensor", 1))
    hlo = compiled.as_text()
    assert hlo is not None
    schedule = read_schedule(hlo, block_bytes=2 * workload.local_tokens(cluster) * heads * head_dim)
    timing = predict(workload, cluster, implementation, schedule, memory.host_bytes)
    return Plan(workload, cluster, implementation, memory, timing, host_memory, time.monotonic() - began)


def longest(plan_at: Callable[[int], Plan], granule: int, start: int, progress: Progress) -> Plan:
    """The plan of the longest sequence that fits, in multiples of `granule`, leaving at most 3 % of the memory unused.

    Memory grows in a line with the length, so that each compile tells where to try next; the result is one that was
    compiled and fits.

    Raises:
        ValueError: not even `granule` tokens fit.
    """
    tried: dict[int, Plan] = {}
    length = max(granule, start // granule * granule)
    while length not in tried:
        tried[length] = plan = plan_at(length)
        progress(f"{length:,} tokens need {plan.peak_memory_bytes / 1e9:.1f} GB: {'fits' if plan.fits else 'too long'}")
        if plan.fits and _is_full(plan):
            return plan
        length = _next_length(tried, granule)
    fitting = [length for length, plan in tried.items() if plan.fits]
    if not fitting:
        least = min(plan.peak_memory_bytes for plan in tried.values())
        raise ValueError(f"not even {granule:,} tokens fit: they need {least / 1e9:.1f} GB; use more GPUs or --offload")
    return tried[max(fitting)]


def _is_full(plan: Plan) -> bool:
    return plan.headroom < 0.03 * plan.cluster.usable_memory or plan.host_bytes > 0.98 * plan.host_memory


def _next_length(tried: dict[int, Plan], granule: int) -> int:
    """Where device or host memory would be just full, by the lengths already compiled."""
    nearest = sorted(tried, key=lambda length: abs(tried[length].headroom))[:2]
    if len(nearest) == 1:
        plan = tried[nearest[0]]
        limits = [
            nearest[0]
            * (plan.cluster.usable_memory - _fixed_bytes(plan))
            / (plan.peak_memory_bytes - _fixed_bytes(plan))
        ]
    else:
        limits = [_crossing(nearest[0], nearest[1], [tried[length].headroom for length in nearest])]
    plan = tried[nearest[0]]
    if plan.host_bytes:
        limits.append(nearest[0] * plan.host_memory / plan.host_bytes)
    # A little less than the line says: what XLA needs is not quite a line.
    length = max(granule, int(0.995 * min(limits)) // granule * granule)
    fitting = max((n for n, plan in tried.items() if plan.fits), default=0)
    too_long = min((n for n, plan in tried.items() if not plan.fits), default=None)
    if length <= fitting or (too_long is not None and length >= too_long):
        length = (fitting + too_long) // 2 if too_long is not None else fitting + granule
    return max(granule, length // granule * granule)


def _fixed_bytes(plan: Plan) -> int:
    """Device memory that does not depend on the length."""
    fixed = ("parameters", "optimizer", "gradients", "gathered weights")
    return sum(plan.memory.parts[part] for part in fixed)


def _crossing(one: int, other: int, left: Sequence[int]) -> float:
    slope = (left[1] - left[0]) / (other - one)
    return float("inf") if slope >= 0 else one - left[0] / slope


def meshes(num_gpus: int, batch: int, num_kv_heads: int) -> list[dict[str, int]]:
    """Every data x seq x tensor mesh of that many GPUs that the batch and the heads divide over; no axes of size 1.

    The tensor axis is innermost, where links are fastest, then seq.
    """
    found = []
    for data in range(1, num_gpus + 1):
        for tensor in range(1, num_gpus // data + 1):
            seq, rest = divmod(num_gpus, data * tensor)
            if rest or batch % data or num_kv_heads % tensor:
                continue
            sizes = {"data": data, "seq": seq, "tensor": tensor}
            found.append({axis: size for axis, size in sizes.items() if size > 1 or axis == "seq"})
    return found


def advice(plan: Plan) -> list[str]:
    """What to change if the step does not fit, or what the free memory could buy; the first is the best."""
    model = plan.workload.model
    lines = []
    saved = plan.memory.parts["saved activations"]
    if plan.host_bytes > plan.host_memory:
        lines.append(
            f"each host lacks {(plan.host_bytes - plan.host_memory) / 1e9:.0f} GB: more hosts with fewer GPUs "
            "each, or a shorter sequence"
        )
    if plan.headroom < 0:
        if isinstance(model, TransformerConfig) and model.remat != "layer":
            lines.append("--remat layer keeps only each layer's input")
        if isinstance(model, TransformerConfig) and not model.offload:
            lines.append(f"--offload moves what remat keeps to the host: {saved / 1e9:.1f} GB less on each GPU")
        lines.append("more GPUs on the seq axis: activations shrink as the number of GPUs grows")
        lines.append("--max-seq-len finds the longest sequence that fits")
    elif isinstance(model, TransformerConfig) and model.remat == "layer":
        num_heads, _, head_dim = plan.workload.heads
        tensor = plan.cluster.mesh.get("tensor", 1)
        per_token = (2 * head_dim + 4) * num_heads // tensor
        more = model.num_layers * plan.workload.local_tokens(plan.cluster) * per_token
        if more <= plan.headroom and not model.offload:
            lines.append(f"there is room for --remat attention: about {more / 1e9:.1f} GB more, one forward ring less")
        elif model.offload:
            lines.append("--remat attention moves the attention output to the host too, for one forward ring less")
    return lines
