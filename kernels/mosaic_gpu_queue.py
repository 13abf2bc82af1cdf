"""What the programs of the forward kernel on Hopper take, and in what order.

As many programs begin as an H100 SXM or an H200 has multiprocessors, and each takes one entry of a queue after the
other until there are none; or several waves of them, of which all but the last end after their share. An entry is a
query tile of one head, with all key tiles that it sees. Where all of them take equally long, what is left over when
every multiprocessor has had equally many would keep only some of them busy: those tiles' steps are laid end to end and
cut into equal ranges, one for each multiprocessor, and the last entries are these ranges. Where tiles are of two
lengths, as in a step of a ring that takes blocks from before and from behind the queries, that is done with the longer
ones first, and then with the shorter ones.

A range gives up to two pieces of work. The first of them is the beginning of a tile's steps, left for the program that
has their end; the second the end of the tile before, which is merged with what others have left. So programs wait only
for entries before their own, which have been taken before: of all that are not done the first waits for nothing.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from . import mosaic_gpu_split
from .mosaic_gpu_inline import take_number
from .mosaic_gpu_masks import Walk
from .mosaic_gpu_primitives import Ref, is_interpreted
from .tiles import TileRanges

# Steps that leaving and merging sums take as long as: ranges must save more.
_SHARING_STEPS = 4


class Work(NamedTuple):
    """What there is to do in a block, where query tiles that see anything are of at most two lengths.

    Of each kind, the longer one first, there are `tiles` from `first_tile` on, each `steps` key tiles. The first
    `whole` of its `entries` of the queue are tiles, the others ranges of `range_steps` steps of the `left_over` tiles.
    Together they are the `seeing` tiles from `first_seeing` on. Of a mask with a stack of blocks all numbers are those
    of each block.
    """

    first_tile: Int32[Array, "blocks kinds"]
    tiles: Int32[Array, "blocks kinds"]
    steps: Int32[Array, "blocks kinds"]
    whole: Int32[Array, "blocks kinds"]
    left_over: Int32[Array, "blocks kinds"]
    range_steps: Int32[Array, "blocks kinds"]
    entries: Int32[Array, "blocks kinds"]
    first_seeing: Int32[Array, " blocks"]
    seeing: Int32[Array, " blocks"]


class Piece(NamedTuple):
    """A query tile of one head and the steps of it that one program takes; without any, none is left.

    What is found is left in the place of range `left_by` for another program, unless that is -1. Before it becomes the
    output, what the ranges from `merge_first` to before `merge_end` have left is added.
    """

    batch: jax.Array
    head: jax.Array
    tile: jax.Array
    walk: Walk
    left_by: jax.Array
    merge_first: jax.Array
    merge_end: jax.Array

    @classmethod
    def read(cls, numbers: Ref) -> "Piece":
        """A piece from shared memory."""
        batch, head, tile, *walk, left_by, merge_first, merge_end = (numbers[i] for i in range(PIECE_NUMBERS))
        return cls(batch, head, tile, Walk(*walk), left_by, merge_first, merge_end)

    def write(self, numbers: Ref) -> None:
        """Writes a piece to shared memory."""
        for i, number in enumerate(jax.tree.leaves(self)):
            numbers[i] = number


PIECE_NUMBERS = len(Piece._fields) - 1 + len(Walk._fields)


class Position(NamedTuple):
    """The entry of the queue that a program took last, and of a range with more to come the steps taken so far."""

    entry: jax.Array
    done: jax.Array


@dataclasses.dataclass(frozen=True)
class Queue:
    """The queue of a block of `tiles` query tiles of `num_heads` heads of `batch` sequences.

    The tiles of `heads_together` heads stand side by side, those of their last tile first. With `visits_empty` tiles
    that see no key are given one all the same. Left-over tiles are shared where they are of up to `lengths` lengths,
    never if it is 0. `programs` run at a time and take from the queue, in `waves` one after the other; with `is_fixed`
    equally many entries each, with `one_each` a single one. `is_fixed` is for the interpreter too, which has no counter
    that programs share.
    """

    num_heads: int
    tiles: int
    batch: int
    programs: int
    waves: int
    lengths: int
    heads_together: int
    visits_empty: bool
    one_each: bool
    is_fixed: bool

    @classmethod
    def of(
        cls,
        num_heads: int,
        tiles: int,
        batch: int,
        *,
        heads_together: int,
        visits_empty: bool,
        range_steps: int | None,
        waves: int,
        one_each: bool,
        lengths: int = 1,
    ) -> "Queue":
        """The queue for `waves` times as many programs as run at a time, or `one_each` for one for every entry.

        Of tiles of one length, or of each of two `lengths`, the last entries can be ranges of their steps, which have
        up to `range_steps`, unless that is None.
        """
        entries = num_heads * tiles * batch
        if one_each:
            return cls(num_heads, tiles, batch, entries, 1, 0, heads_together, visits_empty, one_each, is_fixed=True)
        programs = min(mosaic_gpu_split.MULTIPROCESSORS, entries * (range_steps or 1))
        shape = num_heads, tiles, batch, programs, waves, 0 if range_steps is None else lengths
        return cls(*shape, heads_together, visits_empty, one_each, is_fixed=is_interpreted())

    def work(self, ranges: TileRanges) -> Work | None:
        """The numbers that programs need, from the key ranges of a mask; None if the shapes say it all."""
        if not self.num_ranges:
            return None
        steps = ranges.end - ranges.start
        tile = jnp.arange(self.tiles, dtype=jnp.int32)
        first_seeing, seeing = _run(steps > 0, tile)
        lengths = jnp.max(steps, axis=-1, keepdims=True)
        if self.lengths == 2:
            shorter = jnp.max(jnp.where(steps < lengths, steps, 0), axis=-1, keepdims=True)
            lengths = jnp.concatenate([lengths, shorter], axis=-1)
        is_of_kind = (steps[:, None] == lengths[..., None]) & (lengths[..., None] > 0)
        first, tiles = _run(is_of_kind, tile)
        # With more lengths or with gaps all tiles are of one kind, and none is shared.
        are_known = jnp.all(tiles == is_of_kind.sum(-1, dtype=jnp.int32), axis=-1) & (tiles.sum(-1) == seeing)
        are_known, is_longer = are_known[:, None], jnp.arange(lengths.shape[-1]) == 0
        first = jnp.where(are_known, first, first_seeing[:, None])
        tiles = jnp.where(are_known, tiles, jnp.where(is_longer, seeing[:, None], 0))
        all_tiles = tiles * self.num_heads * self.batch
        left_over = lax.rem(all_tiles, jnp.int32(self.programs))
        range_steps = -(-left_over * lengths // self.programs)
        is_worth_it = are_known & (lengths - range_steps > _SHARING_STEPS)
        left_over = jnp.where(is_worth_it, left_over, 0)
        whole, one = all_tiles - left_over, jnp.int32(1)
        # Divisors, also where nothing is visible and nothing will be asked of them.
        tiles, lengths, range_steps = (jnp.maximum(x, one) for x in (tiles, lengths, range_steps))
        entries = whole + (left_over * lengths + range_steps - 1) // range_steps
        return Work(first, tiles, lengths, whole, left_over, range_steps, entries, first_seeing, seeing)

    @property
    def num_ranges(self) -> int:
        """How many ranges there can be."""
        return self.lengths * self.programs

    @property
    def num_programs(self) -> int:
        """The programs of the grid."""
        return self.programs * self.waves

    def begin(self, inputs: Any) -> tuple[Position, jax.Array]:
        """A program's position before its first entry, and the end of the entries that are for it."""
        program = lax.axis_index("programs")
        entries = jnp.int32(self.num_heads * self.tiles * self.batch)
        if self.num_ranges:
            block = self._block_of_work(inputs)
            entries = self._entries_that_see(inputs, block)
            if self.visits_empty:
                entries += (self.tiles - inputs.work.seeing[block]) * (self.num_heads * self.batch)
        if self.is_fixed:
            each, more = entries // self.num_programs, lax.rem(entries, jnp.int32(self.num_programs))
            first, end = (number * each + jnp.minimum(number, more) for number in (program, program + 1))
            return Position(first - 1, jnp.int32(0)), end
        return Position(jnp.int32(-1), jnp.int32(0)), entries

    def write_next(
        self,
        inputs: Any,
        position: Position,
        end: jax.Array,
        number: jax.Array,
        counter: Ref | None,
        taken: Ref,
        numbers: Ref,
    ) -> tuple[Position, jax.Array]:
        """Writes a program's next piece that has steps to `numbers` in shared memory, and returns where it is.

        If there is none for a program that has had `number` pieces, one without steps is written. Returns the steps,
        too. `counter` is shared by all programs, `taken` an int32 in shared memory.
        """

        def look(carry: tuple[Position, jax.Array]) -> tuple[Position, jax.Array]:
            position, _ = carry
            entry = lax.cond(
                position.done == 0, lambda: self._next_entry(position.entry, counter, taken), lambda: position.entry
            )
            index = jnp.clip(entry, 0, jnp.maximum(end - 1, 0))
            piece, done = self._piece(inputs, Position(index, position.done))
            steps = jnp.where(entry < end, piece.walk.steps, 0)
            piece._replace(walk=piece.walk._replace(steps=steps)).write(numbers)
            return Position(entry, done), steps

        def find() -> tuple[Position, jax.Array]:
            looked = look((position, jnp.int32(0)))
            return lax.while_loop(lambda carry: (carry[1] == 0) & (carry[0].entry < end), look, looked)

        def stop() -> tuple[Position, jax.Array]:
            zero = jnp.int32(0)
            Piece(zero, zero, zero, Walk(*[zero] * len(Walk._fields)), zero, zero, zero).write(numbers)
            return position, zero

        if self.waves == 1 or self.is_fixed:
            return find()
        is_of_last_wave = lax.axis_index("programs") >= self.programs * (self.waves - 1)
        return lax.cond(is_of_last_wave | (number < end // self.num_programs) | (position.done > 0), find, stop)

    def _block_of_work(self, inputs: Any) -> jax.Array | int:
        return 0 if inputs.work.steps.shape[0] == 1 else inputs.mask.block[0]

    def _entries_that_see(self, inputs: Any, block: jax.Array | int) -> jax.Array:
        """How many entries are tiles that see anything, or ranges; tiles that see nothing follow them."""
        of_kind = inputs.work.entries
        return of_kind[block, 0] if self.lengths == 1 else of_kind[block, 0] + of_kind[block, 1]

    def _next_entry(self, entry: jax.Array, counter: Ref | None, taken: Ref) -> jax.Array:
        if self.is_fixed:
            return entry + 1
        return take_number(counter, taken)

    def _piece(self, inputs: Any, position: Position) -> tuple[Piece, jax.Array]:
        """The piece at a position, and the steps of its range taken with it and before, 0 if these are all."""
        if not self.num_ranges:
            return self._tile_of_all(inputs, position.entry)
        kind, block, of_its_kind = jnp.int32(0), self._block_of_work(inputs), position
        if self.lengths == 2:
            longer = inputs.work.entries[block, 0]
            kind = (position.entry >= longer).astype(jnp.int32)
            of_its_kind = position._replace(entry=position.entry - kind * longer)
        if not self.visits_empty:
            return self._tile_or_part(inputs, kind, of_its_kind)
        hidden = position.entry - self._entries_that_see(inputs, block)
        return lax.cond(
            hidden < 0,
            lambda: self._tile_or_part(inputs, kind, of_its_kind),
            lambda: self._hidden_tile(inputs, jnp.maximum(hidden, 0)),
        )

    def _tile_or_part(self, inputs: Any, kind: jax.Array, position: Position) -> tuple[Piece, jax.Array]:
        """The piece at a position among the entries of one kind of tiles."""
        block = self._block_of_work(inputs)
        work = Work(*(field[block] if field.ndim == 1 else field[block, kind] for field in inputs.work))
        index = position.entry - work.whole
        is_whole = index < 0
        low = index * work.range_steps
        limit = jnp.minimum(low + work.range_steps, work.left_over * work.steps)
        shared = (limit - position.done - 1) // work.steps
        # Steps of the shared tile: the range's first, the piece's first, and the end of both.
        low, high = low - shared * work.steps, limit - position.done - shared * work.steps
        first = jnp.maximum(low, 0)
        row = jnp.maximum(jnp.where(is_whole, position.entry, work.whole + shared), 0)
        batch, head = self._batch_and_head(row // work.tiles)
        tile = jnp.minimum(work.first_tile + lax.rem(row, work.tiles), self.tiles - 1)
        walk = self._walk(inputs, batch, tile)
        walk = walk.part(jnp.where(is_whole, 0, first), jnp.where(is_whole, walk.steps, high - first))
        is_left = ~is_whole & (high < work.steps)
        is_merged = ~is_whole & ~is_left & (first > 0)
        of_kind = kind * self.programs
        piece = Piece(
            *(batch, head, tile, walk),
            left_by=jnp.where(is_left, of_kind + index, -1),
            merge_first=jnp.where(is_merged, of_kind + shared * work.steps // work.range_steps, 0),
            merge_end=jnp.where(is_merged, of_kind + index, 0),
        )
        return piece, jnp.where(is_whole | (first == low), 0, position.done + high - first)

    def _hidden_tile(self, inputs: Any, number: jax.Array) -> tuple[Piece, jax.Array]:
        """One of the tiles before and behind those that see anything."""
        work, block = inputs.work, self._block_of_work(inputs)
        a_head = jnp.maximum(self.tiles - work.seeing[block], 1)
        place = lax.rem(number, a_head)
        tile = jnp.where(place < work.first_seeing[block], place, place + work.seeing[block])
        return self._whole_tile(inputs, *self._batch_and_head(number // a_head), tile)

    def _tile_of_all(self, inputs: Any, entry: jax.Array) -> tuple[Piece, jax.Array]:
        """The piece of an entry where all of them are tiles. The last rows have most keys, if any have more."""
        of_group = self.heads_together * self.tiles
        group, place = entry // of_group, lax.rem(entry, jnp.int32(of_group))
        heads = jnp.minimum(self.num_heads * self.batch - group * self.heads_together, self.heads_together)
        batch, head = self._batch_and_head(group * self.heads_together + lax.rem(place, heads))
        return self._whole_tile(inputs, batch, head, self.tiles - 1 - place // heads)

    def _whole_tile(self, inputs: Any, batch: jax.Array, head: jax.Array, tile: jax.Array) -> tuple[Piece, jax.Array]:
        zero = jnp.int32(0)
        return Piece(batch, head, tile, self._walk(inputs, batch, tile), zero - 1, zero, zero), zero

    def _walk(self, inputs: Any, batch: jax.Array, tile: jax.Array) -> Walk:
        walk = Walk.read(inputs.ranges, inputs.mask, batch, tile)
        if self.visits_empty:
            # Any tile of keys will do, for the mask hides all of it.
            is_empty = (walk.steps == 0).astype(jnp.int32)
            walk = walk._replace(steps=walk.steps + is_empty, partial=walk.partial + is_empty)
        return walk

    def _batch_and_head(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sequence and the head of a number that counts the heads of all sequences."""
        return number // self.num_heads, lax.rem(number, jnp.int32(self.num_heads))


def _run(
    is_in: Bool[Array, "... tiles"], tile: Int32[Array, " tiles"]
) -> tuple[Int32[Array, "..."], Int32[Array, "..."]]:
    """The first of some tiles, and how many they are if they follow one another."""
    first = jnp.min(jnp.where(is_in, tile, tile.shape[0]), axis=-1)
    end = jnp.max(jnp.where(is_in, tile + 1, 0), axis=-1)
    return first, jnp.maximum(end - first, 0)
