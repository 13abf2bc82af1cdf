"""Backward attention of one block on Hopper in two kernels, for bitwise repeatable gradients and for head dim 256.

`differentiate_keys` computes dK and dV of a tile of 64 keys: one compute warpgroup accumulates dV, the other dK, so
that even 256 columns fit in registers; both compute the scores (five products where four would do).
`differentiate_queries` computes dQ of a tile of 64 queries: the two warpgroups take turns at the key tiles, and their
sums are added in a fixed order at the end (three products). Every row of every gradient has one program that adds it
up in one order.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from .contract import BlockMask
from .mosaic_gpu_backward_block import Inputs
from .mosaic_gpu_masks import MaskInputs, Walk, pad_last
from .mosaic_gpu_primitives import (
    COLUMNS,
    ROWS,
    WARPGROUP_ROWS,
    Ref,
    accumulate,
    across_columns,
    across_rows,
    full,
    hidden_zero,
    matrix_scratch,
    scores,
    two_scores,
)
from .tiles import key_ranges, query_ranges

_LOG2_E = math.log2(math.e)
_STAGES = 2
_COMPUTE_WARPGROUPS = 2
_PRODUCER_REGISTERS, _COMPUTE_REGISTERS = 24, 240


@dataclasses.dataclass(frozen=True)
class _Block:
    """Shapes and static choices of both kernels."""

    column_tile: int
    num_keys: int
    group: int
    head_dim: int
    dtype: jnp.dtype
    is_causal: bool
    scale: float

    @classmethod
    def of(cls, query: jax.Array, key: jax.Array, mask: BlockMask, scale: float, column_tile: int) -> "_Block":
        group = query.shape[2] // key.shape[2]
        num_keys = mask.k_positions.shape[-1]
        return cls(column_tile, num_keys, group, query.shape[3], query.dtype, mask.is_causal, scale)

    def probabilities(self, products, lse):
        """What the scores of a tile become without a mask; `lse` is spread to the scores' shape."""
        return jnp.exp2(products * (self.scale * _LOG2_E) - lse * _LOG2_E)


class _Tiles(NamedTuple):
    """Shared memory and barriers of one program: `row_*` the tiles it owns, `column_*` those that pass by."""

    # The tiles of both kinds, or after the last step the gradients on their way out.
    tiles: Ref
    statistics: Ref
    row_ready: Ref
    column_ready: Ref
    column_free: Ref
    gradient_ready: Ref
    all_done: Ref

    @property
    def rows(self) -> Ref:
        return self.tiles[0][0]

    @property
    def columns(self) -> Ref:
        return self.tiles[0][1]

    @property
    def gradient(self) -> Ref:
        return self.tiles[1]

    @classmethod
    def scratch(cls, block: _Block, num_gradients: int, column_readers: int) -> dict:
        """`rows` and `columns` hold a pair each: queries and d_out, or keys and values."""
        rows = matrix_scratch((2, WARPGROUP_ROWS, block.head_dim), block.dtype)
        columns = matrix_scratch((_STAGES, 2, block.column_tile, block.head_dim), block.dtype)
        gradient = matrix_scratch((num_gradients, WARPGROUP_ROWS, block.head_dim), jnp.float32)
        return cls(
            tiles=plgpu.RefUnion((rows, columns), gradient),
            statistics=plgpu.SMEM((_STAGES, 2, block.column_tile), jnp.float32),
            row_ready=plgpu.Barrier(num_arrivals=2),
            column_ready=plgpu.Barrier(num_arrivals=4 if num_gradients == 2 else 2, num_barriers=_STAGES),
            column_free=plgpu.Barrier(num_arrivals=column_readers, num_barriers=_STAGES),
            gradient_ready=plgpu.Barrier(),
            all_done=plgpu.Barrier(num_arrivals=_COMPUTE_WARPGROUPS),
        )._asdict()


def _pass_by(scratch: _Tiles, steps, copy) -> None:
    """The producer's loop: `copy(step, slot)` for every step, when the slot's last readers have left it."""

    @pl.loop(0, steps)
    def _copy(step):
        slot = lax.rem(step, jnp.int32(_STAGES))
        pl.when(step >= _STAGES)(lambda: plgpu.barrier_wait(scratch.column_free.at[slot]))
        copy(step, slot)

    @pl.loop(0, jnp.minimum(_STAGES, steps))
    def _wait_for_last_readers(slot):
        plgpu.barrier_wait(scratch.column_free.at[slot])


def _kernel(body, name: str, inputs: Inputs, out_type, scratch: dict, grid: tuple[int, int, int]):
    """`body(inputs, outputs, scratch)` as a function of the leaves of `inputs` and of references updated in place."""
    leaves, treedef = jax.tree.flatten(inputs)

    def flat_body(*refs, **scratch_refs):
        given, outputs = refs[: len(leaves)], refs[len(leaves) :]
        body(jax.tree.unflatten(treedef, given), outputs, _Tiles(**scratch_refs))

    kernel = plgpu.kernel(
        flat_body,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("heads", "row_tiles", "batch"),
        num_threads=_COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    return lambda *refs: kernel(*leaves, *refs)


def differentiate_keys(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    mask: BlockMask,
    *,
    scale: float,
) -> tuple[Float32[Array, "B S K H"], Float32[Array, "B S K H"]]:
    """This block's dK and dV. T and S are multiples of 8 (beyond those of `mask`: padding), H of 32."""
    block = _Block.of(query, key, mask, scale, column_tile=64)
    masks = MaskInputs.of(mask, block.column_tile, WARPGROUP_ROWS)
    ranges = query_ranges(mask, block.column_tile, WARPGROUP_ROWS)
    inputs = Inputs(query, (key,), (value,), d_out, lse, delta, masks, ranges)

    def body(inputs, outputs, scratch):
        batch, kv_head, key_tile = (lax.axis_index(name) for name in ("batch", "heads", "row_tiles"))
        warpgroup = lax.axis_index("warpgroup")
        walk = Walk.read(inputs.ranges, inputs.mask, batch, key_tile)
        keys = pl.ds(key_tile * WARPGROUP_ROWS, WARPGROUP_ROWS)
        place = (batch, kv_head, keys, walk)

        @pl.when(warpgroup == _COMPUTE_WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            for index, source in enumerate((*inputs.keys, *inputs.values)):
                plgpu.copy_gmem_to_smem(source.at[batch, keys, kv_head], scratch.rows.at[index], scratch.row_ready)
            _copy_queries(block, inputs, scratch, place)

        for index, target in enumerate(outputs):

            @pl.when(warpgroup == index)
            def _compute(index=index, target=target):
                plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
                gradient = _accumulate_keys(block, inputs, scratch, place, is_key=index == 0)
                # The other warpgroup may still be reading the tiles that the gradients go out through.
                plgpu.barrier_arrive(scratch.all_done)
                plgpu.barrier_wait(scratch.all_done)
                scratch.gradient[index] = gradient * block.scale if index == 0 else gradient
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(scratch.gradient.at[index], target.at[batch, keys, kv_head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    gradient = jax.ShapeDtypeStruct(key.shape, jnp.float32)
    scratch = _Tiles.scratch(block, num_gradients=2, column_readers=_COMPUTE_WARPGROUPS)
    grid = (key.shape[2], -(-key.shape[1] // WARPGROUP_ROWS), key.shape[0])
    return _kernel(body, "ring_jax_attention_dkv", inputs, (gradient, gradient), scratch, grid)()


def _copy_queries(block: _Block, inputs: Ref, scratch: _Tiles, place: tuple) -> None:
    batch, kv_head, _, walk = place
    steps = jnp.maximum(walk.steps, 1)

    def copy(step, slot):
        head = kv_head * block.group + lax.div(step, steps)
        rows = pl.ds(walk.tile(lax.rem(step, steps)) * block.column_tile, block.column_tile)
        ready = scratch.column_ready.at[slot]
        for index, source in enumerate((inputs.query, inputs.d_out)):
            plgpu.copy_gmem_to_smem(source.at[batch, rows, head], scratch.columns.at[slot, index], ready)
        for index, source in enumerate((inputs.lse, inputs.delta)):
            plgpu.copy_gmem_to_smem(source.at[batch, head, rows], scratch.statistics.at[slot, index], ready)

    _pass_by(scratch, walk.steps * block.group, copy)


def _accumulate_keys(block: _Block, inputs: Ref, scratch: _Tiles, place: tuple, *, is_key: bool):
    """dK (without the scale) or dV of the program's keys, by one warpgroup."""
    batch, _, keys, walk = place
    shape = (WARPGROUP_ROWS, block.column_tile)

    def step_body(tile_step, head, acc, *, is_partial):
        slot = lax.rem(head * walk.steps + tile_step, jnp.int32(_STAGES))
        plgpu.barrier_wait(scratch.column_ready.at[slot])
        query, d_out = scratch.columns.at[slot, 0], scratch.columns.at[slot, 1]
        zero = hidden_zero()
        key, value = scratch.rows.at[zero], scratch.rows.at[zero + 1]

        def probabilities(products):
            lse = plgpu.load(scratch.statistics.at[slot, 0], layout=COLUMNS)
            result = block.probabilities(products, across_rows(lse, shape))
            if not is_partial:
                return result
            queries = pl.ds(walk.tile(tile_step) * block.column_tile, block.column_tile)
            visible = inputs.mask.visible(
                batch, queries, keys, is_causal=block.is_causal, num_keys=block.num_keys, keys_in_rows=True
            )
            return jnp.where(visible, result, 0.0)

        if is_key:
            probs, d_probs = two_scores(key, query, value, d_out, use=probabilities)
            delta = plgpu.load(scratch.statistics.at[slot, 1], layout=COLUMNS)
            weights, right = probs * (d_probs - across_rows(delta, shape)), query
        else:
            weights, right = probabilities(scores(key, query)), d_out
        acc = accumulate(acc, weights.astype(block.dtype), right)
        plgpu.barrier_arrive(scratch.column_free.at[slot])
        return acc

    def head_body(head, acc):
        acc = lax.fori_loop(0, walk.partial, lambda i, a: step_body(i, head, a, is_partial=True), acc)
        return lax.fori_loop(walk.partial, walk.steps, lambda i, a: step_body(i, head, a, is_partial=False), acc)

    plgpu.barrier_wait(scratch.row_ready)
    return lax.fori_loop(0, block.group, head_body, full((WARPGROUP_ROWS, block.head_dim), 0))


def differentiate_queries(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    dq: Float32[Array, "B T N H"],
    mask: BlockMask,
    *,
    scale: float,
) -> Float32[Array, "B T N H"]:
    """`dq` plus this block's share, in place. T and S are multiples of 8 (beyond those of `mask`: padding), H of 32."""
    block = _Block.of(query, key, mask, scale, column_tile=128 if query.shape[3] <= 128 else 64)
    masks = MaskInputs.of(mask, WARPGROUP_ROWS, block.column_tile)
    ranges = key_ranges(mask, WARPGROUP_ROWS, block.column_tile)
    lse, delta = (pad_last(x, WARPGROUP_ROWS) for x in (lse, delta))
    inputs = Inputs(query, (key,), (value,), d_out, lse, delta, masks, ranges)
    row_tiles = -(-query.shape[1] // WARPGROUP_ROWS)

    def body(inputs, outputs, scratch):
        (dq,) = outputs
        batch, head = lax.axis_index("batch"), lax.axis_index("heads")
        # The last rows have the most keys in a causal block: they go first, so that the short ones fill the gaps.
        row_tile = row_tiles - 1 - lax.axis_index("row_tiles")
        warpgroup = lax.axis_index("warpgroup")
        walk = Walk.read(inputs.ranges, inputs.mask, batch, row_tile)
        queries = pl.ds(row_tile * WARPGROUP_ROWS, WARPGROUP_ROWS)
        place = (batch, head, queries, walk)

        @pl.when(walk.steps > 0)
        def _():
            @pl.when(warpgroup == _COMPUTE_WARPGROUPS)
            def _produce():
                plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
                for index, source in enumerate((inputs.query, inputs.d_out)):
                    plgpu.copy_gmem_to_smem(source.at[batch, queries, head], scratch.rows.at[index], scratch.row_ready)
                _copy_keys(block, inputs, scratch, place)
                plgpu.copy_gmem_to_smem(dq.at[batch, queries, head], scratch.gradient.at[0], scratch.gradient_ready)

            @pl.when(warpgroup < _COMPUTE_WARPGROUPS)
            def _compute():
                plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
                gradient = _accumulate_queries(block, inputs, scratch, place, warpgroup) * block.scale
                plgpu.barrier_wait(scratch.gradient_ready)
                buffer = scratch.gradient.at[0]
                # The second warpgroup adds to what was there, then the first to that.
                pl.when(warpgroup == 1)(lambda: _add_to_smem(buffer, gradient))
                plgpu.barrier_arrive(scratch.all_done)
                plgpu.barrier_wait(scratch.all_done)

                @pl.when(warpgroup == 0)
                def _():
                    _add_to_smem(buffer, gradient)
                    plgpu.copy_smem_to_gmem(buffer, dq.at[batch, queries, head])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = _Tiles.scratch(block, num_gradients=1, column_readers=1)
    grid = (query.shape[2], row_tiles, query.shape[0])
    kernel = _kernel(body, "ring_jax_attention_dq", inputs, (), scratch, grid)
    (dq,) = pl.run_state(lambda refs: kernel(*refs))((dq,))
    return dq


def _add_to_smem(buffer: Ref, gradient: jax.Array) -> None:
    """Adds to a tile in shared memory, a few columns at a time to spare registers."""
    for first in range(0, buffer.shape[1], 32):
        part = buffer.at[:, pl.ds(first, 32)]
        old = plgpu.load(part, layout=plgpu.Layout.WGMMA)
        plgpu.commit_smem()  # Every thread has read its part of the old values before any writes the new ones.
        part[...] = old + gradient[:, first : first + 32]
    plgpu.commit_smem()


def _copy_keys(block: _Block, inputs: Ref, scratch: _Tiles, place: tuple) -> None:
    batch, head, _, walk = place
    kv_head = lax.div(head, jnp.int32(block.group))

    def copy(step, slot):
        rows = pl.ds(walk.tile(step) * block.column_tile, block.column_tile)
        for index, source in enumerate((*inputs.keys, *inputs.values)):
            target = scratch.columns.at[slot, index]
            plgpu.copy_gmem_to_smem(source.at[batch, rows, kv_head], target, scratch.column_ready.at[slot])

    _pass_by(scratch, walk.steps, copy)


def _accumulate_queries(block: _Block, inputs: Ref, scratch: _Tiles, place: tuple, warpgroup):
    """dQ (without the scale) of the program's queries from every second key tile."""
    batch, head, queries, walk = place
    shape = (WARPGROUP_ROWS, block.column_tile)
    lse, delta = (
        plgpu.load(x.at[batch, head, queries], layout=ROWS, optimized=False) for x in (inputs.lse, inputs.delta)
    )

    def step_body(turn, acc, *, is_partial):
        step = turn * _COMPUTE_WARPGROUPS + warpgroup
        slot = lax.rem(step, jnp.int32(_STAGES))
        plgpu.barrier_wait(scratch.column_ready.at[slot])
        key, value = scratch.columns.at[slot, 0], scratch.columns.at[slot, 1]
        zero = hidden_zero()
        query, d_out = scratch.rows.at[zero], scratch.rows.at[zero + 1]

        def probabilities(products):
            result = block.probabilities(products, across_columns(lse, shape))
            if not is_partial:
                return result
            keys = pl.ds(walk.tile(step) * block.column_tile, block.column_tile)
            visible = inputs.mask.visible(batch, queries, keys, is_causal=block.is_causal, num_keys=block.num_keys)
            return jnp.where(visible, result, 0.0)

        probs, d_probs = two_scores(query, key, d_out, value, use=probabilities)
        weights = probs * (d_probs - across_columns(delta, shape))
        acc = accumulate(acc, weights.astype(block.dtype), key)
        plgpu.barrier_arrive(scratch.column_free.at[slot])
        return acc

    def turns(steps):
        """How many of the first `steps` steps are this warpgroup's."""
        return lax.div(steps + _COMPUTE_WARPGROUPS - 1 - warpgroup, jnp.int32(_COMPUTE_WARPGROUPS))

    plgpu.barrier_wait(scratch.row_ready)
    acc = full((WARPGROUP_ROWS, block.head_dim), 0)
    acc = lax.fori_loop(0, turns(walk.partial), lambda i, a: step_body(i, a, is_partial=True), acc)
    return lax.fori_loop(turns(walk.partial), turns(walk.steps), lambda i, a: step_body(i, a, is_partial=False), acc)
