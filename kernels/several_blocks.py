"""Several blocks that a kernel takes at once: in what order it takes their keys, and kernels that know one block only.

A step of a ring reads and writes all of the running state, and backward all gradients of the queries. Where shards are
short that is a large part of its time, and less of it the more blocks it takes. Their keys are folded: first the first
halves of all blocks in order, then the second halves, the last block's first. In a zigzag ring a step takes the blocks
of ranks that follow one another downwards, as they come in hops of one, two, three places. What a query sees of them is
then one run of keys, as it is of one block, also where they go on from rank 0 with the last rank.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Shaped

from .contract import AttentionState, BlockKernel, Gradients


def folded(blocks: Sequence[Shaped[Array, "..."]], dim: int = 0) -> Shaped[Array, "..."]:
    """What belongs to the blocks' keys, in the order in which a kernel takes them; `dim` is that of the keys."""
    if len(blocks) == 1:
        return blocks[0]
    halves = [jnp.split(x, [x.shape[dim] // 2], axis=dim) for x in blocks]
    return jnp.concatenate([first for first, _ in halves] + [second for _, second in reversed(halves)], axis=dim)


def unfolded(folded: Shaped[Array, "..."], num_blocks: int, dim: int = 0) -> tuple[Shaped[Array, "..."], ...]:
    """Each block's part of something in the order of `folded`."""
    length = folded.shape[dim] // num_blocks
    half = length // 2
    ends = [half * (i + 1) for i in range(num_blocks)] + [
        half * num_blocks + (length - half) * i for i in range(1, num_blocks)
    ]
    parts = jnp.split(folded, ends, axis=dim)
    pairs = zip(parts[:num_blocks], reversed(parts[num_blocks:]), strict=True)
    return tuple(jnp.concatenate(pair, axis=dim) for pair in pairs)


def block_of_tile(tile: jax.Array, tiles_of_block: int, num_blocks: int) -> tuple[jax.Array, jax.Array]:
    """The block that a tile of folded keys belongs to, and the tile's number in it."""
    if num_blocks == 1:
        return jnp.int32(0), tile
    half = jnp.int32(tiles_of_block // 2)
    place, tile_of_half = lax.div(tile, half), lax.rem(tile, half)
    is_first = place < num_blocks
    block = jnp.where(is_first, place, 2 * num_blocks - 1 - place)
    return block, tile_of_half + jnp.where(is_first, 0, half)


def for_block(block: jax.Array, num_blocks: int, use: Callable[[int], None]) -> None:
    """In a kernel: calls `use` with the number of one of a few blocks, found by halving."""

    def choose(first: int, end: int) -> None:
        if end - first == 1:
            use(first)
            return
        middle = (first + end) // 2
        # As one branch of two sides it would spill registers.
        pl.when(block < middle)(lambda: choose(first, middle))
        pl.when(block >= middle)(lambda: choose(middle, end))

    choose(0, num_blocks)


@dataclasses.dataclass(frozen=True)
class SeveralAsOne:
    """A kernel that knows of one block only. Several are given to it as one, put together in memory."""

    kernel: BlockKernel

    def forward(self, query: Array, key: Any, value: Any, *args: Any, **options: Any) -> AttentionState:
        return self.kernel.forward(query, _as_one(key), _as_one(value), *args, **options)

    def backward(self, query: Array, key: Any, value: Any, *args: Any, **options: Any) -> Gradients:
        if not isinstance(key, tuple):
            return self.kernel.backward(query, key, value, *args, **options)
        d_out, lse, delta, dq, sums, mask = args
        arrays = query, _as_one(key), _as_one(value), d_out, lse, delta, dq, folded(sums, dim=2)
        result = self.kernel.backward(*arrays, mask, **options)
        assert not isinstance(result.sums, tuple)
        return result._replace(sums=unfolded(result.sums, len(key), dim=2))

    def finished_d_query(self, dq: Array, *, scale: float) -> Array:
        return self.kernel.finished_d_query(dq, scale=scale)


def _as_one(blocks: Any) -> Array:
    return folded(blocks, dim=1) if isinstance(blocks, tuple) else blocks
