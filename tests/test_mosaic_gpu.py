"""The Mosaic GPU kernels in the interpreter, without a GPU: numbers, and races."""

import dataclasses
import functools
import heapq
import itertools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.kernels import (
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_gpu_choices,
    mosaic_gpu_deterministic,
    mosaic_gpu_forward,
    mosaic_gpu_inline,
    mosaic_gpu_queue,
    mosaic_gpu_split,
    xla,
)
from ring_jax.kernels.contract import AttentionState, BlockMask, Gradients
from ring_jax.kernels.several_blocks import SeveralAsOne
from ring_jax.kernels.tracing import TracedOnce
from ring_jax.layouts import shard_positions
from ring_jax.ring_steps import RingMasks
from tests.block_cases import Case, arrays, blocks, failures
from tests.budget import error

# Tiles are 128 or 192 queries and 64 or 128 keys: these have full, partial and empty tiles, tails or none,
# and every route through the kernels. One block is both first and last, and of three the middle one is merged in place;
# a program of the forward takes several query tiles in turn. The interpreter takes seconds for each.
CASES = [
    Case(queries=256, keys=256, heads=1, kv_heads=1, head_dim=64),
    Case(queries=192, keys=72, num_blocks=3, heads=2, kv_heads=1, head_dim=128),
    Case(queries=136, keys=136, num_blocks=1, heads=3, kv_heads=1, head_dim=128),
    Case(queries=256, keys=72, num_blocks=3, heads=2, kv_heads=2, head_dim=64, is_causal=False),
    Case(queries=72, keys=256, num_blocks=3, heads=2, kv_heads=1, head_dim=128, is_causal=False),
    Case(queries=72, keys=136, heads=1, kv_heads=1, head_dim=64, has_segments=True, batch=2),
    Case(dtype="float16", queries=99, keys=77, heads=1, kv_heads=1, head_dim=96, is_causal=False),
    Case(queries=64, keys=64, heads=1, kv_heads=1, head_dim=40, shuffled=True),
    Case(queries=128, keys=520, num_blocks=1, heads=1, kv_heads=1, head_dim=64, is_causal=False, rising=True),
    Case(queries=264, keys=256, num_blocks=3, heads=2, kv_heads=1, head_dim=128, at_once=2, is_even=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreter_agrees_with_the_oracle_without_races(case, capfd, monkeypatch):
    monkeypatch.setattr(mosaic_gpu_split, "MULTIPROCESSORS", 2)
    found = _interpreted(case, mosaic_gpu)
    assert failures(case, found) == []
    assert _races(capfd.readouterr().out) == []


@pytest.mark.parametrize(
    "case",
    [
        Case(queries=136, keys=200, heads=2, kv_heads=1, head_dim=32),
        Case(dtype="float16", queries=99, keys=77, heads=1, kv_heads=1, head_dim=64, has_segments=True),
        Case(queries=72, keys=72, heads=1, kv_heads=1, head_dim=256, shuffled=True),
    ],
    ids=str,
)
def test_two_pass_backward_agrees_with_the_oracle_without_races(case, capfd):
    found = _interpreted(case, mosaic_gpu_deterministic)
    assert failures(case, found) == []
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "case",
    [
        Case(queries=200, keys=384, num_blocks=1, heads=2, kv_heads=1, head_dim=128, is_causal=False),
        Case(queries=256, keys=256, heads=2, kv_heads=2, head_dim=64, is_causal=False, batch=2),
        Case(queries=200, keys=384, heads=1, kv_heads=1, head_dim=128, is_even=True),
        Case(queries=200, keys=384, heads=1, kv_heads=1, head_dim=128, is_even=True, by_index=True),
    ],
    ids=str,
)
def test_key_tiles_shared_by_programs_agree_with_the_oracle_without_races(case, capfd, monkeypatch):
    """Of 3 programs on 2 multiprocessors, and of 8 on 6, some are left over: the last tiles that are seen."""
    multiprocessors, left_over = (2, 1) if case.batch == 1 else (6, 2)
    monkeypatch.setattr(mosaic_gpu_split, "MULTIPROCESSORS", multiprocessors)
    shared = _watched_splits(monkeypatch)
    found = _interpreted(case, mosaic_gpu)
    assert set(shared) == {left_over}
    assert failures(case, found) == []
    assert _races(capfd.readouterr().out) == []


@pytest.mark.parametrize(
    ("case", "programs"),
    [
        (Case(queries=640, keys=512, num_blocks=1, heads=1, kv_heads=1, head_dim=128, is_causal=False), 4),
        (Case(queries=384, keys=300, num_blocks=3, heads=1, kv_heads=1, head_dim=128, is_causal=False), 5),
        (Case(queries=256, keys=256, heads=2, kv_heads=1, head_dim=128, is_causal=False, batch=2), 3),
        (Case(queries=384, keys=512, num_blocks=3, heads=1, kv_heads=1, head_dim=128, is_even=True, by_index=True), 5),
    ],
    ids=str,
)
def test_query_tiles_shared_by_programs_agree_with_the_oracle_without_races(case, programs, capfd, monkeypatch):
    """Fewer query tiles than programs, or some left over; a tile's steps are then cut into up to three ranges."""
    monkeypatch.setattr(mosaic_gpu_split, "MULTIPROCESSORS", programs)
    monkeypatch.setattr(mosaic_gpu_queue, "_SHARING_STEPS", -1)
    shared = _watched_ranges(monkeypatch)
    found = _interpreted(case, _FORWARD_ONLY)
    assert max(shared) > 0
    assert failures(case, found) == []
    assert _races(capfd.readouterr().out) == []


@pytest.mark.parametrize(
    ("rank", "hops", "query_tiles", "key_tiles"), [(2, (2, 3), 2, {0}), (3, (2, 3), 1, {2}), (2, (1, 2, 3), 2, set())]
)
def test_several_blocks_of_a_zigzag_ring_are_as_all_in_one(rank, hops, query_tiles, key_tiles, capfd, monkeypatch):
    """A late step of a ring of four. Every query of rank 3 sees half of the keys, and so many tiles are shared.

    Rank 2 has the blocks of ranks 0 and 3, and also of rank 1: the second half of its queries sees more of them than
    the first, and tiles of both lengths are shared. Of three blocks no key tile is left over to be shared.
    """
    monkeypatch.setattr(mosaic_gpu_split, "MULTIPROCESSORS", 3)
    monkeypatch.setattr(mosaic_gpu_queue, "_SHARING_STEPS", -1)
    ranges, splits = _watched_ranges(monkeypatch), _watched_splits(monkeypatch)
    length, scale = 256, 128**-0.5
    positions = functools.partial(shard_positions, "zigzag", shard_len=length, num_shards=4)
    *_, mask = RingMasks(4, rank, positions, True, is_even=True).of_steps(((0,), hops))
    rng = np.random.default_rng(rank)

    def draw(shape, dtype=jnp.float32) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    def draw_each(shape, dtype=jnp.float32) -> tuple[jax.Array, ...]:
        return tuple(draw(shape, dtype) for _ in hops)

    query, d_out = (draw((1, length, 2, 128), jnp.bfloat16) for _ in range(2))
    keys, values = (draw_each((1, length, 1, 128), jnp.bfloat16) for _ in range(2))
    state = AttentionState(draw(query.shape), draw((1, 2, length)))
    want = SeveralAsOne(_Kernel(xla.forward, _plain_backward, xla.finished_d_query))
    given = query, keys, values
    exact = want.forward(*given, state, mask.alone(), scale=scale)
    sums, dq = draw_each((1, 2, length, 1, 128)), jnp.zeros(query.shape, jnp.float32)
    gradients = d_out, exact.lse, draw(state.lse.shape), dq, sums, mask
    exact_gradients = want.backward(*given, *gradients, scale=scale)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = mosaic_gpu.forward(*given, state, mask, scale=scale)
        found_gradients = mosaic_gpu.backward(*given, *gradients, scale=scale)
        dq = mosaic_gpu.finished_d_query(found_gradients.dq, scale=scale)
    jax.effects_barrier()
    assert (set(ranges), set(splits)) == ({query_tiles}, key_tiles)
    results = (*found, dq, *found_gradients.sums), (*exact, exact_gradients.dq, *exact_gradients.sums)
    assert all(error(np.asarray(x), np.asarray(y)) < 0.01 for x, y in zip(*results, strict=True))
    assert _races(capfd.readouterr().out) == []


@dataclasses.dataclass(frozen=True, eq=False)
class _Kernel:
    """A kernel that equals no other: jax remembers what it traced by the kernel, and tests patch what kernels read."""

    forward: Any
    backward: Any
    finished_d_query: Any


def _interpreted(case: Case, kernel: Any) -> dict[str, np.ndarray]:
    """A case's results. As in a ring, of equal calls one is traced, and compiled for the interpreter."""
    once = TracedOnce(_Kernel(kernel.forward, kernel.backward, kernel.finished_d_query), can_index_blocks=True)
    with_limit = SimpleNamespace(
        forward=once.forward,
        backward=once.backward,
        finished_d_query=once.finished_d_query,
        MAX_FUSED_HEAD_DIM=getattr(kernel, "MAX_FUSED_HEAD_DIM", 0),
    )
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = jax.tree.map(np.asarray, blocks(case)(with_limit, arrays(case)))
    jax.effects_barrier()  # or else what watches a kernel may not have been called yet
    return found


def _plain_backward(*args: Any, **options: Any) -> Gradients:
    backward: Any = xla.backward
    return backward(*args[:-1], args[-1].alone(), **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_keys_beyond_the_end_give_no_gradient_where_all_scores_are_low(dtype):
    """Half of the key tile is padding: its zeros, not hidden, would have weights of exp(-lse), all infinite here."""
    length, head_dim = 64, 64
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(head_dim)
    direction *= (40 if dtype == "bfloat16" else 11) / np.linalg.norm(direction)
    shape = (1, length, 1, head_dim)
    noise = [rng.standard_normal(shape) for _ in range(4)]
    query, key = direction + 0.1 * noise[0], 0.1 * noise[1] - direction
    query, key, value, d_out = (jnp.asarray(x, dtype) for x in (query, key, *noise[2:]))
    positions = jnp.arange(length, dtype=jnp.int32)
    mask = BlockMask(positions, positions, None, None, is_causal=True)
    state = xla.forward(query, key, value, None, mask, scale=head_dim**-0.5, is_last=True)
    delta = jnp.einsum("btnh,btnh->bnt", *(x.astype(jnp.float32) for x in (d_out, state.output)))
    args = query, key, value, d_out, state.lse, delta, jnp.zeros(shape, jnp.float32), None, mask
    want = xla.backward(*args, scale=head_dim**-0.5, is_only=True)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found = mosaic_gpu.backward(*args, scale=head_dim**-0.5, is_only=True)
        found = found._replace(dq=mosaic_gpu.finished_d_query(found.dq, scale=head_dim**-0.5))
    assert state.lse.max() < -10
    for gradient, exact in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        largest = jnp.abs(exact).max()
        np.testing.assert_allclose(gradient / largest, exact / largest, atol=0.02)


# The interpreter takes its time where the backward is not what is tested.
_FORWARD_ONLY = SimpleNamespace(
    forward=mosaic_gpu.forward, backward=_plain_backward, finished_d_query=xla.finished_d_query
)


def _watched_ranges(monkeypatch) -> list[int]:
    """Of how many query tiles the steps will have been shared, in each block."""
    tiles: list[int] = []
    work_of = mosaic_gpu_queue.Queue.work

    def watched(queue, ranges):
        work = work_of(queue, ranges)
        if work is not None:
            jax.debug.callback(lambda left_over: tiles.append(int(left_over.max())), work.left_over)
        return work

    monkeypatch.setattr(mosaic_gpu_queue.Queue, "work", watched)
    return tiles


def _watched_splits(monkeypatch) -> list[int]:
    """Of how many key tiles the steps will have been shared, in each block, as if sharing took no time."""
    monkeypatch.setattr(mosaic_gpu_choices, "_BACKWARD_COSTS", mosaic_gpu_split.SplitCosts(program=0, sharing=0))
    tiles: list[int] = []
    numbers_of = mosaic_gpu_split.Splits.numbers

    def watched(splits, ranges):
        numbers = numbers_of(splits, ranges)
        jax.debug.callback(lambda shared: tiles.append(int(shared.max())), numbers.shared)
        return numbers

    monkeypatch.setattr(mosaic_gpu_split.Splits, "numbers", watched)
    return tiles


@pytest.mark.parametrize("kernel", [mosaic_gpu, mosaic_gpu_deterministic])
def test_a_block_named_among_several_is_as_if_alone(kernel):
    """The second block is seen by the later queries only, and both sides have a tail.

    Nothing is under `jit`: XLA would fuse, and so round, what is around the kernels as it likes in each of the two.
    """
    case = Case(queries=136, keys=136, num_blocks=2, heads=1, kv_heads=1, head_dim=64)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        alone, by_index = (
            blocks(dataclasses.replace(case, by_index=by_index))(kernel, arrays(case)) for by_index in (False, True)
        )
    for name, value in alone.items():
        np.testing.assert_array_equal(by_index[name], value, err_msg=name)


@pytest.mark.parametrize("is_causal", [False, True])
def test_programs_that_begin_apart_agree_with_the_oracle(is_causal, monkeypatch, capfd):
    """Three tiles of keys, of which each begins its full tiles of queries at another one."""
    monkeypatch.setattr(mosaic_gpu_choices, "MULTIPROCESSORS", 1)
    case = Case(queries=456, keys=328, num_blocks=1, heads=2, kv_heads=1, head_dim=128, is_causal=is_causal)
    found = _interpreted(case, mosaic_gpu)
    assert failures(case, found) == []
    assert _races(capfd.readouterr().out) == []


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "stretch_len", "stretches", "multiprocessors"),
    [(512, 328, 2, 128, 4, 1), (768, 384, 1, 256, 3, 2)],
    ids=["a cut off key tile", "a shared key tile"],
)
def test_programs_that_take_stretches_of_the_queries_agree_with_the_oracle(
    queries, keys, heads, stretch_len, stretches, multiprocessors, monkeypatch, capfd, taken_stretches
):
    """Of three tiles of keys the last is seen through the mask, or shared by programs that begin amid a stretch."""
    monkeypatch.setattr(mosaic_gpu_split, "MULTIPROCESSORS", multiprocessors)
    monkeypatch.setattr(mosaic_gpu_choices, "_STRETCH_LEN", stretch_len)
    monkeypatch.setattr(mosaic_gpu_choices, "_STEPS_FOR_STRETCHES", 1)
    shared = _watched_splits(monkeypatch)
    case = Case(queries=queries, keys=keys, num_blocks=1, heads=heads, kv_heads=1, head_dim=128, is_causal=False)
    found = _interpreted(case, mosaic_gpu)
    assert set(taken_stretches) == {stretches}
    assert set(shared) == ({1} if multiprocessors == 2 else set())
    assert failures(case, found) == []
    assert _races(capfd.readouterr().out) == []


@pytest.mark.parametrize(
    ("num_steps", "num_queries", "is_causal", "has_segments", "head_dim", "stretches"),
    [
        (4096, 65536, False, False, 128, 32),
        (4096, 65536, False, False, 64, 1),
        (4096, 65544, False, False, 128, 1),
        (4095, 65536, False, False, 128, 1),
        (4096, 65536, True, False, 128, 1),
        (4096, 65536, False, True, 128, 1),
    ],
)
def test_only_many_steps_without_a_mask_are_taken_by_stretches(
    num_steps, num_queries, is_causal, has_segments, head_dim, stretches
):
    positions = jnp.arange(8, dtype=jnp.int32)
    ids = positions[None] if has_segments else None
    mask = BlockMask(positions, positions, ids, ids, is_causal=is_causal)
    config = mosaic_gpu_choices.default_backward_config(head_dim)
    assert mosaic_gpu_choices.backward_stretches(mask, num_steps, num_queries, config) == stretches


@pytest.mark.parametrize("head_dim", [64, 128])
def test_pieces_of_dq_are_put_where_the_kernel_computed_them(head_dim):
    """Of two sequences and three heads, each piece of 64 queries and 64 columns by itself."""
    want = np.random.default_rng(0).normal(size=(2, 256, 3, head_dim)).astype(np.float32)
    pieces = np.zeros((2, 3, 4, head_dim // 64, *mosaic_gpu_inline.PIECE_AS_IT_LIES), np.float32)
    for batch, head, rows, columns in itertools.product(*map(range, pieces.shape[:4])):
        piece = want[batch, 64 * rows :, head, 64 * columns :][:64, :64]
        pieces[batch, head, rows, columns] = mosaic_gpu_inline.as_it_lies(jnp.asarray(piece))
    found = mosaic_gpu_backward.in_order(jnp.asarray(pieces.reshape(want.shape)), scale=2.0)
    np.testing.assert_array_equal(found, 2 * want)


def test_a_thread_holds_four_numbers_of_eight_columns():
    """Thread 37, of warp 1, has rows 17 and 25 and, of every eight columns, the third and fourth."""
    row, column = np.indices((64, 64))
    numbers = mosaic_gpu_inline.as_it_lies(jnp.asarray(64.0 * row + column)).reshape(8, 128, 4)
    for group in range(8):
        want = [64 * r + 8 * group + c for r in (17, 25) for c in (2, 3)]
        np.testing.assert_array_equal(numbers[group, 37], want)


def test_backward_with_some_heads_together_agrees_with_the_oracle(monkeypatch, capfd):
    """Two groups of two heads, and two tiles of keys, of which the last is not full."""
    monkeypatch.setattr(mosaic_gpu_choices, "MULTIPROCESSORS", 3)
    monkeypatch.setattr(mosaic_gpu_choices, "_ENOUGH_TOGETHER", 1)
    case = Case(queries=136, keys=136, num_blocks=1, heads=4, kv_heads=4, head_dim=128, is_causal=True)
    found = _interpreted(case, mosaic_gpu)
    assert failures(case, found) == []
    assert _races(capfd.readouterr().out) == []


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("key_tiles", "kv_heads", "batch", "together"),
    [(64, 16, 1, 4), (64, 8, 1, 4), (64, 4, 1, 4), (128, 8, 1, 1), (64, 16, 2, 1), (512, 1, 1, 1), (32, 6, 1, 6)],
)
def test_the_last_heads_have_enough_programs_for_all_multiprocessors(key_tiles, kv_heads, batch, together, head_dim):
    """Else the longest of them, which are twice as long as the average, end after everything else."""
    positions = jnp.arange(8, dtype=jnp.int32)
    mask = BlockMask(positions, positions, None, None, is_causal=True)
    config = mosaic_gpu_choices.default_backward_config(head_dim)
    dims = list(mosaic_gpu_choices.backward_grid(mask, kv_heads, key_tiles, batch, config).items())
    together = together if head_dim == 128 or together == 1 else kv_heads
    slower = dict(dims[: [name for name, _ in dims].index("key_tiles")])
    assert kv_heads // math.prod(slower.values()) == together
    assert math.prod(size for _, size in dims) == kv_heads * key_tiles * batch
    assert _end(kv_heads, key_tiles, batch, together) < 1.03 or together == kv_heads


def _end(kv_heads: int, key_tiles: int, batch: int, together: int) -> float:
    """When the last program of a causal block ends, over when it would if all multiprocessors ended together."""
    free = [0] * mosaic_gpu_choices.MULTIPROCESSORS
    for _ in range(kv_heads // together):
        for tile in range(key_tiles):
            for _ in range(together * batch):
                heapq.heapreplace(free, free[0] + key_tiles - tile)
    return max(free) / (sum(free) / len(free))


@pytest.mark.parametrize("heads_together", [1, 3])
def test_forward_with_few_heads_at_a_time_agrees_with_the_oracle(heads_together, monkeypatch, capfd):
    """The heads of both sequences, on fewer programs than there are tiles, and a last tile that is not full."""
    monkeypatch.setattr(mosaic_gpu_split, "MULTIPROCESSORS", 5)
    monkeypatch.setattr(mosaic_gpu_forward, "forward_heads_together", lambda *_args: heads_together)
    case = Case(queries=328, keys=200, num_blocks=2, heads=3, kv_heads=3, head_dim=128, batch=2)
    found = _interpreted(case, _FORWARD_ONLY)
    assert failures(case, found) == []
    assert _races(capfd.readouterr().out) == []


def _races(log: str) -> list[str]:
    """The races in the interpreter's log, without those that it cannot know not to be any.

    It has no copy engine that adds, for which a plain addition stands, and no semaphores, by which the program that
    adds up what others have left knows that they have: it runs the others before.
    """
    races = [report.split("\n\n")[0] for report in log.split("RACE DETECTED")[1:]]
    races = [race for race in races if race.count("(add_to_gmem.") != 2]
    races = [race for race in races if not ("(_Attention.leave" in race and "(_Attention.merge" in race)]
    return [race for race in races if race.count("(_Worker.leave") != 2]
