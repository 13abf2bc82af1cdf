"""The time model: kernels at measured rates, hops at the link's, hidden where the compiled schedule hides them.

Everything here is predicted. A step is the sum of what cannot overlap; what can overlap counts as far as it is longer
than what it hides under.
"""

import dataclasses

from ..cluster import Schedule
from ..model import TransformerConfig
from .hardware import Cluster, Link
from .rates import Rate, attention_rate, kernel_flops, matmul_rate
from .workload import Workload

# Reads and writes of a [tokens, D] array in the element-wise parts of a layer, forward and backward: norms, RoPE,
# residual sums, casts, as model.py has them. An estimate; these parts take about a hundredth of a long step.
_ELEMENTWISE_PASSES = 80
# Bytes of optimizer traffic per weight: weight, two moments and gradient read, three of them written, in float32.
_OPTIMIZER_BYTES = 28


@dataclasses.dataclass(frozen=True)
class HopTime:
    """One hop of a ring beside the kernel of its step: bytes sent by each GPU, seconds."""

    ring: str
    count: int
    num_bytes: int
    link_seconds: float
    kernel_seconds: float
    is_overlapped: bool
    """Whether the compiled schedule has a kernel under way during every large permute of this program."""

    @property
    def exposed_seconds(self) -> float:
        """Of one hop."""
        return max(0.0, self.link_seconds - self.kernel_seconds) if self.is_overlapped else self.link_seconds


@dataclasses.dataclass(frozen=True)
class Timing:
    """Predicted seconds of one step by part, of the slowest GPU, and the sources of what was assumed."""

    parts: dict[str, float]
    hops: tuple[HopTime, ...]
    exposed_permutes: int
    total_permutes: int
    model_flops: float
    tokens: int
    num_gpus: int
    peak_flops: float
    sources: dict[str, str]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs, without those computed again, over the datasheet's."""
        return self.model_flops / self.seconds / self.num_gpus / self.peak_flops


def predict(workload: Workload, cluster: Cluster, implementation: str, schedule: Schedule, host_bytes: int) -> Timing:
    """The time of one step, of a compiled program with this schedule that keeps `host_bytes` on the host."""
    sheet = cluster.datasheet
    rates = {
        direction: attention_rate(
            implementation, cluster.gpu, sheet, direction, _shard_tokens(workload, cluster), workload.heads[2]
        )
        for direction in ("forward", "backward")
    }
    link = cluster.link_along("seq")
    kernels = {direction: _kernel_seconds(workload, cluster, direction, rate) for direction, rate in rates.items()}
    hops = _hops(workload, cluster, schedule, link, kernels)
    steps = cluster.mesh["seq"] * workload.num_layers
    forwards = 2 if workload.runs_forward_twice else 1
    parts = {
        "attention kernels": steps * (forwards * kernels["forward"] + kernels["backward"]),
        "exposed hops": sum(hop.count * hop.exposed_seconds for hop in hops) + _exposed_seconds(schedule, link),
    }
    sources = {f"attention {direction}": rate.source for direction, rate in rates.items()}
    if isinstance(workload.model, TransformerConfig):
        matmul = matmul_rate(cluster.gpu, sheet)
        parts |= _model_parts(workload.model, workload, cluster, matmul, parts["attention kernels"], host_bytes)
        sources |= {"matrix products": matmul.source}
        sources |= {"element-wise parts": f"{_ELEMENTWISE_PASSES} passes over [tokens, D] a layer: an estimate"}
        sources |= {"memory bandwidth": f"{cluster.memory_bandwidth / 1e9:.0f} GB/s: datasheet"}
    bandwidth = f"{link.bandwidth / 1e9:g} GB/s each way: datasheet; {link.latency * 1e6:g} us latency: assumed"
    sources |= {"link": f"{link.name}, {bandwidth}"}
    return Timing(
        parts=parts,
        hops=hops,
        exposed_permutes=schedule.num_exposed,
        total_permutes=schedule.num_permutes,
        model_flops=model_flops(workload),
        tokens=workload.batch * workload.seq_len,
        num_gpus=cluster.num_gpus,
        peak_flops=sheet.bf16_flops,
        sources=sources,
    )


def model_flops(workload: Workload) -> float:
    """FLOPs of one step, nothing counted twice: 6 per weight and token, and causal attention three times forward.

    The bare operation counts its backward 2.5 times, as attention kernels are compared.
    """
    return sum(flops_by_part(workload).values())


def flops_by_part(workload: Workload) -> dict[str, float]:
    """`model_flops` by where they arise: `attention` (scores and values only), the matrices of the `layers`, `head`."""
    num_heads, _, head_dim = workload.heads
    attention = workload.batch * kernel_flops(workload.seq_len, workload.seq_len, num_heads, head_dim, "forward") / 2
    if not isinstance(workload.model, TransformerConfig):
        return {"attention": 3.5 * attention}
    tokens = workload.batch * workload.seq_len
    return {
        "attention": 3 * workload.num_layers * attention,
        "layers": 6 * workload.num_layers * sum(_layer_weights(workload.model)) * tokens,
        "head": 6 * _head_weights(workload.model) * tokens,
    }


def _shard_tokens(workload: Workload, cluster: Cluster) -> int:
    return workload.seq_len // cluster.mesh["seq"]


def _kernel_seconds(workload: Workload, cluster: Cluster, direction: str, rate: Rate) -> float:
    """One ring step of one layer on the busiest GPU.

    In the balanced layouts half of the pairs of every block are visible to every rank; in the contiguous one the last
    rank sees all of them but in its own block.
    """
    num_heads, _, head_dim = workload.heads
    tokens = _shard_tokens(workload, cluster)
    size = cluster.mesh["seq"]
    visible = (size - 0.5) / size if workload.layout == "contiguous" else 0.5
    rows = workload.batch / cluster.mesh.get("data", 1)
    heads = num_heads // cluster.mesh.get("tensor", 1)
    return visible * rows * kernel_flops(tokens, tokens, heads, head_dim, direction) / rate.flops


def hop_bytes(workload: Workload, cluster: Cluster) -> tuple[int, int]:
    """Bytes that each GPU sends in a hop forward, keys and values, and backward, their float32 gradients too."""
    _, num_kv_heads, head_dim = workload.heads
    heads = max(1, num_kv_heads // cluster.mesh.get("tensor", 1))
    elements = workload.local_tokens(cluster) * heads * head_dim
    ids = 0 if workload.is_attention else 4 * workload.local_tokens(cluster)
    return 2 * 2 * elements + ids, (2 * 2 + 2 * 4) * elements + ids


def _hops(
    workload: Workload, cluster: Cluster, schedule: Schedule, link: Link, kernels: dict[str, float]
) -> tuple[HopTime, ...]:
    size = cluster.mesh["seq"]
    if size == 1:
        return ()
    forward, backward = hop_bytes(workload, cluster)
    per_ring = (size - 1) * workload.num_layers
    overlapped = not all(hop.is_exposed for hop in schedule.hops)
    rings = [("forward", per_ring, forward)]
    if workload.runs_forward_twice:
        rings.append(("forward again", per_ring, forward))
    rings.append(("backward", per_ring, backward))
    return tuple(
        HopTime(
            ring, count, num_bytes, link.seconds(num_bytes), kernels["backward" if ring == "backward" else "forward"],
            overlapped,
        )
        for ring, count, num_bytes in rings
    )  # fmt: skip


def _exposed_seconds(schedule: Schedule, link: Link) -> float:
    """Of the permutes that the compiled schedule leaves without a kernel beside them, all sent one after the other."""
    if all(hop.is_exposed for hop in schedule.hops):
        return 0.0  # counted hop by hop
    return sum(hop.times * link.seconds(hop.num_bytes) for hop in schedule.hops if hop.is_exposed)


def _layer_weights(model: TransformerConfig) -> tuple[int, int]:
    """Weights of one layer's attention projections and of its feed-forward."""
    assert model.num_kv_heads is not None
    assert model.head_dim is not None
    assert model.mlp_dim is not None
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    return model.model_dim * heads * model.head_dim, 3 * model.model_dim * model.mlp_dim


def _head_weights(model: TransformerConfig) -> int:
    return model.model_dim * model.vocab_size


def _model_parts(
    model: TransformerConfig,
    workload: Workload,
    cluster: Cluster,
    matmul: Rate,
    attention_seconds: float,
    host_bytes: int,
) -> dict[str, float]:
    """Seconds of all but attention."""
    tokens = workload.local_tokens(cluster)
    split = cluster.mesh.get("tensor", 1)
    projections, mlp = _layer_weights(model)
    # Forward, two products backward, and what is computed again: with remat the projections, always gate and up.
    again = 1 if model.remat != "none" else 0
    per_token = 2 * projections * (3 + again) + 2 * mlp * (3 + 2 / 3)
    layers = model.num_layers * per_token * tokens / split / matmul.flops
    loss = 2 * _head_weights(model) * 3 * tokens / split / matmul.flops
    passes = model.num_layers * _ELEMENTWISE_PASSES * tokens * model.model_dim * 2
    weights = model.num_layers * (projections + mlp) + (1 if model.tie_embeddings else 2) * _head_weights(model)
    # Gathered twice and reduced once, at most in float32; all of it can run beside the layers' kernels.
    exchange = 3 * 4 * weights / split / cluster.gather_bandwidth()
    transfer = 2 * host_bytes / cluster.datasheet.pcie
    busy = attention_seconds + layers
    return {
        "matrix products of the layers": layers,
        "loss": loss,
        "element-wise parts": passes / cluster.memory_bandwidth,
        "optimizer": _OPTIMIZER_BYTES * weights / cluster.num_gpus / cluster.memory_bandwidth,
        "exposed exchange of weights": max(0.0, exchange - busy),
        "exposed transfer to the host": max(0.0, transfer - busy),
    }
