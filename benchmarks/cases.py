"""The one table of shapes: what the tests compare with the oracle, and what the benchmarks time.

A `Case` is one attention problem; `make_inputs` draws its arrays. All arrays are numpy and in natural token order.
"""

import dataclasses
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int32, Shaped

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# What an error may exceed twice that of dense attention in one piece by, see `tests/budget.py`.
ERROR_CONSTANTS = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}
HEAD_DIMS = (8, 64, 80, 128)
# Query heads and key/value heads: one each, shared by groups, one for all.
HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
# none     no segment ids
# packed   documents whose borders fall anywhere
# padding  the same, with padding at the end of every row
# empty    padding tokens anywhere, one whole shard of padding, and the last row of the batch nothing but padding
SEGMENTS = ("none", "packed", "padding", "empty")
SHARDS = (1, 2, 3, 4, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention problem: T = S = `seq_len` tokens, N = `num_heads`, K = `num_kv_heads`, H = `head_dim`."""

    batch: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    is_causal: bool = True
    segments: str = "none"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.segments not in SEGMENTS:
            raise ValueError(f"unknown segments {self.segments!r}: choose one of {', '.join(SEGMENTS)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} key/value heads must divide {self.num_heads} query heads")

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of a forward pass, 4 B T^2 N H and half of that when causal; backward is 2.5 x."""
        full = 4 * self.batch * self.seq_len**2 * self.num_heads * self.head_dim
        return full // 2 if self.is_causal else full

    @property
    def label(self) -> str:
        """Short name for tables and charts, such as "B1 T16K N32 K8 H128 bfloat16 causal"."""
        tokens = f"{self.seq_len // 1024}K" if self.seq_len % 1024 == 0 else str(self.seq_len)
        heads = f"N{self.num_heads}" + (f" K{self.num_kv_heads}" if self.num_kv_heads != self.num_heads else "")
        mask = ("causal" if self.is_causal else "full") + ("" if self.segments == "none" else f" {self.segments}")
        return f"B{self.batch} T{tokens} {heads} H{self.head_dim} {self.dtype} {mask}"


class Inputs(NamedTuple):
    """Arguments and cotangents of one case: standard normal, arrays in the case's dtype, `d_lse` float32."""

    query: Shaped[np.ndarray, "B T N H"]
    key: Shaped[np.ndarray, "B T K H"]
    value: Shaped[np.ndarray, "B T K H"]
    d_out: Shaped[np.ndarray, "B T N H"]
    d_lse: Float32[np.ndarray, "B N T"]
    segment_ids: Int32[np.ndarray, "B T"] | None


def make_inputs(case: Case, seed: int = 0, shard_of_token: Int32[np.ndarray, " T"] | None = None) -> Inputs:
    """Random arrays for `case`. `shard_of_token` says which shard holds each token: with the segments
    "empty" and more than one shard, one of them holds nothing but padding."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[case.dtype]

    def normal(num_heads: int) -> np.ndarray:
        return rng.standard_normal((case.batch, case.seq_len, num_heads, case.head_dim), np.float32).astype(dtype)

    query, key, value, d_out = (normal(n) for n in (case.num_heads, *(case.num_kv_heads,) * 2, case.num_heads))
    d_lse = rng.standard_normal((case.batch, case.num_heads, case.seq_len), np.float32)
    return Inputs(query, key, value, d_out, d_lse, _segment_ids(case, rng, shard_of_token))


def _segment_ids(case: Case, rng: np.random.Generator, shard_of_token: np.ndarray | None) -> np.ndarray | None:
    if case.segments == "none":
        return None
    num_borders = min(5, case.seq_len - 1)
    rows = []
    for _ in range(case.batch):
        borders = np.sort(rng.choice(np.arange(1, case.seq_len), num_borders, replace=False))
        row = 1 + np.searchsorted(borders, np.arange(case.seq_len), side="right")
        if case.segments == "padding":
            row[case.seq_len - rng.integers(1, case.seq_len // 2 + 1) :] = 0
        elif case.segments == "empty":
            row[rng.random(case.seq_len) < 0.1] = 0
        rows.append(row)
    ids = np.stack(rows).astype(np.int32)
    if case.segments == "empty":
        ids[-1] = 0
        if shard_of_token is not None and shard_of_token.max() > 0:
            ids[:, shard_of_token == shard_of_token.max() // 2] = 0
    return ids


# Single-GPU kernels: what jax cuDNN, jax's attention_mgpu, Pallas Triton and torch are measured on.
KERNEL_BENCHMARKS = (
    Case(batch=2, seq_len=8192, num_heads=16, num_kv_heads=16, head_dim=128),
    Case(batch=1, seq_len=16384, num_heads=16, num_kv_heads=16, head_dim=128),
    Case(batch=1, seq_len=16384, num_heads=16, num_kv_heads=16, head_dim=128, is_causal=False),
    Case(batch=1, seq_len=32768, num_heads=32, num_kv_heads=8, head_dim=128),
    Case(batch=1, seq_len=16384, num_heads=32, num_kv_heads=32, head_dim=64),
    Case(batch=1, seq_len=65536, num_heads=32, num_kv_heads=8, head_dim=128),
)

# The other lengths, heads and masks: ours and jax cuDNN only.
_GRID = tuple(
    Case(1, seq_len, num_heads, num_kv_heads, 128, is_causal=is_causal)
    for seq_len in (8192, 16384, 32768, 65536)
    for num_heads, num_kv_heads in ((16, 16), (32, 8))
    for is_causal in (True, False)
)
_FULL_64 = Case(batch=1, seq_len=16384, num_heads=32, num_kv_heads=32, head_dim=64, is_causal=False)
GRID_BENCHMARKS = tuple(case for case in (*_GRID, _FULL_64) if case not in KERNEL_BENCHMARKS)

# What a replayed ring is compared with: one block of its heads, as large as the blocks of 8 steps together.
ONE_BLOCK = Case(batch=1, seq_len=65536, num_heads=32, num_kv_heads=8, head_dim=128)

# Ranks of zigzag rings replayed on one GPU: the case of the whole sequence, and over how many shards it lies.
REPLAYS = (
    (Case(batch=1, seq_len=8 * 8192, num_heads=32, num_kv_heads=8, head_dim=128), 8),
    (Case(batch=1, seq_len=8 * 32768, num_heads=32, num_kv_heads=8, head_dim=128), 8),
)

# For drift: the same sequence over more and more shards, and half a million and a million keys for a query.
PRECISION = tuple(
    (Case(batch=1, seq_len=seq_len, num_heads=2, num_kv_heads=1, head_dim=128, dtype=dtype), shards)
    for dtype in DTYPES
    for seq_len, shards in ((65536, 1), (65536, 4), (65536, 32), (2**19, 32), (2**20, 32))
)
