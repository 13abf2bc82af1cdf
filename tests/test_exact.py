"""Ring attention is exact: output, logsumexp and gradients against the float64 oracle, within `budget.py`'s budget.

The whole product of layout, shards and causal is run, and the other factors are dealt over those runs so that every
pair of values of any two factors meets at least once.
"""

import collections
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, PartitionSpec

from benchmarks.cases import DTYPES, HEAD_DIMS, HEADS, SEGMENTS, SHARDS, Case, Inputs, make_inputs
from ring_jax import LAYOUTS, layout_positions, ring, ring_attention, ring_attention_shard, ring_steps
from ring_jax.kernels import BlockMask
from ring_jax.kernels.reference import ReferenceResult, reference_attention, visible_pairs
from tests.budget import assert_does_not_grow, assert_within_budget, error

Results = dict[str, jax.Array]

# Tokens: shards of whole tiles, of tiles and a rest, and of less than one tile of the portable kernel.
SEQ_LENS = (96, 192, 240)
SCALES = (None, 0.3)

PRODUCT = {"layout": LAYOUTS, "shards": SHARDS, "is_causal": (True, False)}
OTHERS = {
    "heads": tuple(HEADS),
    "segments": SEGMENTS,
    "dtype": tuple(DTYPES),
    "head_dim": HEAD_DIMS,
    "seq_len": SEQ_LENS,
    "scale": SCALES,
}


class Configuration(NamedTuple):
    """One run: a value of every factor of PRODUCT and OTHERS, in that order."""

    layout: str
    shards: int
    is_causal: bool
    heads: str
    segments: str
    dtype: str
    head_dim: int
    seq_len: int
    scale: float | None

    @property
    def case(self) -> Case:
        num_heads, num_kv_heads = HEADS[self.heads]
        return Case(2, self.seq_len, num_heads, num_kv_heads, self.head_dim, self.dtype, self.is_causal, self.segments)

    def __str__(self) -> str:
        return "-".join(str(value) for value in self)


def _pairs(values: tuple) -> set[tuple]:
    """Every two factors of a run with their values."""
    return set(itertools.combinations(enumerate(values), 2))


def _covering_runs() -> list[Configuration]:
    """The product of PRODUCT, each run with those OTHERS that add most new pairs; then more runs until no pair lacks.

    Among equals the values win whose pairs were used least.
    """
    every_factor = (*PRODUCT.values(), *OTHERS.values())
    missing = {
        ((i, a), (j, b))
        for (i, first), (j, second) in itertools.combinations(enumerate(every_factor), 2)
        for a, b in itertools.product(first, second)
    }
    fixed = list(itertools.product(*PRODUCT.values()))
    runs: list[Configuration] = []
    uses = collections.Counter()

    def gain(run: tuple) -> tuple[int, int]:
        pairs = _pairs(run)
        return len(pairs & missing), -sum(uses[pair] for pair in pairs)

    while fixed or missing:
        start: tuple = fixed.pop(0) if fixed else next(iter(sorted(missing, key=repr)))
        if isinstance(start[0], tuple):
            wanted = dict(start)
            start = tuple(wanted.get(i, values[0]) for i, values in enumerate(PRODUCT.values()))
        rest = itertools.product(*OTHERS.values())
        best = max(((*start, *values) for values in rest), key=gain)
        missing -= _pairs(best)
        uses.update(_pairs(best))
        runs.append(Configuration._make(best))
    return runs


RUNS = _covering_runs()


def test_runs_cover_the_product_and_every_pair():
    assert {run[: len(PRODUCT)] for run in RUNS} == set(itertools.product(*PRODUCT.values()))
    seen = set().union(*(_pairs(run) for run in RUNS))
    factors = (*PRODUCT.values(), *OTHERS.values())
    for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
        for a, b in itertools.product(first, second):
            assert ((i, a), (j, b)) in seen


def seq_mesh(shards: int) -> Mesh:
    return jax.make_mesh((shards,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:shards])


@functools.partial(jax.jit, static_argnames=("layout", "shards", "is_causal", "scale"))
def _attend(inputs: Any, *, layout: str, shards: int, is_causal: bool, scale: float | None) -> Results:
    """Output, logsumexp and gradients in natural order from inputs in natural order."""
    order = layout_positions(layout, inputs.query.shape[1], shards)
    undo = jnp.argsort(order)
    query, key, value, d_out = (x[:, order] for x in inputs[:4])
    segment_ids = None if inputs.segment_ids is None else inputs.segment_ids[:, order]
    (output, lse), vjp = jax.vjp(
        lambda q, k, v: ring_attention(
            q,
            k,
            v,
            is_causal=is_causal,
            scale=scale,
            segment_ids=segment_ids,
            layout=layout,
            mesh=seq_mesh(shards),
            return_lse=True,
        ),
        query,
        key,
        value,
    )
    dq, dk, dv = vjp((d_out, inputs.d_lse[:, :, order]))
    return {"output": output[:, undo], "lse": lse[:, :, undo], "dq": dq[:, undo], "dk": dk[:, undo], "dv": dv[:, undo]}


def _oracle(
    inputs: Inputs, is_causal: bool, scale: float | None, positions: np.ndarray | None = None
) -> tuple[ReferenceResult, ReferenceResult]:
    """The truth in float64, and dense attention in one piece in the inputs' precision."""
    positions = np.arange(inputs.query.shape[1]) if positions is None else positions
    visible = visible_pairs(positions, positions, inputs.segment_ids, inputs.segment_ids, is_causal=is_causal)
    attend = functools.partial(
        reference_attention, *inputs[:3], visible, d_out=inputs.d_out, d_lse=inputs.d_lse, scale=scale
    )
    return attend(), attend(low_precision=inputs.query.dtype)


def _assert_exact(results: Results, inputs: Inputs, exact: ReferenceResult, baseline: ReferenceResult) -> None:
    for name, got in results.items():
        dtype = _dtype_of(name, inputs)
        assert got.dtype == dtype, name
        assert_within_budget(np.asarray(got), getattr(exact, name), getattr(baseline, name), dtype, name)


def _dtype_of(result: str, inputs: Inputs) -> str:
    return "float32" if result == "lse" else inputs.query.dtype.name


def _assert_same_bits(first: Results, second: Results) -> None:
    for name in first:
        assert np.asarray(first[name]).tobytes() == np.asarray(second[name]).tobytes(), name


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_equals_the_oracle_and_itself(run: Configuration):
    shard_len = run.seq_len // run.shards
    shard_of_token = np.argsort(layout_positions(run.layout, run.seq_len, run.shards)) // shard_len
    inputs = make_inputs(run.case, seed=RUNS.index(run), shard_of_token=shard_of_token)
    attend = functools.partial(
        _attend, inputs, layout=run.layout, shards=run.shards, is_causal=run.is_causal, scale=run.scale
    )
    results = attend()
    _assert_exact(results, inputs, *_oracle(inputs, run.is_causal, run.scale))
    _assert_same_bits(results, attend())


def test_rows_without_keys_are_zero():
    case = dataclasses.replace(RUNS[0].case, segments="empty", dtype="float32")
    shards = 4
    shard_of_token = np.arange(case.seq_len) // (case.seq_len // shards)
    inputs = make_inputs(case, shard_of_token=shard_of_token)
    assert inputs.segment_ids is not None
    padding = inputs.segment_ids == 0
    assert padding[-1].all()
    assert padding[:, shard_of_token == 1].all()
    assert not padding[0, shard_of_token != 1].all()
    assert padding[0, shard_of_token != 1].any()
    results = _attend(inputs, layout="contiguous", shards=shards, is_causal=True, scale=None)
    assert (np.asarray(results["lse"]).swapaxes(1, 2)[padding] == -np.inf).all()
    for name in ("output", "dq", "dk", "dv"):
        assert (np.asarray(results[name])[padding] == 0).all(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_does_not_grow_with_shards(dtype: str):
    inputs = make_inputs(Case(2, 384, 4, 2, 64, dtype), seed=7)
    exact, baseline = _oracle(inputs, True, None)
    errors = []
    for shards in (1, 8):
        results = _attend(inputs, layout="zigzag", shards=shards, is_causal=True, scale=None)
        _assert_exact(results, inputs, exact, baseline)
        errors.append({name: error(np.asarray(x), getattr(exact, name)) for name, x in results.items()})
    one, many = errors
    for name in one:
        assert_does_not_grow(many[name], one[name], _dtype_of(name, inputs), name)


def test_large_scores_neither_overflow_nor_drift():
    inputs = make_inputs(Case(2, 96, 4, 4, 64, "float32", is_causal=False), seed=3)
    inputs = inputs._replace(query=inputs.query * np.float32(100))
    exact, baseline = _oracle(inputs, False, None)
    assert np.abs(exact.lse).max() > 200  # exp of which no float32 holds
    _assert_exact(_attend(inputs, layout="contiguous", shards=4, is_causal=False, scale=None), inputs, exact, baseline)


@functools.partial(jax.jit, static_argnames=("shards", "is_causal"))
def _attend_anywhere(inputs: Inputs, positions: jax.Array, *, shards: int, is_causal: bool) -> Results:
    """`ring_attention_shard` on tokens at any positions: no layout's order, maybe not even distinct."""
    array, tokens = PartitionSpec(None, "seq"), PartitionSpec("seq")

    def shard(query, key, value, segment_ids, positions):
        return ring_attention_shard(
            query,
            key,
            value,
            axis_name="seq",
            positions=positions,
            segment_ids=segment_ids,
            is_causal=is_causal,
        )

    attend = jax.shard_map(shard, mesh=seq_mesh(shards), in_specs=(array,) * 4 + (tokens,), out_specs=array)
    output, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, inputs.segment_ids, positions), *inputs[:3])
    dq, dk, dv = vjp(inputs.d_out)
    return {"output": output, "dq": dq, "dk": dk, "dv": dv}


def _assert_exact_anywhere(inputs: Inputs, positions: np.ndarray, shards: int, is_causal: bool) -> None:
    inputs = inputs._replace(d_lse=np.zeros_like(inputs.d_lse))
    results = _attend_anywhere(inputs, jnp.asarray(positions, jnp.int32), shards=shards, is_causal=is_causal)
    _assert_exact(results, inputs, *_oracle(inputs, is_causal, None, positions))


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_positions_and_segments(data):
    """Positions in any order, with repeats; documents that come and go; padding anywhere. One compiled program."""
    length, small = 72, st.integers(0, 2**31 - 1)
    rng = np.random.default_rng(data.draw(small))
    spread = data.draw(st.sampled_from((1, 5, 72, 10**9)))
    positions = rng.integers(0, spread, length)
    num_documents, run_length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, length))
    runs = rng.integers(0, num_documents + 1, (2, length))
    ids = np.repeat(runs, run_length, axis=1)[:, :length].astype(np.int32)
    inputs = make_inputs(Case(2, length, 4, 2, 8, "float32"), seed=data.draw(small))._replace(segment_ids=ids)
    _assert_exact_anywhere(inputs, positions, shards=3, is_causal=True)


@settings(max_examples=6, derandomize=True, deadline=None, database=None, phases=(Phase.generate,))
@given(data=st.data())
def test_any_shape(data):
    """Shapes that no one chose: odd shard lengths, one token a shard, odd head dims and head counts."""
    shards = data.draw(st.sampled_from((1, 2, 3, 4)))
    num_kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    case = Case(
        batch=data.draw(st.integers(1, 3)),
        seq_len=shards * data.draw(st.integers(1, 45)),
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=data.draw(st.integers(1, 33)),
        dtype=data.draw(st.sampled_from(tuple(DTYPES))),
        is_causal=data.draw(st.booleans()),
        segments="none",
    )
    assume(case.seq_len > 1)  # with a single key the true dQ and dK are 0, and no error is relative to them
    inputs = make_inputs(case, seed=data.draw(st.integers(0, 2**31 - 1)))
    ids = np.ones((case.batch, case.seq_len), np.int32)
    _assert_exact_anywhere(inputs._replace(segment_ids=ids), np.arange(case.seq_len), shards, case.is_causal)


@pytest.mark.parametrize("in_place", [False, True])
def test_ring_too_long_to_write_out_is_the_same(monkeypatch, in_place):
    """Long rings are a loop of two hops a turn, here over six steps forward and five or six backward: the same bits.

    Backward, where kernels add in place, it is six hops a turn.
    """
    shards = 8 if in_place else 7
    monkeypatch.setattr(ring.kernels, "has_fused_backward", lambda *_: in_place)
    jax.clear_caches()
    inputs = make_inputs(Case(2, 10 * shards, 2, 1, 8, "float32", segments="packed"), seed=shards)
    arguments = inputs, jnp.arange(10 * shards, dtype=jnp.int32)
    written_out = _attend_anywhere.trace(*arguments, shards=shards, is_causal=True)
    jax.clear_caches()
    monkeypatch.setattr(ring_steps, "MAX_UNROLLED_STEPS", 2)
    looped = _attend_anywhere.trace(*arguments, shards=shards, is_causal=True)
    jax.clear_caches()
    assert str(looped.jaxpr).count("ppermute") < str(written_out.jaxpr).count("ppermute")
    first, second = (program.lower().compile()(*arguments) for program in (written_out, looped))
    _assert_same_bits(first, second)


@pytest.mark.parametrize(
    ("shards", "is_causal", "forward", "backward"),
    [
        (4, True, ((0,), (1, 2, 3)), ((0,), (1,), (2, 3))),
        (5, True, ((0,), (1, 2, 3, 4)), None),
        (8, True, ((0,), (1, 2, 3, 4), (5, 6, 7)), ((0,), (1,), (2, 3), (4, 5), (6, 7))),
        (6, False, ((0,), (1, 2, 3, 4), (5,)), ((0,), (1,), (2, 3), (4, 5))),
    ],
)
def test_ring_whose_steps_take_several_blocks_is_exact(monkeypatch, shards, is_causal, forward, backward):
    """Of most ranks some step takes blocks that half of the queries see, and blocks that all see."""
    inputs = make_inputs(Case(2, 8 * shards, 4, 2, 8, "float32", is_causal), seed=1)
    taken, of_steps = [], ring_steps.RingMasks.of_steps
    monkeypatch.setattr(ring.kernels, "has_fused_backward", lambda *_: True)
    monkeypatch.setattr(ring.kernels, "prefers_several_blocks", lambda *_: True)
    monkeypatch.setattr(ring_steps, "_TOKENS_PER_HOP", 1)
    monkeypatch.setattr(
        ring_steps.RingMasks, "of_steps", lambda ring, steps: taken.append(steps) or of_steps(ring, steps)
    )
    jax.clear_caches()
    layout = "zigzag" if is_causal else "contiguous"
    traced = _attend.trace(inputs, layout=layout, shards=shards, is_causal=is_causal, scale=None)
    jax.clear_caches()
    assert set(taken) == {forward, backward} - {None}
    _assert_exact(traced.lower().compile()(inputs), inputs, *_oracle(inputs, is_causal, None))


@pytest.mark.parametrize("is_causal", [True, False])
def test_ring_that_leaves_half_of_its_own_block_for_last_is_exact(monkeypatch, is_causal):
    """What rings do whose backward kernel is fused, so that something hides the last hop of dK and dV."""
    inputs = make_inputs(Case(2, 40 * 3, 4, 2, 8, "float32", is_causal, segments="packed"), seed=1)
    halves, without = [], BlockMask.without
    monkeypatch.setattr(ring.kernels, "has_fused_backward", lambda *_: True)
    monkeypatch.setattr(BlockMask, "without", lambda mask, hidden: halves.append(hidden) or without(mask, hidden))
    jax.clear_caches()
    traced = _attend.trace(inputs, layout="zigzag", shards=3, is_causal=is_causal, scale=None)
    jax.clear_caches()
    assert len(halves) == 2
    _assert_exact(traced.lower().compile()(inputs), inputs, *_oracle(inputs, is_causal, None))
