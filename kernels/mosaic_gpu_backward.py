"""Backward attention of one block on Hopper, in Pallas Mosaic GPU: five matrix products in one kernel.

A program owns a tile of keys. Each of its two compute warpgroups holds 64 of them and, for every query tile that sees
them, computes the transposed probabilities and their gradient, accumulates dV and dK in registers, and leaves the
score gradients in shared memory. One step later, when both warpgroups' score gradients are there, each computes half
of the columns of dQ and has the copy engine add them to the float32 array in global memory (as FlashAttention-3 does,
arXiv:2407.08608). Being a step behind keeps the warpgroups from waiting for each other. A third warpgroup copies tiles.

Where all programs are equal and the last few would run alone, several programs share the steps of those key tiles
(`mosaic_gpu_split`). Each leaves its dK and dV, and whichever does so last adds them up, always in the same order.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from .contract import BlockMask
from .mosaic_gpu_backward_block import Block, Inputs, Outputs, Scratch
from .mosaic_gpu_backward_program import Program, QueryPlace, keys_of, place_and_share
from .mosaic_gpu_choices import (
    BACKWARD_WARPGROUPS,
    BackwardConfig,
    backward_grid,
    backward_splits,
    backward_stretches,
    backward_tiles_apart,
)
from .mosaic_gpu_inline import PIECE_AS_IT_LIES, from_as_it_lies, known_after, store_as_it_lies, take_number
from .mosaic_gpu_masks import MaskInputs
from .mosaic_gpu_primitives import (
    COLUMNS,
    WARPGROUP_ROWS,
    Ref,
    accumulate_two_beside,
    across_rows,
    add_to_gmem,
    by_one_warp,
    full,
    hidden_zero,
    semaphores,
    sum_of_products,
    two_scores,
)
from .mosaic_gpu_split import Share
from .tiles import query_ranges

_LOG2_E = math.log2(math.e)
_PRODUCER_REGISTERS, _COMPUTE_REGISTERS = 24, 240


def _run(program: Program, outputs: Outputs) -> None:
    warpgroup = lax.axis_index("warpgroup")

    @pl.when((warpgroup == BACKWARD_WARPGROUPS) & program.exists)
    def _produce():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        # By one warp, tiles of 128 queries without a mask are 1 % slower; with segment ids it has not been measured.
        if program.block.config.q_tile == WARPGROUP_ROWS and not program.has_segments:
            by_one_warp(program.produce)
        else:
            program.produce()

    @pl.when((warpgroup < BACKWARD_WARPGROUPS) & program.exists)
    def _compute():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        _Worker(program, warpgroup).run(outputs)


@dataclasses.dataclass(frozen=True)
class _Worker:
    """One of the two compute warpgroups of a program.

    They take turns at the tensor cores: from issuing the products that end a step to issuing those that begin the next
    one the turn is one warpgroup's, and meanwhile the other one computes probabilities.
    """

    program: Program
    warpgroup: jax.Array

    @property
    def part(self) -> tuple[pl.Slice, pl.Slice]:
        """Rows and columns of this warpgroup's half of a step's dQ: half the columns if of 64 queries, else rows."""
        own, every = pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS), pl.ds(0, WARPGROUP_ROWS)
        return (every, own) if self.program.block.config.q_tile == WARPGROUP_ROWS else (own, every)

    def take_turn(self, own: jax.Array | None = None) -> None:
        """Waits for the turn. `own` is this warpgroup's number, by `known_after` if the wait is for more than that."""
        plgpu.barrier_wait(self.program.scratch.turn.at[self.warpgroup if own is None else own])

    def give_turn(self) -> None:
        plgpu.barrier_arrive(self.program.scratch.turn.at[1 - self.warpgroup])

    def run(self, outputs: Outputs) -> None:
        program, scratch = self.program, self.program.scratch
        program.note_place(self.warpgroup)
        plgpu.barrier_wait(scratch.key_ready.at[self.warpgroup])
        zero = full((WARPGROUP_ROWS, program.block.head_dim), 0)
        pl.when(self.warpgroup == 1)(self.give_turn)
        carry = _Carry(zero, zero, program.begin(True), jnp.int32(0), jnp.int32(0))
        carry = lax.fori_loop(0, program.partial_steps, lambda i, c: self.step(i, c, is_partial=True), carry)
        carry = carry._replace(place=program.begin(False))
        # With segment ids, numbers of steps that are known before the partial ones would take registers through these.
        late = hidden_zero() if self.program.has_segments and program.block.config.q_tile == WARPGROUP_ROWS else 0
        full_steps = program.partial_steps + late, program.steps + late
        carry = lax.fori_loop(*full_steps, lambda i, c: self.step(i, c, is_partial=False), carry)
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
        if program.block.splits is None:
            self.store(lambda i: gradients[i], outputs)
            return
        # Looked up anew: kept through the loops it would cost registers.
        _, share = place_and_share(program.block.splits, program.inputs, hidden_zero())
        lax.cond(
            share.pieces > 1,
            lambda: self.leave(gradients, share, outputs),
            lambda: self.store(lambda i: gradients[i], outputs),
        )

    def store(self, gradient: Callable[[int], jax.Array], outputs: Outputs) -> None:
        """Copies this warpgroup's half of dK and dV out, gradients 0 and 1, or adds it to their sums."""
        program = self.program
        buffer = program.scratch.gradient.at[self.warpgroup]
        for i in (1, 0):
            buffer[...] = gradient(i).astype(buffer.dtype)
            plgpu.commit_smem()
            kv_head, key_tile = program.noted_place(self.warpgroup)
            if outputs.gradients:
                target = outputs.gradients[i]
                plgpu.copy_smem_to_gmem(buffer, target.at[program.batch, keys_of(key_tile, self.warpgroup), kv_head])
            else:
                # No other program adds to these: the same bits in every run.
                def add(block: int, tile: jax.Array, i: int = i, kv_head: jax.Array = kv_head) -> None:
                    first_row = keys_of(tile, self.warpgroup).start
                    add_to_gmem(buffer, outputs.sums[block], (program.batch, i), first_row, (kv_head,))

                program.for_block_of(key_tile, add)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def leave(self, gradients: tuple[jax.Array, jax.Array], share: Share, outputs: Outputs) -> None:
        """Leaves this warpgroup's half of a share of dK and dV; the last of its tile to do so adds all up."""
        parts = outputs.parts
        assert parts is not None
        for i, gradient in enumerate(gradients):
            parts[share.place, i, self.warpgroup] = gradient
        number = share.piece
        if outputs.arrivals is not None:
            arrivals, taken = outputs.arrivals.at[share.tile, self.warpgroup], self.program.scratch.numbers
            number = take_number(arrivals, taken.at[self.warpgroup, 2], is_after_writes=True)

        def added_up(i: int) -> jax.Array:
            def add(piece: jax.Array, total: jax.Array) -> jax.Array:
                part = parts.at[share.tile + piece * share.tiles, i, self.warpgroup + hidden_zero()]
                return total + plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)

            return lax.fori_loop(0, share.pieces, add, full((WARPGROUP_ROWS, self.program.block.head_dim), 0))

        pl.when(number == share.pieces - 1)(lambda: self.store(added_up, outputs))

    def step(self, step: jax.Array, carry: "_Carry", *, is_partial: bool) -> "_Carry":
        """Adds a query tile's share to dK and dV, and the share of the one before to dQ."""
        program, block, scratch = self.program, self.program.block, self.program.scratch
        slot, last_slot = program.slot(step), program.slot(step + block.config.stages - 1)
        query, d_out = scratch.query.at[slot], scratch.d_out.at[slot]
        plgpu.barrier_wait(scratch.query_ready.at[slot])
        plgpu.barrier_wait(scratch.d_out_ready.at[slot])
        tile = program.tile(carry.place, is_partial)
        probs, d_scores = self.probabilities(step, tile, query, d_out, is_partial=is_partial)
        if not self.waits_early:
            self.wait_for_d_scores_free(step)
        scratch.d_scores[slot, self.warpgroup] = d_scores
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.d_scores_ready.at[slot])
        pl.when(step > 0)(lambda: plgpu.barrier_wait(scratch.d_scores_ready.at[last_slot]))

        def use(product):
            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(scratch.d_scores_free.at[last_slot])
                self.add_d_query(carry, product)

        # ptxas has the probabilities rounded once the turn has come; until then they fill twice the registers. Where
        # there are enough of these, rounding late is 1 to 3 % faster.
        self.take_turn(known_after(self.warpgroup, probs) if self.rounds_early(is_partial) else None)
        dv, dk = accumulate_two_beside(
            (carry.dv, probs, d_out), (carry.dk, d_scores, query), *self.d_query_factors(last_slot), use=use
        )
        plgpu.barrier_arrive(scratch.tiles_free.at[slot])
        return _Carry(dk, dv, program.after(carry.place, is_partial), carry.place.stretch, tile)

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
            own = self.warpgroup + hidden_zero()
            _, key_tile = program.noted_place(own)
            keys = keys_of(key_tile, own)
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
        if self.waits_early:
            self.wait_for_d_scores_free(step)
        delta = plgpu.load(statistics.at[1], layout=COLUMNS)
        d_scores = probs * (d_probs - across_rows(delta, shape))
        return probs.astype(block.dtype), d_scores.astype(block.dtype)

    @property
    def waits_early(self) -> bool:
        """Whether the wait for a place for score gradients comes before they are computed, not after.

        After 128 queries' the registers are full of both the probabilities and what their gradients are computed from.
        """
        return self.program.block.config.q_tile != WARPGROUP_ROWS and not self.program.has_segments

    def rounds_early(self, is_partial: bool) -> bool:
        """Whether a step's probabilities are rounded before the turn has come, for the registers.

        Tiles of 128 queries are short of these, and steps whose mask is of segment ids. Where no mask is causal, the
        full ones among the former have enough.
        """
        block = self.program.block
        if block.config.q_tile == WARPGROUP_ROWS:
            return is_partial and self.program.has_segments
        return is_partial or block.is_causal or self.program.has_segments

    def wait_for_d_scores_free(self, step: jax.Array) -> None:
        """Waits until the score gradients that a step's take the place of have been multiplied."""
        stages, free = self.program.block.config.stages, self.program.scratch.d_scores_free
        pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[self.program.slot(step)]))

    def d_query_factors(self, slot: jax.Array) -> tuple[list[Ref], list[Ref]]:
        """The score gradients in a slot and the keys, whose products add up to this warpgroup's half of dQ."""
        scratch, both = self.program.scratch, range(BACKWARD_WARPGROUPS)
        rows, columns = self.part
        zero = hidden_zero()
        return [scratch.d_scores.at[slot, w, :, rows] for w in both], [
            scratch.key.at[w + zero, :, columns] for w in both
        ]

    def add_d_query(self, carry: "_Carry", product: jax.Array) -> None:
        """Sends off this warpgroup's half of the dQ of the last step."""
        program = self.program
        buffer = program.scratch.d_query.at[self.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store_as_it_lies(product, buffer, keeps_address=program.block.keeps_address)
        plgpu.commit_smem()
        piece = carry.last_tile * BACKWARD_WARPGROUPS + self.warpgroup
        add_to_gmem(buffer, program.dq, (program.batch, program.query_head(carry.last_stretch), piece), 0, ())


class _Carry(NamedTuple):
    """What a compute warpgroup takes from step to step: its sums, where it is, and where the last step's dQ belongs."""

    dk: Float32[Array, "64 H"]
    dv: Float32[Array, "64 H"]
    place: QueryPlace
    last_stretch: jax.Array
    last_tile: jax.Array


def differentiate(
    query: Float[Array, "B T N H"],
    keys: tuple[Float[Array, "B S K H"], ...],
    values: tuple[Float[Array, "B S K H"], ...],
    d_out: Float[Array, "B T N H"],
    lse: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    dq: Float32[Array, "B Tq N H"],
    sums: tuple[Float32[Array, "B 2 S K H"], ...],
    mask: BlockMask,
    *,
    scale: float,
    is_only: bool,
    config: BackwardConfig,
) -> tuple[Float32[Array, "B Tq N H"], tuple[Array, ...]]:
    """dQ and the sums of each block after one block, or several at once, added in place, to `dq` in no fixed order.

    T and S are multiples of 8, of several blocks S of two key tiles; Tq is T in whole query tiles. Without `sums` a
    block's dK and dV come alone. Shares are added to `dq` as they lie in registers, in the order [B, N, 64 queries, 64
    columns, `as_it_lies`]: `in_order` makes the gradient of it.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads = sum(key.shape[1] for key in keys), keys[0].shape[2]
    assert len(keys) == 1 or (len(sums) == len(keys) and num_keys % (2 * len(keys) * config.k_tile) == 0)
    assert config.q_tile * head_dim == BACKWARD_WARPGROUPS * WARPGROUP_ROWS**2, (
        "each computes 64 rows and columns of dQ"
    )
    group = num_heads // num_kv_heads
    key_tiles = -(-num_keys // config.k_tile)
    num_steps = group * -(-num_queries // config.q_tile)
    stretches = backward_stretches(mask, num_steps, num_queries, config)
    grid = backward_grid(mask, num_kv_heads, key_tiles, batch, config)
    heads_together = grid["kv_heads"] if "kv_groups" in grid else 0
    # Of grouped heads taken together, programs that begin apart are slower.
    is_apart = mask.q_segment_ids is None and (next(iter(grid)) == "kv_heads" or (heads_together > 0 and group == 1))
    splits = backward_splits(mask, num_kv_heads, key_tiles, batch, num_steps)
    if splits is not None:
        grid = {"programs": splits.num_programs}
    block = Block(
        config=config,
        num_keys=mask.k_positions.shape[-1],
        key_tiles=key_tiles,
        group=group,
        head_dim=head_dim,
        dtype=query.dtype,
        gradient_dtype=keys[0].dtype if is_only else jnp.dtype(jnp.float32),
        skips_hidden=bool(sums) and config.q_tile == WARPGROUP_ROWS,
        is_causal=mask.is_causal,
        heads_together=heads_together,
        tiles_apart=backward_tiles_apart(mask, num_steps, stretches) if is_apart else 0,
        stretches=stretches,
        keeps_address=not sums or mask.q_segment_ids is not None,
        scale=scale,
        splits=splits,
    )
    masks = MaskInputs.of(mask, config.q_tile, config.k_tile)
    ranges = query_ranges(mask, config.q_tile, config.k_tile)
    numbers = None if splits is None else splits.numbers(ranges)
    leaves, treedef = jax.tree.flatten(Inputs(query, keys, values, d_out, lse, delta, masks, ranges, numbers))
    out_type = block.parts_types()
    if not sums:
        out_type = (*(jax.ShapeDtypeStruct(keys[0].shape, block.gradient_dtype),) * 2, *out_type)

    def body(*refs, **scratch):
        inputs, (dq_ref, *outputs) = jax.tree.unflatten(treedef, refs[: len(leaves)]), refs[len(leaves) :]
        arrivals = None if splits is None else semaphores(splits.shared, BACKWARD_WARPGROUPS)
        targets, parts = tuple(outputs[: len(sums) or 2]), outputs[len(sums) or 2 :]
        targets = Outputs(targets if sums else (), () if sums else targets, *parts, arrivals=arrivals)
        _run(Program.here(block, inputs, dq_ref, Scratch(**scratch)), targets)

    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=block.scratch_types(),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=BACKWARD_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="ring_jax_attention_backward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )

    in_place = (dq.reshape(batch, num_heads, -1, *PIECE_AS_IT_LIES), *sums)

    def run(refs):
        # Parts are kept only because the discharge of `dq` wants all of a kernel's results used.
        results = kernel(*leaves, *refs[: len(in_place)])
        for ref, x in zip(refs[len(in_place) :], results, strict=True):
            ref[...] = x

    dq, *results = pl.run_state(run)((*in_place, *(jnp.empty(x.shape, x.dtype) for x in out_type)))
    return dq.reshape(batch, -1, num_heads, head_dim), tuple(results[: len(sums) or 2])


def in_order(dq: Float32[Array, "B Tq N H"], scale: float) -> Float32[Array, "B Tq N H"]:
    """The gradient of the queries, from what the kernels of all blocks have added up: put in order, and scaled."""
    batch, _, num_heads, head_dim = dq.shape
    columns = head_dim // WARPGROUP_ROWS
    pieces = from_as_it_lies(dq.reshape(batch, num_heads, -1, columns, *PIECE_AS_IT_LIES))
    return pieces.transpose(0, 2, 4, 1, 3, 5).reshape(dq.shape) * scale
