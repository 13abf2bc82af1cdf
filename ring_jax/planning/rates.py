"""Measured rates of kernels and matrix products, and which of them a prediction rests on."""

import dataclasses
import functools
import json
import math
import statistics
from importlib import resources
from typing import Any

from .hardware import DATASHEETS, Datasheet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured rate, and where it comes from. FLOP count as in `kernel_flops`; causal blocks count half."""

    operation: str
    direction: str
    implementation: str
    gpu: str
    dtype: str
    tflops: float
    date: str
    versions: str
    source: str
    tokens: int = 0
    batch: int = 1
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    is_causal: bool = True
    size: int = 0


@dataclasses.dataclass(frozen=True)
class Rate:
    """FLOP/s that a prediction uses, and how they were found."""

    flops: float
    source: str


@dataclasses.dataclass(frozen=True)
class Check:
    """The time model against one measurement: `error` is predicted / measured - 1."""

    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def kernel_flops(q_tokens: float, k_tokens: float, num_heads: int, head_dim: int, direction: str) -> float:
    """FLOPs of attention of one block, all pairs visible: 4 T S N H forward and 2.5 times that backward."""
    forward = 4 * q_tokens * k_tokens * num_heads * head_dim
    return forward if direction == "forward" else 2.5 * forward


def attention_rate(implementation: str, gpu: str, sheet: Datasheet, direction: str, tokens: int, head_dim: int) -> Rate:
    """The measured rate nearest to this: own kernel before another's, same head dim, nearest length, same GPU."""
    measured = [m for m in _measurements() if m.operation == "attention" and m.direction == direction and m.is_causal]
    return _from_nearest(measured, implementation, gpu, sheet, tokens, head_dim)


def matmul_rate(gpu: str, sheet: Datasheet) -> Rate:
    """Of large bfloat16 matrix products."""
    measured = [m for m in _measurements() if m.operation == "matmul"]
    best = min(measured, key=lambda m: m.gpu != gpu)
    return _scaled(best, gpu, sheet, f"a {best.size}x{best.size}x{best.size} product")


def check_rates() -> list[Check]:
    """Every measurement against what the model says without it, and replayed rings against whole kernels.

    Each attention rate is predicted from the others of its kernel and direction; TFLOP/s. A replay is predicted as the
    rate of causal blocks, which is what a zigzag rank computes at each step, over that of an unmasked kernel.
    """
    checks = []
    attention = [m for m in _measurements() if m.operation == "attention"]
    for one in attention:
        others = [m for m in attention if m is not one and _kind(m) == _kind(one) and m.is_causal]
        if others:
            sheet = DATASHEETS[one.gpu]
            rate = _from_nearest(others, one.implementation, one.gpu, sheet, one.tokens, one.head_dim)
            mask = "causal" if one.is_causal else "full"
            what = f"{one.implementation} {one.direction} T{one.tokens} N{one.num_heads} H{one.head_dim} {mask}"
            checks.append(Check(what, rate.flops / 1e12, one.tflops))
    full = next((m for m in attention if not m.is_causal and m.direction == "forward"), None)
    if full:
        causal = attention_rate(full.implementation, full.gpu, DATASHEETS[full.gpu], "forward", full.tokens, 128)
        for replay in _file()["replays"]:
            what = f"replay of a rank of {replay['num_shards']}, {replay['tokens_per_gpu']} tokens a GPU, of full rate"
            checks.append(Check(what, causal.flops / full.tflops / 1e12, statistics.mean(replay["ratio_to_full_mask"])))
    return checks


def _kind(m: Measurement) -> tuple[str, str, str]:
    return m.implementation, m.gpu, m.direction


def _from_nearest(
    measured: list[Measurement], implementation: str, gpu: str, sheet: Datasheet, tokens: int, head_dim: int
) -> Rate:
    def distance(m: Measurement) -> tuple[bool, bool, float, float]:
        return (
            m.implementation != implementation,
            m.gpu != gpu,
            abs(math.log(m.head_dim / head_dim)),
            abs(math.log(m.tokens / max(tokens, 1))),
        )

    best = min(measured, key=distance)
    stand_in = "" if best.implementation == implementation else f", standing in for {implementation}, not yet measured"
    shape = f"{best.implementation} {best.direction}, {best.tokens} tokens, head dim {best.head_dim}{stand_in}"
    return _scaled(best, gpu, sheet, shape)


def _scaled(m: Measurement, gpu: str, sheet: Datasheet, what: str) -> Rate:
    source = f"{what}: measured on {m.gpu}, {m.date} ({m.versions})"
    if m.gpu == gpu:
        return Rate(m.tflops * 1e12, source)
    ratio = sheet.bf16_flops / DATASHEETS[m.gpu].bf16_flops
    if ratio == 1:
        return Rate(m.tflops * 1e12, f"{source}; same datasheet FLOP/s as {gpu}")
    return Rate(m.tflops * 1e12 * ratio, f"{source}, x {ratio:.3g} by the datasheets' FLOP/s, not measured on {gpu}")


@functools.cache
def _measurements() -> tuple[Measurement, ...]:
    return tuple(Measurement(**row) for row in _file()["rates"])


@functools.cache
def _file() -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath("rates.json").read_text(encoding="utf-8"))
