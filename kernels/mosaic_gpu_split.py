"""How the last of the Hopper backward's equal programs are shared, so that none rests while a few of them end.

A program is a tile of keys of one head, and its steps are tiles of queries. What is left over when all multiprocessors
have had equally many whole tiles is split: several programs share the steps of each of those tiles. If most of the
multiprocessors have one tile left, each takes most of it, and the others what remains of all.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from .contract import BlockMask
from .tiles import TileRanges

# Programs that run at a time on an H100 SXM or an H200, one for each multiprocessor.
MULTIPROCESSORS = 132
# Splits that are looked at: each piece leaves what it has found in memory of its own, and more save little.
_MAX_UNITS, _MAX_PIECES_OF_EACH_MULTIPROCESSOR = 64, 2


@dataclasses.dataclass(frozen=True)
class Split:
    """The last `tiles` that see anything are shared: of `units` equal parts the first program takes `long`.

    The others take one each, after the first programs of all tiles.
    """

    tiles: int
    units: int
    long: int

    @property
    def pieces(self) -> int:
        """Programs that share a tile."""
        return self.units - self.long + 1


@dataclasses.dataclass(frozen=True)
class SplitCosts:
    """What a program does beside its steps, in steps that take as long.

    `program` is before its first and after its last one. A piece takes `sharing` to leave what it has found, and the
    last one of a tile as long for each of them to add them up.
    """

    program: float
    sharing: float


class Numbers(NamedTuple):
    """What programs need to know: which tiles of a head see anything, how many of all are shared, and how.

    One number each, or of a mask with a stack of blocks one for each of them.
    """

    first_seen: Int32[Array, " blocks"]
    seen: Int32[Array, " blocks"]
    shared: Int32[Array, " blocks"]
    units: Int32[Array, " blocks"]
    long: Int32[Array, " blocks"]


class Share(NamedTuple):
    """A program's share of its tile's steps: of `units` equal parts those from `first` to before `end`.

    `pieces` programs share the tile, 1 if it is not shared; this one is number `piece` of them, and the tile number
    `tile` of the `tiles` that are shared.
    """

    first: jax.Array
    end: jax.Array
    units: jax.Array
    piece: jax.Array
    pieces: jax.Array
    tile: jax.Array
    tiles: jax.Array

    @property
    def place(self) -> jax.Array:
        """The program's own place among those of all that share tiles."""
        return self.tile + self.piece * self.tiles


class Place(NamedTuple):
    """A program's entry of the batch, its head and its tile; where `exists` is false there is nothing for it to do."""

    batch: jax.Array
    head: jax.Array
    tile: jax.Array
    exists: jax.Array


@dataclasses.dataclass(frozen=True)
class Splits:
    """How the last programs are shared, which are `tiles` for each of `num_heads` heads of `batch` sequences.

    `by_seen` has a split for each number of a head's tiles that may see anything.
    """

    num_heads: int
    tiles: int
    batch: int
    by_seen: tuple[tuple[int, Split], ...]

    @classmethod
    def of(
        cls, mask: BlockMask, num_heads: int, tiles: int, batch: int, num_steps: int, costs: SplitCosts
    ) -> "Splits | None":
        """The splits of programs that are up to `num_steps` long; None for none.

        They are split if that saves more than 1 % of the time. A block off the diagonal is half full: all keys are seen
        by half of the queries, or half of the keys by all of them.
        """
        if mask.has_uneven_tiles or mask.q_segment_ids is not None:
            return None
        steps_by_seen = {tiles // 2: num_steps, tiles: num_steps // 2} if mask.is_causal else {tiles: num_steps}
        splits = {
            seen: _split_of_equals(num_heads * seen * batch, steps, costs, MULTIPROCESSORS)
            for seen, steps in steps_by_seen.items()
        }
        by_seen = tuple((seen, split) for seen, split in splits.items() if split is not None)
        return cls(num_heads, tiles, batch, by_seen) if by_seen else None

    @property
    def shared(self) -> int:
        """Tiles that are shared, at most."""
        return max(split.tiles for _, split in self.by_seen)

    @property
    def places(self) -> int:
        """Programs that share a tile with others, at most."""
        return max(split.tiles * split.pieces for _, split in self.by_seen)

    @property
    def num_programs(self) -> int:
        """Programs of the grid's only dim."""
        return self.num_heads * self.tiles * self.batch + max(s.tiles * (s.pieces - 1) for _, s in self.by_seen)

    def numbers(self, ranges: TileRanges) -> Numbers:
        """The numbers that programs need, from the query ranges of a mask."""
        sees, tile = ranges.end > ranges.start, jnp.arange(self.tiles, dtype=jnp.int32)
        first = jnp.min(jnp.where(sees, tile, self.tiles), axis=-1)
        seen = jnp.maximum(jnp.max(jnp.where(sees, tile + 1, 0), axis=-1) - first, 0)
        shared, units, long = jnp.zeros_like(seen), jnp.ones_like(seen), jnp.ones_like(seen)
        for number, split in self.by_seen:
            values = (split.tiles, split.units, split.long)
            shared, units, long = (
                jnp.where(seen == number, value, x) for value, x in zip(values, (shared, units, long), strict=True)
            )
        return Numbers(first, seen, shared, units, long)

    def place_and_share(self, numbers: Numbers, program: jax.Array) -> tuple[Place, Share]:
        """Where a program of the grid's only dim is, given the numbers of its block.

        First come the tiles that see nothing: what they write is on its way while others compute. Then whole tiles,
        then the shared ones' first pieces, their second ones and so on.
        """
        first_seen, seen, shared, units, long = numbers
        pieces, rows = units - long + 1, self.num_heads * self.batch
        hidden, whole = rows * (self.tiles - seen), rows * seen - shared
        is_hidden, index = program < hidden, program - hidden - whole
        is_whole = ~is_hidden & (index < 0)
        exists = index < shared * pieces
        index, shares = jnp.maximum(index, 0), jnp.maximum(shared, 1)
        piece, tile = index // shares, lax.rem(index, shares)
        row = jnp.where(is_hidden, program, jnp.where(is_whole, program - hidden, whole + tile))
        a_head = jnp.maximum(jnp.where(is_hidden, self.tiles - seen, seen), 1)
        of_head = lax.rem(row // self.batch, a_head)
        before = jnp.where(is_hidden, jnp.where(of_head < first_seen, 0, seen), first_seen)
        place = Place(
            *(lax.rem(row, self.batch), jnp.where(exists, row // (self.batch * a_head), 0)),
            *(jnp.where(exists, of_head + before, 0), exists),
        )
        is_shared = ~(is_whole | is_hidden)
        share = Share(
            first=jnp.where(is_shared & (piece > 0), long + piece - 1, 0),
            end=jnp.where(is_shared, long + piece, units),
            units=units,
            piece=piece,
            pieces=jnp.where(is_shared, pieces, 1),
            tile=tile,
            tiles=shared,
        )
        return place, share


@functools.lru_cache(maxsize=256)
def _split_of_equals(num_programs: int, num_steps: int, costs: SplitCosts, multiprocessors: int) -> Split | None:
    """The split of programs that take `num_steps` steps each; None if it would not save more than 1 % of the time."""
    tiles = num_programs % multiprocessors
    if not tiles or num_steps < 2:
        return None
    candidates = (
        Split(tiles, units, units - pieces + 1)
        for pieces in range(2, _MAX_PIECES_OF_EACH_MULTIPROCESSOR * multiprocessors // tiles + 1)
        for units in range(pieces, min(max(_MAX_UNITS, pieces), num_steps) + 1)
    )
    best = min(candidates, key=lambda split: _time(split, num_steps, costs, multiprocessors), default=None)
    if best is None:
        return None
    unsplit = num_steps + costs.program
    all_steps = -(-num_programs // multiprocessors) * unsplit
    return best if unsplit - _time(best, num_steps, costs, multiprocessors) > all_steps / 100 else None


def _time(split: Split, num_steps: int, costs: SplitCosts, multiprocessors: int) -> float:
    """When the last piece ends, in steps, if each multiprocessor takes the next one as soon as it has none."""
    beside = costs.program + costs.sharing
    long, short = (units * num_steps / split.units + beside for units in (split.long, 1))
    left = split.tiles * (split.pieces - 1)
    free = multiprocessors - split.tiles
    # In units of the short ones: how many end until the long ones do, and how many more are then to come.
    meanwhile = min(left, free * int(long // short))
    end = long if meanwhile == left else _end_of_rest(left - meanwhile, long, short, split.tiles, free)
    return end + costs.sharing * split.pieces


def _end_of_rest(left: int, long: float, short: float, tiles: int, free: int) -> float:
    """When the last of so many short pieces ends, if those that ended before the long ones are not counted."""
    of_free, of_tiles = (long // short + 1) * short, long + short
    while True:
        end = min(of_free, of_tiles)
        left -= free if of_free <= of_tiles else tiles
        if left <= 0:
            return end
        of_free, of_tiles = (of_free + short, of_tiles) if of_free <= of_tiles else (of_free, of_tiles + short)
