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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """The measured rate of all steps of one rank of a zigzag ring, run one after the other on one GPU."""

    direction: str
    implementation: str
    gpu: str
    num_shards: int
    rank: int
    tokens_per_gpu: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tflops: float
    date: str
    versions: str
    source: str


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
    """The time model against every measurement: whole kernels, and ranks of rings replayed on one GPU.

    Each kernel's rate, in TFLOP/s, is predicted from the others of its kernel and direction. A replay is predicted as a
    plan predicts it, from the kernel's rate at a shard's length; where only a ratio to an unmasked kernel is known, as
    that of causal blocks, which is what a zigzag rank computes at each step, to it.
    """
    kernels = [check for one in _measurements() if one.operation == "attention" for check in _check_kernel(one)]
    return kernels + [_check_replay(replay) for replay in _replays()] + _check_ratios()


def _check_kernel(one: Measurement) -> list[Check]:
    attention = [m for m in _measurements() if m.operation == "attention"]
    others = [m for m in attention if m is not one and _kind(m) == _kind(one) and m.is_causal]
    if not others:
        return []
    rate = _from_nearest(others, one.implementation, one.gpu, DATASHEETS[one.gpu], one.tokens, one.head_dim)
    mask = "causal" if one.is_causal else "full"
    what = f"{one.implementation} {one.direction} T{one.tokens} N{one.num_heads} H{one.head_dim} {mask}"
    return [Check(what, rate.flops / 1e12, one.tflops)]


def _check_replay(one: Replay) -> Check:
    sheet = DATASHEETS[one.gpu]
    rate = attention_rate(one.implementation, one.gpu, sheet, one.direction, one.tokens_per_gpu, one.head_dim)
    what = f"{one.implementation} {one.direction} replay of rank {one.rank} of {one.num_shards}, T{one.tokens_per_gpu}"
    return Check(f"{what} N{one.num_heads} H{one.head_dim}", rate.flops / 1e12, one.tflops)


def _check_ratios() -> list[Check]:
    checks = []
    for ratio in _file()["replay_ratios"]:
        measured = [m for m in _measurements() if _kind(m) == (ratio["implementation"], ratio["gpu"], "forward")]
        full = next((m for m in measured if not m.is_causal), None)
        if full:
            sheet = DATASHEETS[full.gpu]
            causal = attention_rate(full.implementation, full.gpu, sheet, "forward", full.tokens, full.head_dim)
            ring = f"a rank of {ratio['num_shards']}, T{ratio['tokens_per_gpu']}"
            what = f"{full.implementation} forward replay of {ring}, over the full rate"
            ours, theirs = causal.flops / full.tflops / 1e12, statistics.mean(ratio["ratio_to_full_mask"])
            checks.append(Check(what, ours, theirs))
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
def _replays() -> tuple[Replay, ...]:
    return tuple(Replay(**row) for row in _file()["replays"])


@functools.cache
def _file() -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath("rates.json").read_text(encoding="utf-8"))
