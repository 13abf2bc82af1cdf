"""Forward attention of one block on Hopper, in Pallas Mosaic GPU.

The shape of FlashAttention-3 (arXiv:2407.08608): one producer warpgroup copies tiles with TMA, the others compute 64
query rows each. A compute warpgroup runs the softmax of one key tile while its product of the tile before with the
values is still in the tensor cores, and the compute warpgroups take turns at issuing products, so that one's softmax
hides under the other's products.

The running state is merged after the last key tile: until then its copy into shared memory is in flight.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .contract import AttentionState, BlockMask
from .mosaic_gpu_masks import MaskInputs, Walk, pad_last
from .mosaic_gpu_primitives import (
    ROWS,
    WARPGROUP_ROWS,
    accumulate,
    across_columns,
    full,
    hidden_zero,
    matrix_scratch,
    scores,
    scores_while_accumulating,
)
from .tiles import TileRanges, key_ranges

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes of the forward kernel.

    `q_tile` queries per program, 64 for each compute warpgroup; `k_tile` keys per step; `stages` key and value tiles in
    shared memory. `early_state` gives the running output shared memory of its own, so that it is copied while keys are
    still computed with. `turns` makes the compute warpgroups take turns at issuing products.
    """

    q_tile: int
    k_tile: int
    stages: int
    early_state: bool = True
    turns: bool = True

    def __post_init__(self):
        if self.q_tile not in (128, 192):
            raise ValueError(f"q_tile must be 128 or 192 (64 rows for each of 2 or 3 warpgroups), got {self.q_tile}")
        if self.k_tile % 16 or not 16 <= self.k_tile <= 256:
            raise ValueError(f"k_tile must be a multiple of 16 up to 256, got {self.k_tile}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")

    @property
    def compute_warpgroups(self) -> int:
        return self.q_tile // WARPGROUP_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread of the producer and of the compute warpgroups: they share 64 Ki."""
        return {2: (24, 240), 3: (32, 160)}[self.compute_warpgroups]


def default_config(head_dim: int) -> ForwardConfig:
    """The tile sizes used for a head dim."""
    if head_dim <= 64:
        return ForwardConfig(q_tile=128, k_tile=128, stages=2)
    if head_dim <= 128:
        return ForwardConfig(q_tile=128, k_tile=128, stages=2)
    return ForwardConfig(q_tile=128, k_tile=64, stages=2, early_state=False)


class _Inputs(NamedTuple):
    """Arrays (outside) or references (inside) that the kernel reads."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    mask: MaskInputs
    ranges: TileRanges


class _Scratch(NamedTuple):
    """Shared memory and barriers of one program. `*_ready` count a copy's arrival, `*_free` the readers' leaving."""

    tiles: tuple
    query_ready: jax.Array
    key_ready: jax.Array
    value_ready: jax.Array
    output_ready: jax.Array
    key_free: jax.Array
    value_free: jax.Array
    turn: jax.Array

    @property
    def query(self):
        return self.tiles[0][0]

    @property
    def key(self):
        return self.tiles[0][1]

    @property
    def value(self):
        return self.tiles[0][2]

    @property
    def output(self):
        return self.tiles[1]


class _Softmax(NamedTuple):
    """Online softmax of a warpgroup's rows: the largest score so far, in powers of two, and the sum of the weights."""

    maximum: Float[Array, " rows"]
    total: Float[Array, " rows"]


@dataclasses.dataclass(frozen=True)
class _Program:
    """What one program of the grid computes: shapes and static choices, and the code of its warpgroups."""

    config: ForwardConfig
    num_keys: int
    num_row_tiles: int
    group: int
    head_dim: int
    dtype: jnp.dtype
    is_causal: bool
    exponent_scale: float

    def run(self, inputs: _Inputs, state: AttentionState, scratch: _Scratch) -> None:
        batch, head = lax.axis_index("batch"), lax.axis_index("heads")
        # The last rows have the most keys in a causal block: they go first, so that the short ones fill the gaps.
        row_tile = self.num_row_tiles - 1 - lax.axis_index("row_tiles")
        warpgroup = lax.axis_index("warpgroup")
        walk = Walk.read(inputs.ranges, batch, row_tile)
        producer_registers, compute_registers = self.config.registers

        @pl.when(walk.steps > 0)
        def _():
            @pl.when(warpgroup == self.config.compute_warpgroups)
            def _produce():
                plgpu.set_max_registers(producer_registers, action="decrease")
                self._produce(inputs, state, scratch, walk, batch, head, row_tile)

            @pl.when(warpgroup < self.config.compute_warpgroups)
            def _compute():
                plgpu.set_max_registers(compute_registers, action="increase")
                self._compute(inputs, state, scratch, walk, batch, head, row_tile, warpgroup)

    def _produce(self, inputs, state, scratch, walk, batch, head, row_tile) -> None:
        config = self.config
        kv_head = lax.div(head, jnp.int32(self.group))

        def rows(warpgroup):
            first = row_tile * config.q_tile + warpgroup * WARPGROUP_ROWS
            return (batch, pl.ds(first, WARPGROUP_ROWS), head)

        def copy_key(step, slot):
            keys = (batch, pl.ds(walk.tile(step) * config.k_tile, config.k_tile), kv_head)
            plgpu.copy_gmem_to_smem(inputs.key.at[keys], scratch.key.at[slot], scratch.key_ready.at[slot])

        def copy_value(step, slot):
            keys = (batch, pl.ds(walk.tile(step) * config.k_tile, config.k_tile), kv_head)
            plgpu.copy_gmem_to_smem(inputs.value.at[keys], scratch.value.at[slot], scratch.value_ready.at[slot])

        for warpgroup in range(config.compute_warpgroups):
            plgpu.copy_gmem_to_smem(
                inputs.query.at[rows(warpgroup)], scratch.query.at[warpgroup], scratch.query_ready.at[warpgroup]
            )

        def copy_output():
            for warpgroup in range(config.compute_warpgroups):
                plgpu.copy_gmem_to_smem(
                    state.output.at[rows(warpgroup)], scratch.output.at[warpgroup], scratch.output_ready.at[warpgroup]
                )

        @pl.loop(0, walk.steps)
        def _copy_keys_and_values(step):
            slot = lax.rem(step, jnp.int32(config.stages))
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(scratch.key_free.at[slot]))
            copy_key(step, slot)
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(scratch.value_free.at[slot]))
            copy_value(step, slot)
            # Wanted last, so asked for after the first tiles.
            pl.when((step == 0) & config.early_state)(copy_output)

        @pl.loop(0, jnp.minimum(config.stages, walk.steps))
        def _wait_for_last_readers(slot):
            plgpu.barrier_wait(scratch.key_free.at[slot])
            plgpu.barrier_wait(scratch.value_free.at[slot])

        if not config.early_state:
            copy_output()

    def _compute(self, inputs, state, scratch, walk, batch, head, row_tile, warpgroup) -> None:
        first_row = row_tile * self.config.q_tile + warpgroup * WARPGROUP_ROWS
        next_warpgroup = lax.rem(warpgroup + 1, jnp.int32(self.config.compute_warpgroups))
        row_lse = state.lse.at[batch, head, pl.ds(first_row, WARPGROUP_ROWS)]
        old_lse = plgpu.load(row_lse, layout=ROWS, optimized=False)

        def visible(step):
            queries = pl.ds(first_row, WARPGROUP_ROWS)
            keys = pl.ds(walk.tile(step) * self.config.k_tile, self.config.k_tile)
            return inputs.mask.visible(batch, queries, keys, is_causal=self.is_causal, num_keys=self.num_keys)

        def slot_of(step):
            return lax.rem(step, jnp.int32(self.config.stages))

        def take_turn():
            if not self.config.turns:
                return
            plgpu.barrier_wait(scratch.turn.at[warpgroup])

        def give_turn():
            if not self.config.turns:
                return
            plgpu.barrier_arrive(scratch.turn.at[next_warpgroup])

        def step_body(step, carry, *, is_partial):
            acc, softmax, weights = carry
            slot, last_slot = slot_of(step), slot_of(step - 1)
            mask = visible(step) if is_partial else None

            def ready():
                plgpu.barrier_wait(scratch.key_ready.at[slot])
                take_turn()
                plgpu.barrier_wait(scratch.value_ready.at[last_slot])

            def use(products):
                plgpu.barrier_arrive(scratch.key_free.at[slot])
                return self._update(softmax, products, mask)

            (softmax, decay, weights), acc = scores_while_accumulating(
                scratch.query.at[warpgroup + hidden_zero()],
                scratch.key.at[slot],
                acc,
                weights,
                scratch.value.at[last_slot],
                ready=ready,
                issued=give_turn,
                use=use,
            )
            plgpu.barrier_arrive(scratch.value_free.at[last_slot])
            # Rounded only now: the registers of the old weights were being read until the product was waited for.
            return acc * across_columns(decay, acc.shape), softmax, weights.astype(self.dtype)

        plgpu.barrier_wait(scratch.query_ready.at[warpgroup])
        pl.when(warpgroup == self.config.compute_warpgroups - 1)(give_turn)
        mask = visible(jnp.int32(0))
        plgpu.barrier_wait(scratch.key_ready.at[0])
        take_turn()
        products = scores(scratch.query.at[warpgroup], scratch.key.at[0])
        give_turn()
        plgpu.barrier_arrive(scratch.key_free.at[0])
        empty = _Softmax(full((WARPGROUP_ROWS,), -jnp.inf, ROWS), full((WARPGROUP_ROWS,), 0, ROWS))
        softmax, _, weights = self._update(empty, products, mask)
        carry = full((WARPGROUP_ROWS, self.head_dim), 0), softmax, weights.astype(self.dtype)
        carry = lax.fori_loop(1, walk.partial, lambda i, c: step_body(i, c, is_partial=True), carry)
        first_full = jnp.maximum(walk.partial, 1)
        acc, softmax, weights = lax.fori_loop(
            first_full, walk.steps, lambda i, c: step_body(i, c, is_partial=False), carry
        )
        last_slot = slot_of(walk.steps - 1)
        plgpu.barrier_wait(scratch.value_ready.at[last_slot])
        acc = accumulate(acc, weights, scratch.value.at[last_slot])
        plgpu.barrier_arrive(scratch.value_free.at[last_slot])
        pl.when(warpgroup == 0)(take_turn)
        output = scratch.output.at[warpgroup]
        plgpu.barrier_wait(scratch.output_ready.at[warpgroup])
        old_output = plgpu.load(output, layout=plgpu.Layout.WGMMA)
        plgpu.commit_smem()  # Every thread has read its part of the old output before any writes the new one.
        output[...], row_lse[...] = self._merge(acc, softmax, old_output, old_lse)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(output, state.output.at[batch, pl.ds(first_row, WARPGROUP_ROWS), head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _update(self, softmax: _Softmax, products, mask):
        """Softmax state after one key tile, what earlier sums decay by, and the tile's weights."""
        shape = products.shape
        if mask is not None:
            products = jnp.where(mask, products, -jnp.inf)
        maximum = jnp.maximum(softmax.maximum, products.max(axis=1) * self.exponent_scale)
        # A row without any visible key so far has the maximum -inf: subtract zero there instead.
        base = jnp.where(maximum == -jnp.inf, 0.0, maximum) if mask is not None else maximum
        decay = jnp.exp2(softmax.maximum - base)
        weights = jnp.exp2(products * self.exponent_scale - across_columns(base, shape))
        total = softmax.total * decay + weights.sum(axis=1)
        return _Softmax(maximum, total), decay, weights

    def _merge(self, acc, softmax: _Softmax, old_output, old_lse):
        """The running output and lse after this block."""
        old = old_lse * _LOG2_E
        maximum = jnp.maximum(softmax.maximum, old)
        base = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        new_weight, old_weight = jnp.exp2(softmax.maximum - base), jnp.exp2(old - base)
        total = softmax.total * new_weight + old_weight
        norm = 1.0 / jnp.where(total == 0.0, 1.0, total)
        output = acc * across_columns(new_weight * norm, acc.shape)
        output += old_output * across_columns(old_weight * norm, acc.shape)
        return output, (base + jnp.log2(total)) * _LN_2


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    state: AttentionState,
    mask: BlockMask,
    *,
    scale: float,
    config: ForwardConfig,
) -> AttentionState:
    """Folds one block into `state`, in place. T and S are multiples of 8 (beyond those of `mask`: padding), H of 32."""
    batch, num_queries, num_heads, head_dim = query.shape
    row_tiles = -(-num_queries // config.q_tile)
    program = _Program(
        config=config,
        num_keys=mask.k_positions.shape[0],
        num_row_tiles=row_tiles,
        group=num_heads // key.shape[2],
        head_dim=head_dim,
        dtype=query.dtype,
        is_causal=mask.is_causal,
        exponent_scale=scale * _LOG2_E,
    )
    inputs = _Inputs(
        query,
        key,
        value,
        MaskInputs.of(mask, config.q_tile, config.k_tile),
        key_ranges(mask, config.q_tile, config.k_tile),
    )
    leaves, treedef = jax.tree.flatten(inputs)

    def body(*refs, **scratch):
        *input_refs, output, lse = refs
        program.run(jax.tree.unflatten(treedef, input_refs), AttentionState(output, lse), _Scratch(**scratch))

    kernel = plgpu.kernel(
        body,
        out_type=(),
        scratch_types=_scratch(config, head_dim, query.dtype),
        grid=(num_heads, row_tiles, batch),
        grid_names=("heads", "row_tiles", "batch"),
        num_threads=config.compute_warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="ring_jax_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    padded = AttentionState(state.output, pad_last(state.lse, config.q_tile))
    output, lse = pl.run_state(lambda refs: kernel(*leaves, *refs))(padded)
    return AttentionState(output, lse[..., : state.lse.shape[-1]])


def _scratch(config: ForwardConfig, head_dim: int, dtype) -> dict:
    warpgroups, stages = config.compute_warpgroups, config.stages
    key_value = matrix_scratch((stages, config.k_tile, head_dim), dtype)
    inputs = (matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), dtype), key_value, key_value)
    output = matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), jnp.float32)
    return _Scratch(
        tiles=(inputs, output) if config.early_state else plgpu.RefUnion(inputs, output),
        query_ready=plgpu.Barrier(num_barriers=warpgroups),
        key_ready=plgpu.Barrier(num_barriers=stages),
        value_ready=plgpu.Barrier(num_barriers=stages),
        output_ready=plgpu.Barrier(num_barriers=warpgroups),
        key_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        value_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=warpgroups),
    )._asdict()
