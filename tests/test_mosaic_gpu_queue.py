"""The queue of the Hopper forward kernel: every step of every query tile is taken once, and what is left is merged."""

import dataclasses
import functools
import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.kernels import mosaic_gpu_queue, mosaic_gpu_split
from ring_jax.kernels.mosaic_gpu_masks import Walk
from ring_jax.kernels.mosaic_gpu_queue import Piece, Position, Queue
from ring_jax.kernels.tiles import TileRanges


@dataclasses.dataclass(frozen=True)
class Shape:
    """Query tiles, and how many key tiles each of them sees."""

    num_heads: int
    batch: int
    steps: tuple[int, ...]
    heads_together: int = 1
    has_ranges: bool = True
    partial: int = 0
    lengths: int = 1
    visits_empty: bool = False
    programs: int = 132

    def steps_of(self, tile: int) -> int:
        return max(self.steps[tile], int(self.visits_empty))

    def ranges(self) -> TileRanges:
        """Ranges that begin at tile 3 and have `partial` partial tiles at their end."""
        steps = jnp.asarray(self.steps, jnp.int32)[None]
        start = jnp.full_like(steps, 3)
        end = start + steps
        return TileRanges(start, start, jnp.maximum(end - self.partial, start), end)


EQUAL = Shape(num_heads=4, batch=1, steps=(9,) * 33, programs=7)
TWO_LENGTHS = Shape(num_heads=4, batch=1, steps=(0,) * 3 + (9,) * 17 + (23,) * 16, programs=7, lengths=2)
UNEQUAL = Shape(num_heads=6, batch=2, steps=tuple(range(20)), heads_together=3, has_ranges=False)
SHAPES = [
    Shape(num_heads=32, batch=1, steps=(32,) * 64),
    Shape(num_heads=32, batch=1, steps=(0,) * 32 + (64,) * 32, partial=2),
    Shape(num_heads=32, batch=1, steps=(0,) * 32 + (64,) * 32, visits_empty=True),
    Shape(num_heads=3, batch=2, steps=(0, 40, 40, 40, 0, 0), visits_empty=True),
    Shape(num_heads=2, batch=1, steps=(0, 0, 0), visits_empty=True),
    Shape(num_heads=3, batch=1, steps=(0, 30, 0, 30, 0), visits_empty=True),
    Shape(num_heads=3, batch=2, steps=(64,) * 7),
    Shape(num_heads=1, batch=1, steps=(512,) * 9),
    Shape(num_heads=1, batch=1, steps=(0,) * 5),
    EQUAL,
    TWO_LENGTHS,
    Shape(num_heads=4, batch=1, steps=(96,) * 32 + (224,) * 32, visits_empty=True, lengths=2),
    Shape(num_heads=3, batch=2, steps=(0, 0, 9, 9, 9, 0), programs=4, visits_empty=True, lengths=2),
    Shape(num_heads=1, batch=1, steps=(50, 50, 50, 2, 2, 0, 0), visits_empty=True, lengths=2),
    Shape(num_heads=2, batch=1, steps=(30, 8, 30), lengths=2),
    Shape(num_heads=8, batch=1, steps=(20,) * 10 + (21,) * 10),
    Shape(num_heads=8, batch=1, steps=(20,) * 10 + (21,) * 10 + (22,), lengths=2),
    UNEQUAL,
    Shape(num_heads=5, batch=1, steps=tuple(range(1, 20)), heads_together=5, has_ranges=False, partial=1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step_is_taken_once_and_all_that_is_left_is_merged(shape, monkeypatch):
    monkeypatch.setattr(mosaic_gpu_split, "MULTIPROCESSORS", shape.programs)
    queue, inputs = _queue(shape)
    sequences_and_heads = itertools.product(range(shape.batch), range(shape.num_heads))
    taken = {(*which, tile): [] for which in sequences_and_heads for tile in range(len(shape.steps))}
    left, merged = {}, {}
    for entry, piece in _pieces(queue, inputs):
        tile, walk = (piece.batch, piece.head, piece.tile), piece.walk
        steps = np.arange(walk.steps)
        partial = np.where(steps < walk.before, walk.start + steps, walk.full_end + steps - walk.before)
        key_tiles = np.where(steps < walk.partial, partial, walk.full_start + steps - walk.partial)
        first_partial = 3 + shape.steps[piece.tile] - shape.partial
        np.testing.assert_array_equal(key_tiles >= first_partial, steps < walk.partial)
        taken[tile] += key_tiles.tolist()
        if piece.left_by >= 0:
            assert piece.left_by not in left, "two pieces are left in one place"
            assert piece.merge_end == piece.merge_first
            left[piece.left_by] = tile, entry
        for place in range(piece.merge_first, piece.merge_end):
            assert place not in merged
            merged[place] = tile, entry
    assert {tile: sorted(steps) for tile, steps in taken.items()} == {
        tile: list(range(3, 3 + shape.steps_of(tile[2]))) for tile in taken
    }
    assert {place: tile for place, (tile, _) in left.items()} == {place: tile for place, (tile, _) in merged.items()}
    # A program waits for what was taken before its own entry only.
    assert all(left[place][1] < merged[place][1] for place in left)
    assert max(left, default=-1) < max(queue.num_ranges, 1)


@pytest.mark.parametrize(
    "shape",
    [*(shape for shape in SHAPES if shape.has_ranges and len(set(shape.steps)) == 1), TWO_LENGTHS],
    ids=str,
)
def test_programs_end_together(shape, monkeypatch):
    """Equal programs, each with its share of the ranges, differ by one range's steps of each kind of tiles.

    The last range is a short one.
    """
    monkeypatch.setattr(mosaic_gpu_split, "MULTIPROCESSORS", shape.programs)
    queue, inputs = _queue(shape)
    steps = np.zeros(shape.programs)
    for _, of_entry in _by_entry(queue, inputs):
        steps[np.argmin(steps)] += sum(piece.walk.steps for piece in of_entry)
    assert steps.max() <= np.ceil(steps.mean()) + shape.lengths * mosaic_gpu_queue._SHARING_STEPS


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 21 in shape.steps], ids=str)
def test_tiles_of_more_lengths_are_not_shared(shape):
    queue, inputs = _queue(shape)
    assert all(piece.left_by < 0 for _, piece in _pieces(queue, inputs))


@pytest.mark.parametrize("is_fixed", [False, True])
def test_programs_begin_at_the_first_entry_of_theirs(is_fixed):
    """With a counter each takes from one queue to its end; without, the entries are divided among them in order."""
    queue, inputs = _queue(dataclasses.replace(EQUAL, has_ranges=False))
    queue = dataclasses.replace(queue, is_fixed=is_fixed, programs=7)
    position, end = jax.vmap(lambda _: queue.begin(inputs), axis_name="programs", out_axes=0)(jnp.arange(7))
    first = position.entry + 1
    if not is_fixed:
        np.testing.assert_array_equal(first, 0)
        np.testing.assert_array_equal(end, 132)
        return
    np.testing.assert_array_equal(first[1:], end[:-1])
    assert first[0] == 0
    assert end[-1] == 132


@pytest.mark.parametrize(("shape", "waves"), [(EQUAL, 4), (UNEQUAL, 2), (TWO_LENGTHS, 2)], ids=str)
def test_programs_of_several_waves_take_everything_once(shape, waves, monkeypatch):
    """On a GPU whose multiprocessors are slow and fast, and that begins programs in order where one has ended."""
    monkeypatch.setattr(mosaic_gpu_split, "MULTIPROCESSORS", 7)
    queue, inputs = _queue(shape)
    queue = dataclasses.replace(queue, waves=waves, is_fixed=False)
    running = jnp.int32(0)
    numbers_taken = itertools.count()
    monkeypatch.setattr(mosaic_gpu_queue, "take_number", lambda *_: jnp.int32(next(numbers_taken)))
    monkeypatch.setattr(jax.lax, "axis_index", lambda _: running)
    rng = np.random.default_rng(0)
    taken, to_begin, at_work = Counter(), list(range(queue.num_programs)), {}
    had = Counter()
    with jax.disable_jit():
        while to_begin or at_work:
            while to_begin and len(at_work) < queue.programs:
                program = to_begin.pop(0)
                running = jnp.int32(program)
                at_work[program] = queue.begin(inputs)
            program = int(rng.choice(list(at_work)))
            running = jnp.int32(program)
            position, end = at_work[program]
            numbers = [0] * mosaic_gpu_queue.PIECE_NUMBERS
            position, steps = queue.write_next(inputs, position, end, jnp.int32(had[program]), None, None, numbers)
            if not steps:
                del at_work[program]
                continue
            at_work[program], had[program] = (position, end), had[program] + 1
            piece = Piece.read(numbers)
            taken.update((*map(int, piece[:3]), int(piece.walk.tile(jnp.int32(step)))) for step in range(int(steps)))
    every = itertools.product(range(shape.batch), range(shape.num_heads), range(len(shape.steps)))
    assert taken == Counter((*which, 3 + step) for which in every for step in range(shape.steps_of(which[2])))
    # All but the last wave end after their share.
    share = len(_by_entry(queue, inputs)) // queue.num_programs
    early = [had[program] for program in range(queue.num_programs - queue.programs)]
    assert share > 0
    assert all(share <= pieces <= share + 1 for pieces in early)


def test_entries_of_programs_with_one_each_are_named_however_many_there_are():
    """Also where their number's square is no int32."""
    queue = Queue.of(1, 2**16, 1, heads_together=1, visits_empty=True, range_steps=None, waves=1, one_each=True)
    inputs = SimpleNamespace(work=None)
    programs = jnp.asarray([0, 1, 2**15, 2**16 - 1])
    # An axis of 65,536 programs, of which four are looked at.
    with pytest.MonkeyPatch.context() as patch:
        for program in programs:
            patch.setattr(jax.lax, "axis_index", lambda _, program=program: program)
            position, end = queue.begin(inputs)
            assert (position.entry + 1, end) == (program, program + 1)


def _queue(shape: Shape) -> tuple[Queue, SimpleNamespace]:
    queue = Queue.of(
        *(shape.num_heads, len(shape.steps), shape.batch),
        heads_together=shape.heads_together,
        visits_empty=shape.visits_empty,
        range_steps=max(shape.steps) if shape.has_ranges else None,
        waves=1,
        one_each=False,
        lengths=shape.lengths,
    )
    ranges = shape.ranges()
    return queue, SimpleNamespace(ranges=ranges, mask=SimpleNamespace(block=None), work=queue.work(ranges))


def _pieces(queue: Queue, inputs: SimpleNamespace) -> list[tuple[int, Any]]:
    return [(entry, piece) for entry, of_entry in _by_entry(queue, inputs) for piece in of_entry]


def _by_entry(queue: Queue, inputs: SimpleNamespace) -> list[tuple[int, list[Any]]]:
    """The pieces of every entry of the queue, as numbers."""
    _, end = jax.vmap(lambda _: dataclasses.replace(queue, is_fixed=False).begin(inputs), axis_name="programs")(
        jnp.arange(1)
    )
    entries = jnp.arange(end[0], dtype=jnp.int32)
    look = jax.jit(jax.vmap(functools.partial(queue._piece, inputs)))
    done, found = jnp.zeros_like(entries), [[] for _ in entries]
    going = np.ones(len(entries), bool)
    while going.any():
        piece, done = look(Position(entries, done))
        batch, head, tile, walk, *rest = jax.tree.map(lambda x: np.broadcast_to(x, entries.shape).tolist(), piece)
        for entry in np.flatnonzero(going):
            numbers = Walk(*(field[entry] for field in walk))
            found[entry].append(Piece(batch[entry], head[entry], tile[entry], numbers, *(x[entry] for x in rest)))
        going &= np.asarray(done) > 0
    return list(enumerate(found))
