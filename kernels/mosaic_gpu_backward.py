"""Backward attention of one block on Hopper, in Pallas Mosaic GPU: five matrix products in one kernel.

A program owns a tile of keys. Each of its two compute warpgroups holds 64 of them and, for every query tile that sees
them, computes the transposed probabilities and their gradient, accumulates dV and dK in registers, and leaves the
score gradients in shared memory. One step later, when both warpgroups' score gradients are there, each computes half
of the columns of dQ and has the copy engine add them to the float32 array in global memory (as FlashAttention-3 does,
arXiv:2407.08608). Being a step behind keeps the warpgroups from waiting for each other. A third warpgroup copies tiles.

Where all programs are equal and the last few would run alone, several programs share the steps of those key tiles, and
the copy engine adds up their dK and dV too.
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
from .mosaic_gpu_backward_block import Block, Inputs, Outputs, Scratch
from .mosaic_gpu_choices import (
    BACKWARD_WARPGROUPS,
    BackwardConfig,
    backward_grid_order,
    backward_split,
    backward_tiles_apart,
)
from .mosaic_gpu_inline import store_swapped, swap_columns
from .mosaic_gpu_masks import MaskInputs, Walk
from .mosaic_gpu_primitives import (
    COLUMNS,
    WARPGROUP_ROWS,
    Ref,
    accumulate_two_beside,
    across_rows,
    add_to_gmem,
    full,
    hidden_zero,
    slot_of,
    sum_of_products,
    two_scores,
)
from .mosaic_gpu_split import Share, first_shared_tile, num_programs, place_and_share
from .tiles import query_ranges

_LOG2_E = math.log2(math.e)
_PRODUCER_REGISTERS, _COMPUTE_REGISTERS = 24, 240


class _Place(NamedTuple):
    """Where a program is: query head within the group, and query tile; among the partial tiles, which of them.

    It is counted: divisions of the step by the number of tiles would take longer.
    """

    head: jax.Array
    tile: jax.Array


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program of the grid: its tile of keys, the query tiles that see it, and what its warpgroups share."""

    block: Block
    inputs: Ref
    dq: Ref
    scratch: Scratch
    batch: jax.Array
    kv_head: jax.Array
    key_tile: jax.Array
    # Where any key tile's steps are shared by several programs.
    share: Share | None
    walk: Walk

    @classmethod
    def here(cls, block: Block, inputs: Ref, dq: Ref, scratch: Scratch) -> "_Program":
        if block.split is None:
            batch, kv_head, key_tile = (lax.axis_index(name) for name in ("batch", "kv_heads", "key_tiles"))
            share = None
        else:
            sizes = {"num_heads": inputs.key.shape[2], "tiles": block.key_tiles, "batch": inputs.key.shape[0]}
            program = lax.axis_index("programs")
            (batch, kv_head, key_tile), share = place_and_share(block.split, inputs.first_shared, program, **sizes)
        walk = Walk.read(inputs.ranges, inputs.mask, batch, key_tile)
        return cls(block, inputs, dq, scratch, batch, kv_head, key_tile, share, walk)

    @property
    def all_steps(self) -> jax.Array:
        """Query tiles that see this key tile, those of all query heads of the group together."""
        return self.walk.steps * self.block.group

    @property
    def first_step(self) -> jax.Array | int:
        """The first of those steps that is this program's."""
        return 0 if self.share is None else self.all_steps * self.share.piece // self.share.pieces

    @property
    def steps(self) -> jax.Array:
        """How many of those steps are this program's."""
        if self.share is None:
            return self.all_steps
        return self.all_steps * (self.share.piece + 1) // self.share.pieces - self.first_step

    def keys(self, warpgroup: jax.Array | int) -> pl.Slice:
        """The keys that a warpgroup holds."""
        return pl.ds((self.key_tile * BACKWARD_WARPGROUPS + warpgroup) * WARPGROUP_ROWS, WARPGROUP_ROWS)

    @property
    def partial_steps(self) -> jax.Array:
        """How many of this program's steps, the first ones, need the mask."""
        partial = self.walk.partial * self.block.group
        return partial if self.share is None else jnp.clip(partial - self.first_step, 0, self.steps)

    @property
    def first_full(self) -> jax.Array:
        """The full tile to begin with.

        Each program begins a few later than the one before it: programs of one head run side by side, and beginning
        with the same tiles they would add to the same dQ at once.
        """
        walk = self.walk
        if not self.block.tiles_apart:
            return walk.full_start
        num_full = jnp.maximum(walk.full_end - walk.full_start, 1)
        return walk.full_start + lax.rem(self.key_tile * self.block.tiles_apart, num_full)

    def begin(self, is_partial: bool) -> _Place:
        """This program's first place among the partial or the full tiles."""
        walk, first = self.walk, jnp.int32(0) if is_partial else self.first_full
        if self.share is None:
            return _Place(jnp.int32(0), first)
        start, end = (first, walk.partial) if is_partial else (walk.full_start, walk.full_end)
        step = self.first_step - (0 if is_partial else walk.partial * self.block.group)
        tiles, step = jnp.maximum(end - start, 1), jnp.maximum(step, 0)
        return _Place(step // tiles, start + lax.rem(first - start + step, tiles))

    def tile(self, place: _Place, is_partial: bool) -> jax.Array:
        """The query tile of a place."""
        return self.walk.tile(place.tile) if is_partial else place.tile

    def after(self, place: _Place, is_partial: bool) -> _Place:
        """The next place: a head's other tiles, then the next head."""
        walk, first = self.walk, jnp.int32(0) if is_partial else self.first_full
        start, end = (first, walk.partial) if is_partial else (walk.full_start, walk.full_end)
        tile = jnp.where(place.tile + 1 == end, start, place.tile + 1)
        return _Place(jnp.where(tile == first, place.head + 1, place.head), tile)

    def slot(self, step: jax.Array) -> jax.Array:
        return slot_of(step, self.block.config.stages)

    def wait_for_last(self, barriers: Ref) -> None:
        """Waits for the arrivals of the last steps, which no later step waits for."""

        @pl.loop(0, jnp.minimum(self.block.config.stages, self.steps))
        def _(slot):
            plgpu.barrier_wait(barriers.at[slot])

    def run(self, outputs: Outputs) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == BACKWARD_WARPGROUPS)
        def _produce():
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            self.produce()

        @pl.when(warpgroup < BACKWARD_WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            _Worker(self, warpgroup).run(outputs)

    def produce(self) -> None:
        """The third warpgroup's part: copies keys and values once, and the query side of every step."""
        inputs, scratch = self.inputs, self.scratch
        for warpgroup in range(BACKWARD_WARPGROUPS):
            keys, ready = (self.batch, self.keys(warpgroup), self.kv_head), scratch.key_ready.at[warpgroup]
            plgpu.copy_gmem_to_smem(inputs.key.at[keys], scratch.key.at[warpgroup], ready)
            plgpu.copy_gmem_to_smem(inputs.value.at[keys], scratch.value.at[warpgroup], ready)

        def copy_tiles(step: jax.Array, place: _Place) -> _Place:
            slot, is_partial = self.slot(step), step < self.partial_steps
            pl.when(step >= self.block.config.stages)(lambda: plgpu.barrier_wait(scratch.tiles_free.at[slot]))
            tile = jnp.where(is_partial, self.tile(place, True), self.tile(place, False))
            rows = pl.ds(tile * self.block.config.q_tile, self.block.config.q_tile)
            head = self.kv_head * self.block.group + place.head
            ready = scratch.query_ready.at[slot]
            plgpu.copy_gmem_to_smem(inputs.query.at[self.batch, rows, head], scratch.query.at[slot], ready)
            plgpu.copy_gmem_to_smem(inputs.lse.at[self.batch, head, rows], scratch.statistics.at[slot, 0], ready)
            ready = scratch.d_out_ready.at[slot]
            plgpu.copy_gmem_to_smem(inputs.d_out.at[self.batch, rows, head], scratch.d_out.at[slot], ready)
            plgpu.copy_gmem_to_smem(inputs.delta.at[self.batch, head, rows], scratch.statistics.at[slot, 1], ready)
            after = _either(is_partial, self.after(place, True), self.after(place, False))
            return _either(step + 1 == self.partial_steps, self.begin(False), after)

        lax.fori_loop(0, self.steps, copy_tiles, _either(self.partial_steps > 0, self.begin(True), self.begin(False)))
        self.wait_for_last(scratch.tiles_free)


def _either(condition: jax.Array, one: _Place, other: _Place) -> _Place:
    return _Place(*(jnp.where(condition, x, y) for x, y in zip(one, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class _Worker:
    """One of the two compute warpgroups of a program.

    They take turns at the tensor cores: from issuing the products that end a step to issuing those that begin the next
    one the turn is one warpgroup's, and meanwhile the other one computes probabilities.
    """

    program: _Program
    warpgroup: jax.Array

    @property
    def first_row(self) -> jax.Array | int:
        """First row of this warpgroup's half of a step's dQ: a half of the rows if that fills a product."""
        num_rows, _ = self.program.block.d_query_part
        return 0 if num_rows == self.program.block.config.q_tile else self.warpgroup * num_rows

    @property
    def columns(self) -> pl.Slice:
        """Columns of this warpgroup's half of a step's dQ."""
        _, num_columns = self.program.block.d_query_part
        return pl.ds(0 if num_columns == self.program.block.head_dim else self.warpgroup * num_columns, num_columns)

    def take_turn(self) -> None:
        plgpu.barrier_wait(self.program.scratch.turn.at[self.warpgroup])

    def give_turn(self) -> None:
        plgpu.barrier_arrive(self.program.scratch.turn.at[1 - self.warpgroup])

    def run(self, outputs: Outputs) -> None:
        program, scratch = self.program, self.program.scratch
        plgpu.barrier_wait(scratch.key_ready.at[self.warpgroup])
        zero = full((WARPGROUP_ROWS, program.block.head_dim), 0)
        pl.when(self.warpgroup == 1)(self.give_turn)
        carry = _Carry(zero, zero, program.begin(True), jnp.int32(0), jnp.int32(0))
        carry = lax.fori_loop(0, program.partial_steps, lambda i, c: self.step(i, c, is_partial=True), carry)
        carry = carry._replace(place=program.begin(False))
        carry = lax.fori_loop(
            program.partial_steps, program.steps, lambda i, c: self.step(i, c, is_partial=False), carry
        )
        pl.when(program.steps > 0)(self.give_turn)
        pl.when(self.warpgroup == 0)(self.take_turn)

        @pl.when(program.steps > 0)
        def _last_d_query():
            slot = program.slot(program.steps - 1)
            plgpu.barrier_wait(scratch.d_scores_ready.at[slot])
            product = sum_of_products(*self.d_query_factors(slot))
            plgpu.barrier_arrive(scratch.d_scores_free.at[slot])
            self.add_d_query(carry, product)

        program.wait_for_last(scratch.d_scores_free)
        # The other warpgroup may still be reading the tiles that the gradients go out through.
        plgpu.barrier_arrive(scratch.all_done)
        plgpu.barrier_wait(scratch.all_done)
        gradients = (carry.dk * program.block.scale, carry.dv)
        if (share := program.share) is None:
            self.store(gradients, outputs)
            return
        pl.when(share.pieces > 1)(lambda: self.add(gradients, share, outputs))
        pl.when(share.pieces == 1)(lambda: self.store(gradients, outputs))

    def store(self, gradients: tuple[jax.Array, jax.Array], outputs: Outputs) -> None:
        """Copies this warpgroup's half of dK and dV out."""
        program = self.program
        buffer = program.scratch.gradient.at[self.warpgroup]
        for target, gradient in zip((outputs.dv, outputs.dk), gradients[::-1], strict=True):
            buffer[...] = gradient.astype(buffer.dtype)
            plgpu.commit_smem()
            where = (program.batch, program.keys(self.warpgroup), program.kv_head)
            plgpu.copy_smem_to_gmem(buffer, target.at[where])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def add(self, gradients: tuple[jax.Array, jax.Array], share: Share, outputs: Outputs) -> None:
        """Adds this warpgroup's half of a share of dK and dV to those of the other programs of this key tile."""
        program = self.program
        buffer = program.scratch.gradient_share.at[self.warpgroup]
        assert outputs.shared is not None
        tile = share.tile // outputs.dk.shape[0]
        first_row = (tile * BACKWARD_WARPGROUPS + self.warpgroup) * WARPGROUP_ROWS
        num_rows = outputs.shared.shape[1]
        for i, gradient in reversed(list(enumerate(gradients))):
            buffer[...] = gradient
            plgpu.commit_smem()
            where = (i * outputs.dk.shape[0] + program.batch, 0, pl.ds(0, program.block.head_dim))
            add_to_gmem(buffer, outputs.shared, where, first_row, num_rows)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def step(self, step: jax.Array, carry: "_Carry", *, is_partial: bool) -> "_Carry":
        program, block, scratch = self.program, self.program.block, self.program.scratch
        slot, last_slot = program.slot(step), program.slot(step + block.config.stages - 1)
        query, d_out = scratch.query.at[slot], scratch.d_out.at[slot]
        plgpu.barrier_wait(scratch.query_ready.at[slot])
        plgpu.barrier_wait(scratch.d_out_ready.at[slot])
        tile = program.tile(carry.place, is_partial)
        probs, d_scores = self.probabilities(step, tile, query, d_out, is_partial=is_partial)
        pl.when(step >= block.config.stages)(lambda: plgpu.barrier_wait(scratch.d_scores_free.at[slot]))
        scratch.d_scores[slot, self.warpgroup] = d_scores
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.d_scores_ready.at[slot])
        pl.when(step > 0)(lambda: plgpu.barrier_wait(scratch.d_scores_ready.at[last_slot]))

        def use(product):
            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(scratch.d_scores_free.at[last_slot])
                self.add_d_query(carry, product)

        self.take_turn()
        dv, dk = accumulate_two_beside(
            (carry.dv, probs, d_out), (carry.dk, d_scores, query), *self.d_query_factors(last_slot), use=use
        )
        plgpu.barrier_arrive(scratch.tiles_free.at[slot])
        return _Carry(dk, dv, program.after(carry.place, is_partial), carry.place.head, tile)

    def probabilities(self, step: jax.Array, tile: jax.Array, query: Ref, d_out: Ref, *, is_partial: bool) -> tuple:
        """Transposed probabilities of a step and the gradients of its scores, both rounded to the inputs' dtype."""
        program, block = self.program, self.program.block
        statistics = program.scratch.statistics.at[program.slot(step)]
        shape = (WARPGROUP_ROWS, block.config.q_tile)

        def exponentials(products):
            lse = plgpu.load(statistics.at[0], layout=COLUMNS) * _LOG2_E
            result = jnp.exp2(products * (block.scale * _LOG2_E) - across_rows(lse, shape))
            if not is_partial:
                return result
            queries = pl.ds(tile * block.config.q_tile, block.config.q_tile)
            keys = program.keys(self.warpgroup + hidden_zero())
            visible = program.inputs.mask.visible(
                program.batch, queries, keys, is_causal=block.is_causal, num_keys=block.num_keys, keys_in_rows=True
            )
            return jnp.where(visible, result, 0.0)

        own = self.warpgroup + hidden_zero()
        probs, d_probs = two_scores(
            program.scratch.key.at[own],
            query,
            program.scratch.value.at[own],
            d_out,
            use=exponentials,
            issued=lambda: pl.when(step > 0)(self.give_turn),
        )
        delta = plgpu.load(statistics.at[1], layout=COLUMNS)
        d_scores = probs * (d_probs - across_rows(delta, shape))
        return probs.astype(block.dtype), d_scores.astype(block.dtype)

    def d_query_factors(self, slot: jax.Array) -> tuple[list[Ref], list[Ref]]:
        """The score gradients in a slot and the keys, whose products add up to this warpgroup's half of dQ."""
        scratch, both = self.program.scratch, range(BACKWARD_WARPGROUPS)
        rows = pl.ds(self.first_row, self.program.block.d_query_part[0])
        zero = hidden_zero()
        return [scratch.d_scores.at[slot, w, :, rows] for w in both], [
            scratch.key.at[w + zero, :, self.columns] for w in both
        ]

    def add_d_query(self, carry: "_Carry", product: jax.Array) -> None:
        """Sends off this warpgroup's half of the dQ of the last step."""
        program = self.program
        buffer = program.scratch.d_query.at[self.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        # Tiles of 128 queries leave no registers for the addresses.
        store_swapped(product, buffer, keeps_addresses=program.block.config.q_tile == WARPGROUP_ROWS)
        plgpu.commit_smem()
        where = (program.batch, program.kv_head * program.block.group + carry.last_head, self.columns)
        first_row = carry.last_tile * program.block.config.q_tile + self.first_row
        add_to_gmem(buffer, program.dq, where, first_row, program.block.num_queries)


class _Carry(NamedTuple):
    """What a compute warpgroup takes from step to step: its sums, where it is, and where the last step's dQ belongs."""

    dk: Float32[Array, "64 H"]
    dv: Float32[Array, "64 H"]
    place: _Place
    last_head: jax.Array
    last_tile: jax.Array


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
    is_only: bool,
    config: BackwardConfig,
) -> Gradients:
    """This block's gradients, its share of `dq` added in place in no fixed order. T and S are multiples of 8.

    Sums are added to `dq` as they lie in registers: `in_order` makes the gradient of them.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    group = num_heads // num_kv_heads
    key_tiles = -(-key.shape[1] // config.k_tile)
    num_steps = group * -(-num_queries // config.q_tile)
    grid = {"kv_heads": num_kv_heads, "key_tiles": key_tiles, "batch": batch}
    order = backward_grid_order(mask.has_uneven_tiles, math.prod(grid.values()))
    is_apart = order[0] == "kv_heads" and mask.q_segment_ids is None
    # Shared tiles are put in their place as whole ones.
    has_tail = key.shape[1] % config.k_tile != 0
    split = None if has_tail else backward_split(mask, num_kv_heads, key_tiles, batch, num_steps)
    if split is not None:
        order = ("programs",)
        grid = {"programs": num_programs(split, num_kv_heads, key_tiles, batch)}
    block = Block(
        config=config,
        num_queries=num_queries,
        num_keys=mask.k_positions.shape[-1],
        key_tiles=key_tiles,
        group=group,
        head_dim=head_dim,
        dtype=query.dtype,
        gradient_dtype=key.dtype if is_only else jnp.dtype(jnp.float32),
        is_causal=mask.is_causal,
        tiles_apart=backward_tiles_apart(mask, num_steps) if is_apart else 0,
        scale=scale,
        split=split,
    )
    masks = MaskInputs.of(mask, config.q_tile, config.k_tile)
    ranges = query_ranges(mask, config.q_tile, config.k_tile)
    first_shared = None if split is None else first_shared_tile(mask, ranges, split)
    leaves, treedef = jax.tree.flatten(Inputs(query, key, value, d_out, lse, delta, masks, ranges, first_shared))

    def body(*refs, **scratch):
        inputs, (dq_ref, *shared), gradients = refs[: len(leaves)], refs[len(leaves) : -2], refs[-2:]
        inputs = jax.tree.unflatten(treedef, inputs)
        _Program.here(block, inputs, dq_ref, Scratch(**scratch)).run(Outputs(*gradients, *shared))

    gradient = jax.ShapeDtypeStruct(key.shape, block.gradient_dtype)
    kernel = plgpu.kernel(
        body,
        out_type=(gradient, gradient),
        scratch_types=block.scratch_types(),
        grid=tuple(grid[name] for name in order),
        grid_names=order,
        num_threads=BACKWARD_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="ring_jax_attention_backward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )

    def run(refs):
        dq_ref, dk_ref, dv_ref, *shared = refs
        dk_ref[...], dv_ref[...] = kernel(*leaves, dq_ref, *shared)

    empty = jnp.empty(gradient.shape, gradient.dtype)
    if split is None:
        return Gradients(*pl.run_state(run)((dq, empty, empty)))
    assert first_shared is not None
    zeros = jnp.zeros((2 * batch, split.tiles * config.k_tile, 1, head_dim), jnp.float32)
    dq, dk, dv, shared = pl.run_state(run)((dq, empty, empty, zeros))
    place = (0, first_shared[0] * config.k_tile, num_kv_heads - 1, 0)
    dk, dv = (
        lax.dynamic_update_slice(x, of_last.astype(x.dtype), place)
        for x, of_last in zip((dk, dv), jnp.split(shared, 2), strict=True)
    )
    return Gradients(dq, dk, dv)


def in_order(dq: Float32[Array, "B T N H"], scale: float) -> Float32[Array, "B T N H"]:
    """The gradient of the queries, from what the kernels of all blocks have added up: put in order, and scaled."""
    is_odd = jnp.arange(dq.shape[1]) % 2 == 1
    return swap_columns(dq, is_odd[:, None, None]) * scale
