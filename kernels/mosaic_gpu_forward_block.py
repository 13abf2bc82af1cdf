"""What one program of the forward kernel on Hopper works on: its inputs, its shared memory, and what is fixed of it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from .mosaic_gpu_choices import ForwardConfig
from .mosaic_gpu_masks import MaskInputs
from .mosaic_gpu_primitives import WARPGROUP_ROWS, Ref, matrix_scratch, one_place, slot_of
from .mosaic_gpu_queue import PIECE_NUMBERS, Queue, Work
from .mosaic_gpu_softmax import Softmax
from .tiles import TileRanges

# A program's next piece of work is looked up, and its queries are copied, while the one before is computed with.
_PIECE_SLOTS = 2


class Inputs(NamedTuple):
    """Arrays (outside) or references (inside) that the kernel reads."""

    query: Float[Array, "B T N H"]
    # Of one block, or of several that are taken at once.
    keys: tuple[Float[Array, "B S K H"], ...]
    values: tuple[Float[Array, "B S K H"], ...]
    mask: MaskInputs
    ranges: TileRanges
    work: Work | None


class Partial(NamedTuple):
    """Where a range of steps leaves its part of a query tile for the range that has the tile's end.

    `sums`, float32 `[ranges, warpgroups, 64, H]`, are not normalized; `statistics`, `[ranges, warpgroups, 2, 64]`, are
    the fields of `Softmax`.
    """

    sums: Ref
    statistics: Ref


class Scratch(NamedTuple):
    """Shared memory and barriers of one program. `*_ready` count a copy's arrival, `*_free` the readers' leaving."""

    # Queries, keys and values; and the output: the running one on its way in, and the new one on its way out.
    tiles: Ref
    # Running logsumexps of two pieces: those of one are read after the next one's have been copied.
    lse: Ref
    # The numbers of two pieces, and one on its way from a thread to the others of its warpgroup.
    numbers: Ref
    piece_ready: Ref
    query_ready: Ref
    key_ready: Ref
    value_ready: Ref
    output_ready: Ref
    piece_free: Ref
    query_free: Ref
    key_free: Ref
    value_free: Ref
    output_free: Ref

    @property
    def query(self) -> Ref:
        return self.tiles[0][0]

    @property
    def key(self) -> Ref:
        return self.tiles[0][1]

    @property
    def value(self) -> Ref:
        return self.tiles[0][2]

    @property
    def output(self) -> Ref:
        return self.tiles[1][0]

    @property
    def taken(self) -> Ref:
        """Where the number of an entry goes from the thread that took it to the others."""
        return self.numbers.at[_PIECE_SLOTS, 0]

    def piece_slot(self, number: jax.Array) -> jax.Array:
        """Which of the barriers and places of pieces belong to one."""
        return slot_of(number, _PIECE_SLOTS)

    def numbers_of_piece(self, number: jax.Array) -> Ref:
        """Where the numbers of a piece are."""
        return self.numbers.at[self.piece_slot(number)]

    def running_lse(self, number: jax.Array, warpgroup: jax.Array | int) -> Ref:
        """The running logsumexps of a warpgroup's rows of a piece."""
        return self.lse.at[self.piece_slot(number), warpgroup]

    def rounded_output(self, warpgroup: jax.Array) -> Ref:
        """Where a warpgroup's output lies in the inputs' dtype, in half of the place of its running output."""
        return self.tiles[1][1].at[2 * warpgroup]


@dataclasses.dataclass(frozen=True)
class Block:
    """Shapes and static choices of the kernel; `exponent_scale` turns products into powers of two."""

    config: ForwardConfig
    queue: Queue
    num_keys: int
    # Query heads for one key/value head.
    group: int
    head_dim: int
    dtype: jnp.dtype
    is_causal: bool
    exponent_scale: float
    has_segments: bool
    has_state: bool
    is_last: bool

    @property
    def can_skip_mask(self) -> bool:
        """Whether a piece's first tile is computed without the mask if it is full: elsewhere registers are short."""
        has_registers = self.config.early_state and self.config.compute_warpgroups == 2 and not self.has_segments
        return has_registers and not self.is_all_full

    @property
    def is_all_full(self) -> bool:
        """Whether every query surely sees every key of every tile."""
        return not self.is_causal and not self.has_segments and self.num_keys % self.config.k_tile == 0

    @property
    def in_place(self) -> bool:
        return self.has_state and not self.is_last

    @property
    def is_rounded_merged(self) -> bool:
        """Whether the new output is of another dtype than the running one, whose place it takes."""
        return self.has_state and self.is_last

    def scratch_types(self) -> dict:
        """What `Scratch` is made of, by its fields' names."""
        config, head_dim = self.config, self.head_dim
        warpgroups, stages = config.compute_warpgroups, config.stages
        key_value = matrix_scratch((stages, config.k_tile, head_dim), self.dtype)
        inputs = (matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), self.dtype), key_value, key_value)
        running_dtype = self.dtype if self.is_last and not self.has_state else jnp.float32
        output = matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), running_dtype)
        rounded = matrix_scratch((2 * warpgroups, WARPGROUP_ROWS, head_dim), self.dtype)
        outputs = one_place(output, rounded) if self.is_rounded_merged else (output,)
        return Scratch(
            tiles=(inputs, outputs) if config.early_state else plgpu.RefUnion(inputs, outputs),
            lse=plgpu.SMEM((_PIECE_SLOTS, warpgroups, WARPGROUP_ROWS), jnp.float32),
            numbers=plgpu.SMEM((_PIECE_SLOTS + 1, PIECE_NUMBERS), jnp.int32),
            piece_ready=plgpu.Barrier(num_barriers=_PIECE_SLOTS),
            query_ready=plgpu.Barrier(num_arrivals=2 if self.has_state else 1, num_barriers=warpgroups),
            key_ready=plgpu.Barrier(num_barriers=stages),
            value_ready=plgpu.Barrier(num_barriers=stages),
            output_ready=plgpu.Barrier(num_barriers=warpgroups),
            piece_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=_PIECE_SLOTS),
            query_free=plgpu.Barrier(num_barriers=warpgroups),
            key_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            value_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            output_free=plgpu.Barrier(num_barriers=warpgroups),
        )._asdict()

    def partial_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arrays of a `Partial`, in the order of its fields; none if no range of steps is an entry of the queue."""
        if not self.queue.num_ranges:
            return ()
        ranges = (self.queue.num_ranges, self.config.compute_warpgroups)
        shapes = (*ranges, WARPGROUP_ROWS, self.head_dim), (*ranges, len(Softmax._fields), WARPGROUP_ROWS)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
