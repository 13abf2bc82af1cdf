"""Backward attention of one block on Hopper, in Pallas Mosaic GPU: five matrix products in one kernel.

A program owns a tile of keys. Each of its two compute warpgroups holds 64 of them and, for every query tile that sees
them, computes the transposed probabilities and their gradient, accumulates dV and dK in registers, and leaves the
score gradients in shared memory. One step later, when both warpgroups' score gradients are there, each computes half
of the columns of dQ and has the copy engine add them to the float32 array in global memory (as FlashAttention-3 does,
arXiv:2407.08608). Being a step behind keeps the warpgroups from waiting for each other. A third warpgroup copies tiles.
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

from .contract import BlockMask, Gradients
from .mosaic_gpu_masks import MaskInputs, Walk
from .mosaic_gpu_primitives import (
    COLUMNS,
    WARPGROUP_ROWS,
    accumulate_two_beside,
    across_rows,
    add_to_gmem,
    full,
    hidden_zero,
    matrix_scratch,
    sum_of_products,
    two_scores,
)
from .tiles import TileRanges, query_ranges

_LOG2_E = math.log2(math.e)
_COMPUTE_WARPGROUPS = 2
_PRODUCER_REGISTERS, _COMPUTE_REGISTERS = 24, 240


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Tile sizes of the backward kernel: `q_tile` queries per step, `stages` of them in shared memory."""

    q_tile: int = 64
    stages: int = 2

    def __post_init__(self):
        if self.q_tile not in (64, 128):
            raise ValueError(f"q_tile must be 64 or 128, got {self.q_tile}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")

    @property
    def k_tile(self) -> int:
        return _COMPUTE_WARPGROUPS * WARPGROUP_ROWS


class BackwardInputs(NamedTuple):
    """Arrays (outside) or references (inside) that the kernel reads."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    d_out: Float[Array, "B T N H"]
    lse: Float32[Array, "B N T"]
    delta: Float32[Array, "B N T"]
    mask: MaskInputs
    ranges: TileRanges


class _Scratch(NamedTuple):
    """Shared memory and barriers of one program. `*_ready` count a copy's arrival, `*_free` the readers' leaving."""

    key: jax.Array
    value: jax.Array
    # The query-side tiles, or after the last step the gradients on their way out.
    tiles: jax.Array
    statistics: jax.Array
    d_scores: jax.Array
    d_query: jax.Array
    key_ready: jax.Array
    query_ready: jax.Array
    d_out_ready: jax.Array
    tiles_free: jax.Array
    d_scores_ready: jax.Array
    d_scores_free: jax.Array
    all_done: jax.Array

    @property
    def query(self):
        return self.tiles[0][0]

    @property
    def d_out(self):
        return self.tiles[0][1]

    @property
    def gradient(self):
        return self.tiles[1]


@dataclasses.dataclass(frozen=True)
class _Program:
    """What one program of the grid computes: shapes and static choices, and the code of its warpgroups."""

    config: BackwardConfig
    num_queries: int
    num_keys: int
    group: int
    head_dim: int
    dtype: jnp.dtype
    is_causal: bool
    scale: float

    @property
    def d_query_part(self) -> tuple[int, int]:
        """Rows and columns of dQ that one warpgroup computes in a step."""
        if self.config.q_tile == WARPGROUP_ROWS:
            return self.config.q_tile, self.head_dim // _COMPUTE_WARPGROUPS
        return self.config.q_tile // _COMPUTE_WARPGROUPS, self.head_dim

    def run(self, inputs: BackwardInputs, dq, dk, dv, scratch: _Scratch) -> None:
        warpgroup = lax.axis_index("warpgroup")
        batch, kv_head, key_tile = (lax.axis_index(name) for name in ("batch", "kv_heads", "key_tiles"))
        walk = Walk.read(inputs.ranges, batch, key_tile)
        place = _Place(batch, kv_head, key_tile, walk)

        @pl.when(warpgroup == _COMPUTE_WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            self._produce(inputs, scratch, place)

        @pl.when(warpgroup < _COMPUTE_WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            self._compute(inputs, dq, dk, dv, scratch, place, warpgroup)

    def _slot(self, step):
        return lax.rem(step, jnp.int32(self.config.stages))

    def _queries(self, place: "_Place", step) -> tuple[jax.Array, jax.Array]:
        """Query head and first query of a step; the group's heads come one after the other."""
        steps = jnp.maximum(place.walk.steps, 1)
        tile = place.walk.tile(lax.rem(step, steps))
        return place.kv_head * self.group + lax.div(step, steps), tile * self.config.q_tile

    def _produce(self, inputs: BackwardInputs, scratch: _Scratch, place: "_Place") -> None:
        config = self.config

        def copy_tiles(step, slot):
            head, first = self._queries(place, step)
            rows, ready = pl.ds(first, config.q_tile), scratch.query_ready.at[slot]
            plgpu.copy_gmem_to_smem(inputs.query.at[place.batch, rows, head], scratch.query.at[slot], ready)
            plgpu.copy_gmem_to_smem(inputs.lse.at[place.batch, head, rows], scratch.statistics.at[slot, 0], ready)
            ready = scratch.d_out_ready.at[slot]
            plgpu.copy_gmem_to_smem(inputs.d_out.at[place.batch, rows, head], scratch.d_out.at[slot], ready)
            plgpu.copy_gmem_to_smem(inputs.delta.at[place.batch, head, rows], scratch.statistics.at[slot, 1], ready)

        for warpgroup in range(_COMPUTE_WARPGROUPS):
            rows, ready = place.key_rows(warpgroup), scratch.key_ready.at[warpgroup]
            for source, target in ((inputs.key, scratch.key), (inputs.value, scratch.value)):
                plgpu.copy_gmem_to_smem(source.at[place.batch, rows, place.kv_head], target.at[warpgroup], ready)

        steps = place.walk.steps * self.group

        @pl.loop(0, steps)
        def _copy_tiles(step):
            slot = self._slot(step)
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(scratch.tiles_free.at[slot]))
            copy_tiles(step, slot)

        @pl.loop(0, jnp.minimum(config.stages, steps))
        def _wait_for_last_readers(slot):
            plgpu.barrier_wait(scratch.tiles_free.at[slot])

    def _compute(self, inputs: BackwardInputs, dq, dk, dv, scratch: _Scratch, place: "_Place", warpgroup) -> None:
        config, walk = self.config, place.walk
        keys = place.key_rows(warpgroup)
        shape = (WARPGROUP_ROWS, config.q_tile)
        # This warpgroup's half of dQ: of the rows if each half is a whole product's worth of rows, else of the columns.
        num_rows, num_columns = self.d_query_part
        first_row = 0 if num_rows == config.q_tile else warpgroup * num_rows
        columns = pl.ds(0 if num_columns == self.head_dim else warpgroup * num_columns, num_columns)

        def d_query_factors(slot):
            both, rows = range(_COMPUTE_WARPGROUPS), pl.ds(first_row, num_rows)
            lefts = [scratch.d_scores.at[slot, w, :, rows] for w in both]
            zero = hidden_zero()
            return lefts, [scratch.key.at[w + zero, :, columns] for w in both]

        def add_d_query(step, product):
            """Sends off this warpgroup's half of the dQ of a step."""
            buffer = scratch.d_query.at[warpgroup]
            head, first = self._queries(place, step)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            buffer[...] = product * self.scale
            plgpu.commit_smem()
            add_to_gmem(buffer, dq, (place.batch, head, columns), first + first_row, self.num_queries)

        def step_body(tile_step, head, carry, *, is_partial):
            dk, dv = carry
            step = head * walk.steps + tile_step
            slot, last_slot = self._slot(step), self._slot(step + config.stages - 1)
            plgpu.barrier_wait(scratch.query_ready.at[slot])
            plgpu.barrier_wait(scratch.d_out_ready.at[slot])

            own = warpgroup + hidden_zero()
            key, value = scratch.key.at[own], scratch.value.at[own]

            def probabilities(products):
                lse = plgpu.load(scratch.statistics.at[slot, 0], layout=COLUMNS) * _LOG2_E
                result = jnp.exp2(products * (self.scale * _LOG2_E) - across_rows(lse, shape))
                if not is_partial:
                    return result
                queries = pl.ds(walk.tile(tile_step) * config.q_tile, config.q_tile)
                visible = inputs.mask.visible(
                    place.batch, queries, keys, is_causal=self.is_causal, num_keys=self.num_keys, keys_in_rows=True
                )
                return jnp.where(visible, result, 0.0)

            probs, d_probs = two_scores(key, scratch.query.at[slot], value, scratch.d_out.at[slot], use=probabilities)
            delta = plgpu.load(scratch.statistics.at[slot, 1], layout=COLUMNS)
            d_scores = (probs * (d_probs - across_rows(delta, shape))).astype(self.dtype)
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(scratch.d_scores_free.at[slot]))
            scratch.d_scores[slot, warpgroup] = d_scores
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.d_scores_ready.at[slot])
            pl.when(step > 0)(lambda: plgpu.barrier_wait(scratch.d_scores_ready.at[last_slot]))

            def use(product):
                @pl.when(step > 0)
                def _():
                    plgpu.barrier_arrive(scratch.d_scores_free.at[last_slot])
                    add_d_query(step - 1, product)

            dv, dk = accumulate_two_beside(
                (dv, probs.astype(self.dtype), scratch.d_out.at[slot]),
                (dk, d_scores, scratch.query.at[slot]),
                *d_query_factors(last_slot),
                use=use,
            )
            plgpu.barrier_arrive(scratch.tiles_free.at[slot])
            return dk, dv

        def head_body(head, carry):
            partial = lambda step, carry: step_body(step, head, carry, is_partial=True)  # noqa: E731
            whole = lambda step, carry: step_body(step, head, carry, is_partial=False)  # noqa: E731
            carry = lax.fori_loop(0, walk.partial, partial, carry)
            return lax.fori_loop(walk.partial, walk.steps, whole, carry)

        plgpu.barrier_wait(scratch.key_ready.at[warpgroup])
        zero = full((WARPGROUP_ROWS, self.head_dim), 0)
        dk_acc, dv_acc = lax.fori_loop(0, self.group, head_body, (zero, zero))
        steps = walk.steps * self.group

        @pl.when(steps > 0)
        def _last_d_query():
            slot = self._slot(steps - 1)
            plgpu.barrier_wait(scratch.d_scores_ready.at[slot])
            product = sum_of_products(*d_query_factors(slot))
            plgpu.barrier_arrive(scratch.d_scores_free.at[slot])
            add_d_query(steps - 1, product)

        @pl.loop(0, jnp.minimum(config.stages, steps))
        def _wait_for_last_reader(slot):
            plgpu.barrier_wait(scratch.d_scores_free.at[slot])

        # The other warpgroup may still be reading the tiles that the gradients go out through.
        plgpu.barrier_arrive(scratch.all_done)
        plgpu.barrier_wait(scratch.all_done)
        buffer = scratch.gradient.at[warpgroup]
        for target, gradient in ((dv, dv_acc), (dk, dk_acc * self.scale)):
            buffer[...] = gradient
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, target.at[place.batch, keys, place.kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


class _Place(NamedTuple):
    """The key tile of a program, and the query tiles that see it."""

    batch: jax.Array
    kv_head: jax.Array
    key_tile: jax.Array
    walk: Walk

    def key_rows(self, warpgroup) -> pl.Slice:
        return pl.ds((self.key_tile * _COMPUTE_WARPGROUPS + warpgroup) * WARPGROUP_ROWS, WARPGROUP_ROWS)


def differentiate(
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
    config: BackwardConfig,
) -> Gradients:
    """This block's gradients, its share of `dq` added in place in no fixed order. T and S are multiples of 8."""
    batch, num_queries, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    program = _Program(
        config=config,
        num_queries=num_queries,
        num_keys=mask.k_positions.shape[0],
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        dtype=query.dtype,
        is_causal=mask.is_causal,
        scale=scale,
    )
    masks = MaskInputs.of(mask, config.q_tile, config.k_tile)
    ranges = query_ranges(mask, config.q_tile, config.k_tile)
    leaves, treedef = jax.tree.flatten(BackwardInputs(query, key, value, d_out, lse, delta, masks, ranges))

    def body(*refs, **scratch):
        *input_refs, dq_ref, dk_ref, dv_ref = refs
        program.run(jax.tree.unflatten(treedef, input_refs), dq_ref, dk_ref, dv_ref, _Scratch(**scratch))

    gradient = jax.ShapeDtypeStruct(key.shape, jnp.float32)
    kernel = plgpu.kernel(
        body,
        out_type=(gradient, gradient),
        scratch_types=_scratch(program),
        grid=(num_kv_heads, -(-key.shape[1] // config.k_tile), batch),
        grid_names=("kv_heads", "key_tiles", "batch"),
        num_threads=_COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="ring_jax_attention_backward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )

    def run(refs):
        dq_ref, dk_ref, dv_ref = refs
        dk_ref[...], dv_ref[...] = kernel(*leaves, dq_ref)

    dq, dk, dv = pl.run_state(run)((dq, jnp.empty(key.shape, jnp.float32), jnp.empty(key.shape, jnp.float32)))
    return Gradients(dq, dk, dv)


def _scratch(program: _Program) -> dict:
    config, head_dim = program.config, program.head_dim
    warpgroups, stages = _COMPUTE_WARPGROUPS, config.stages
    key_value = matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), program.dtype)
    query = matrix_scratch((stages, config.q_tile, head_dim), program.dtype)
    return _Scratch(
        key=key_value,
        value=key_value,
        tiles=plgpu.RefUnion((query, query), matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), jnp.float32)),
        statistics=plgpu.SMEM((stages, 2, config.q_tile), jnp.float32),
        d_scores=matrix_scratch((stages, warpgroups, WARPGROUP_ROWS, config.q_tile), program.dtype),
        d_query=matrix_scratch((warpgroups, *program.d_query_part), jnp.float32),
        key_ready=plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
        query_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        d_out_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        tiles_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        d_scores_ready=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        d_scores_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        all_done=plgpu.Barrier(num_arrivals=warpgroups),
    )._asdict()
