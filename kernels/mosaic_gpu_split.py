"""How the last of the Hopper backward's equal programs are shared, so that none rests while a few of them end.

A program is a tile of keys of one head, and its steps are tiles of queries. What is left over when all multiprocessors
have had equally many programs is split into pieces, programs of their own that take some of the steps each.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from .contract import BlockMask
from .mosaic_gpu_primitives import Ref
from .tiles import TileRanges

# Programs that run at a time on an H100 SXM or an H200, one for each multiprocessor.
MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Split:
    """Tiles of the last head, the last `tiles` that see anything: `pieces` programs share the steps of each."""

    tiles: int
    pieces: int


@dataclasses.dataclass(frozen=True)
class SplitCosts:
    """What a program does beside its steps, in steps that take as long.

    `program` is before its first and after its last one; sharing takes `sharing` for all of them.
    """

    program: float
    sharing: float


def split_of(
    mask: BlockMask, num_heads: int, tiles: int, batch: int, num_steps: int, costs: SplitCosts
) -> Split | None:
    """The split of programs that are `tiles` for each of `num_heads` heads, each up to `num_steps` long; None for none.

    They are split if that saves more than 1 % of the time. A block off the diagonal is half full: all keys are seen by
    half of the queries, or half of the keys by all of them.
    """
    if mask.has_uneven_tiles or mask.q_segment_ids is not None:
        return None
    if not mask.is_causal:
        return _split_of_equals(num_heads, tiles, batch, num_steps, costs)
    of_all = _split_of_equals(num_heads, tiles, batch, num_steps // 2, costs)
    of_half = _split_of_equals(num_heads, tiles // 2, batch, num_steps, costs)
    if of_all is None or of_half is None:
        return of_all or of_half
    return Split(max(of_all.tiles, of_half.tiles), max(of_all.pieces, of_half.pieces))


def _split_of_equals(num_heads: int, tiles: int, batch: int, num_steps: int, costs: SplitCosts) -> Split | None:
    """`split_of` where every program takes `num_steps` steps."""
    num_programs = num_heads * tiles * batch
    left_over = num_programs % MULTIPROCESSORS
    last_tiles = -(-left_over // batch)
    if not left_over or last_tiles > tiles:
        return None

    def steps_of(pieces: int) -> float:
        """Steps that one multiprocessor after another does of the last programs, each of so many pieces."""
        rounds = -(-last_tiles * batch * pieces // MULTIPROCESSORS)
        return rounds * (num_steps / pieces + costs.program) + (costs.sharing if pieces > 1 else 0.0)

    pieces = min(range(1, 1 + max(1, min(MULTIPROCESSORS, num_steps))), key=steps_of)
    all_steps = -(-num_programs // MULTIPROCESSORS) * (num_steps + costs.program)
    return Split(last_tiles, pieces) if steps_of(1) - steps_of(pieces) > all_steps / 100 else None


class Share(NamedTuple):
    """A program's share of its tile's steps: one of `pieces`, 1 where they are not shared.

    `tile` is its place among the shared tiles, those of a batch's entries side by side.
    """

    piece: jax.Array
    pieces: jax.Array
    tile: jax.Array


class Place(NamedTuple):
    """A program's entry of the batch, its head and its tile."""

    batch: jax.Array
    head: jax.Array
    tile: jax.Array


def first_shared_tile(mask: BlockMask, ranges: TileRanges, split: Split) -> Int32[Array, "1"]:
    """The first of the tiles whose steps are shared: the last ones that see anything, or the first if few do."""
    sees = ranges.end > ranges.start if mask.block is None else (ranges.end > ranges.start)[mask.block]
    last = jnp.max(jnp.where(sees, jnp.arange(1, 1 + sees.shape[-1], dtype=jnp.int32), 0))
    return jnp.maximum(last - split.tiles, 0)[None]


def num_programs(split: Split, num_heads: int, tiles: int, batch: int) -> int:
    """Programs of the grid's only dim where some tiles are shared."""
    return batch * (num_heads * tiles + split.tiles * (split.pieces - 1))


def place_and_share(
    split: Split, first_shared: Ref, program: jax.Array, *, num_heads: int, tiles: int, batch: int
) -> tuple[Place, Share]:
    """Where a program of the grid's only dim is, given the reference to `first_shared_tile`.

    The grid ends with the pieces of the shared tiles: those of one tile far apart, those of the tiles beside it side by
    side.
    """
    shared = split.tiles * batch
    before_shared = ((num_heads - 1) * tiles + first_shared[0]) * batch
    piece = program - (num_heads * tiles * batch - shared)
    is_whole, tile = piece < 0, lax.rem(piece, shared)
    row = jnp.where(is_whole, jnp.where(program < before_shared, program, program + shared), before_shared + tile)
    share = Share(
        jnp.where(is_whole, 0, piece // shared),
        jnp.where(is_whole, 1, split.pieces),
        jnp.where(is_whole, 0, tile),
    )
    return Place(lax.rem(row, batch), row // (batch * tiles), lax.rem(row // batch, tiles)), share
