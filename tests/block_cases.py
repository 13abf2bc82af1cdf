"""Cases of block attention with carried state, and their float64 answers: the same for the interpreter and for a GPU.

A case attends to blocks of keys in turn, so each but the first continues the state of the one before; its backward
pass takes all blocks from the final logsumexp and accumulates dQ. Arrays come from a seed, so a GPU machine can rebuild
them beside a program that was exported elsewhere.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ring_jax.kernels.contract import AttentionState, BlockMask
from ring_jax.kernels.reference import reference_attention, visible_pairs
from ring_jax.kernels.several_blocks import folded
from tests.budget import allowed, error

# What dK and dV are added to where there are several blocks.
_SUM_BEFORE = 0.25


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes in the letters of the contract; `keys` is the length S of each block."""

    dtype: str = "bfloat16"
    batch: int = 1
    queries: int = 64
    keys: int = 64
    num_blocks: int = 2
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    is_causal: bool = True
    has_segments: bool = False
    # Queries of even and odd positions in two runs, as a striped or zigzag layout deals them.
    shuffled: bool = False
    # Keys larger and larger, so that the rows' maxima rise by more than any slack again and again.
    rising: bool = False
    # Whether the masks say that queries that see any key see equally many.
    is_even: bool = False
    # Whether the masks hold the positions of all blocks, and say which one is meant.
    by_index: bool = False
    # How many blocks are taken at once from the second step on, folded.
    at_once: int = 1

    def __str__(self) -> str:
        mask = (
            ("causal" if self.is_causal else "full")
            + "-docs" * self.has_segments
            + "-shuffled" * self.shuffled
            + "-rising" * self.rising
            + "-even" * self.is_even
            + "-by-index" * self.by_index
            + f"-{self.at_once}-at-once" * (self.at_once > 1)
        )
        sizes = f"B{self.batch}T{self.queries}S{self.keys}N{self.heads}K{self.kv_heads}H{self.head_dim}"
        sizes += f"x{self.num_blocks}" * (self.num_blocks != 2)
        return f"{self.dtype}-{sizes}-{mask}"

    @property
    def total_keys(self) -> int:
        return self.num_blocks * self.keys

    @property
    def steps(self) -> list[tuple[slice, ...]]:
        """The keys of each step's blocks."""
        spans = [slice(i * self.keys, (i + 1) * self.keys) for i in range(self.num_blocks)]
        return [(spans[0],), *itertools.batched(spans[1:], self.at_once)]

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


def arrays(case: Case) -> dict[str, Any]:
    """Query, d_out, d_lse, the keys and values of all blocks together, positions and segment ids."""
    rng = np.random.default_rng(sum(map(ord, str(case))))
    q_shape = (case.batch, case.queries, case.heads, case.head_dim)
    k_shape = (case.batch, case.total_keys, case.kv_heads, case.head_dim)
    dtype = jnp.dtype(case.dtype)
    result: dict[str, Any] = {
        name: rng.standard_normal(shape, np.float32).astype(dtype)
        for name, shape in (("query", q_shape), ("key", k_shape), ("value", k_shape), ("d_out", q_shape))
    }
    if case.rising:
        growth = np.linspace(0.1, 12, case.total_keys, dtype=np.float32)
        result["key"] = (result["key"].astype(np.float32) * growth[:, None, None]).astype(dtype)
    result["d_lse"] = rng.standard_normal((case.batch, case.heads, case.queries), np.float32)
    k_positions = np.arange(case.total_keys, dtype=np.int32)
    # The queries are spread over the keys, from before the first one (a row without keys) to the last one.
    q_positions = np.linspace(-3, case.total_keys - 1, case.queries).astype(np.int32)
    if case.shuffled:
        k_positions = np.concatenate([k_positions[::2], k_positions[1::2]])
        q_positions = np.concatenate([q_positions[::2], q_positions[1::2]])
    result |= {"q_positions": q_positions, "k_positions": k_positions, "q_segment_ids": None, "k_segment_ids": None}
    if case.has_segments:
        # Documents of 40 tokens, the last 10 positions padding; the rows of the batch start at different documents.
        first = np.arange(1, case.batch + 1, dtype=np.int32)[:, None]
        for side, positions in (("q", q_positions), ("k", k_positions)):
            ids = first + positions[None].clip(0) // 40
            result[f"{side}_segment_ids"] = np.where(positions[None] >= case.total_keys - 10, 0, ids).astype(np.int32)
    return result


def blocks(case: Case) -> Callable[..., dict[str, Any]]:
    """The case as a function of its arrays, to be given an implementation's block kernel."""

    def run(kernel: Any, data: dict[str, Any]) -> dict[str, Any]:
        state: Any = None
        for step, spans in enumerate(case.steps):
            k, v = (_alone_or_several([data[name][:, span] for span in spans]) for name in ("key", "value"))
            mask, is_last = _mask(case, data, step), step == len(case.steps) - 1
            state = kernel.forward(data["query"], k, v, state, mask, scale=case.scale, is_last=is_last)
        d_out = data["d_out"].astype(jnp.float32)
        output = state.output.astype(jnp.float32)
        delta = jnp.einsum("btnh,btnh->bnt", d_out, output, precision="highest") - data["d_lse"]
        dq = jnp.zeros(data["query"].shape, jnp.float32)
        grads = []
        for step, spans in enumerate(case.steps):
            k, v = (_alone_or_several([data[name][:, span] for span in spans]) for name in ("key", "value"))
            # Of several blocks dK and dV are added to what is there, and that is taken off again.
            is_only, shape = case.num_blocks == 1, (case.batch, 2, case.keys, *data["key"].shape[2:])
            # `getattr`: kernels with no such limit compute the gradients apart and add to none.
            is_fused = case.head_dim <= getattr(kernel, "MAX_FUSED_HEAD_DIM", 0)
            before = [jnp.full(shape, _SUM_BEFORE + i, jnp.float32) for i in range(len(spans))]
            sums = _alone_or_several(before) if is_fused and not is_only else None
            args = data["query"], k, v, data["d_out"], state.lse, delta, dq, sums, _mask(case, data, step)
            gradients = kernel.backward(*args, scale=case.scale, is_only=is_only)
            dq = gradients.dq
            if sums is None:
                assert gradients.dk.dtype == gradients.dv.dtype == (data["key"].dtype if is_only else jnp.float32)
                grads.append((gradients.dk, gradients.dv))
                continue
            found = gradients.sums if len(spans) > 1 else (gradients.sums,)
            grads += [((x - y)[:, 0], (x - y)[:, 1]) for x, y in zip(found, before, strict=True)]
        dq = kernel.finished_d_query(dq, scale=case.scale)
        dk, dv = (jnp.concatenate(parts, axis=1) for parts in zip(*grads, strict=True))
        return {"output": state.output, "lse": state.lse, "dq": dq, "dk": dk, "dv": dv}

    return run


def failures(case: Case, found: dict[str, np.ndarray]) -> list[str]:
    """The results that miss the precision budget, said in words; none if all is well."""
    data = arrays(case)
    visible = visible_pairs(
        data["q_positions"], data["k_positions"], data["q_segment_ids"], data["k_segment_ids"], is_causal=case.is_causal
    )
    attend = functools.partial(
        reference_attention, data["query"], data["key"], data["value"], visible,
        d_out=data["d_out"], d_lse=data["d_lse"], scale=case.scale,
    )  # fmt: skip
    exact, dense = attend(), attend(low_precision=jnp.dtype(case.dtype))
    result = []
    for name in ("output", "lse", "dq", "dk", "dv"):
        want = getattr(exact, name)
        miss, most = error(found[name], want), allowed(error(getattr(dense, name), want), case.dtype)
        if not miss <= most:
            result.append(f"{name}: error {miss:.2e}, allowed {most:.2e}")
    return result


# A block alone has the rounding errors of its weights, 2^-11 each, and less after averaging. Weights that are subnormal
# numbers, because they are relative to all that the rows see, make 1e-2 and more.
FLOAT16_SHARE_ERROR = 1e-3
_LATE = Case(dtype="float16", queries=64, keys=128, num_blocks=1, is_causal=False)
_SEEN = 15.0


def late_block_error(forward: Any) -> float:
    """Error of what a float16 block adds to a state that has already seen millions of keys, all with value 0."""
    data, alone = _late_block()
    state = AttentionState(jnp.zeros(data["query"].shape), jnp.full(alone.lse.shape, _SEEN))
    mask = _mask(_LATE, data, 0)
    found = forward(data["query"], data["key"], data["value"], state, mask, scale=_LATE.scale)
    share = 1 / (1 + np.exp(_SEEN - alone.lse))
    return error(np.asarray(found.output), alone.output * share.swapaxes(1, 2)[..., None])


def late_block_gradient_error(backward: Any) -> float:
    """Largest error of the gradients of a float16 block whose rows see millions of other keys too."""
    data, alone = _late_block()
    lse = np.logaddexp(alone.lse, _SEEN)
    delta = np.random.default_rng(1).standard_normal(lse.shape, np.float32)
    q, k, v, d_out = (np.asarray(data[name], np.float64) for name in ("query", "key", "value", "d_out"))
    weights = np.exp(np.einsum("btnh,bsnh->bnts", q, k) * _LATE.scale - lse[..., None])
    d_scores = weights * (np.einsum("btnh,bsnh->bnts", d_out, v) - delta[..., None]) * _LATE.scale
    exact = [np.einsum("bnts,bsnh->btnh", d_scores, k)]
    exact += [np.einsum("bnts,btnh->bsnh", x, y) for x, y in ((d_scores, q), (weights, d_out))]
    given = (data[name] for name in ("query", "key", "value", "d_out"))
    mask, dq = _mask(_LATE, data, 0), jnp.zeros(data["query"].shape)
    found = backward(*given, lse.astype(np.float32), delta, dq, None, mask, scale=_LATE.scale)
    return max(error(np.asarray(x), y) for x, y in zip((found.dq, found.dk, found.dv), exact, strict=True))


def _late_block() -> tuple[dict[str, Any], Any]:
    """Arrays of one block, and its attention alone in float64."""
    data = arrays(_LATE)
    visible = np.ones((1, _LATE.queries, _LATE.keys), bool)
    return data, reference_attention(data["query"], data["key"], data["value"], visible)


def _alone_or_several(blocks: list[Any]) -> Any:
    return blocks[0] if len(blocks) == 1 else tuple(blocks)


def _mask(case: Case, data: dict[str, Any], step: int) -> BlockMask:
    k_segment_ids, k_positions = data["k_segment_ids"], data["k_positions"]
    span, *more = case.steps[step]
    if more:
        groups = jnp.stack([folded([k_positions[x] for x in spans]) for spans in case.steps[1:]])
        if case.by_index:
            return BlockMask(data["q_positions"], groups, None, None, case.is_causal, jnp.int32(step - 1), case.is_even)
        return BlockMask(data["q_positions"], groups[step - 1], None, None, case.is_causal, is_even=case.is_even)
    if case.by_index:
        k_positions = k_positions.reshape(case.num_blocks, case.keys)
        block = jnp.int32(span.start // case.keys)
        return BlockMask(data["q_positions"], k_positions, None, None, case.is_causal, block, case.is_even)
    return BlockMask(
        data["q_positions"],
        data["k_positions"][span],
        data["q_segment_ids"],
        None if k_segment_ids is None else k_segment_ids[:, span],
        case.is_causal,
        is_even=case.is_even,
    )


def shapes(case: Case) -> dict[str, Any]:
    """`arrays` as shapes and dtypes only."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays(case))
