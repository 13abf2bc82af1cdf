"""How programs of the Hopper backward share key tiles: every step is taken once, and they end together."""

import dataclasses
import heapq
import itertools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.kernels.contract import BlockMask
from ring_jax.kernels.mosaic_gpu_split import MULTIPROCESSORS, SplitCosts, Splits
from ring_jax.kernels.tiles import TileRanges

COSTS = SplitCosts(program=4, sharing=1)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Key tiles, and of how many query tiles each is seen."""

    num_heads: int
    batch: int
    steps: tuple[int, ...]
    most_steps: int
    is_causal: bool = False

    def splits(self) -> Splits | None:
        positions = jnp.zeros(1, jnp.int32)
        mask = BlockMask(positions, positions, None, None, is_causal=self.is_causal, is_even=self.is_causal)
        return Splits.of(mask, self.num_heads, len(self.steps), self.batch, self.most_steps, COSTS)

    def ranges(self) -> TileRanges:
        end = jnp.asarray(self.steps, jnp.int32)[None]
        start = jnp.zeros_like(end)
        return TileRanges(start, start, end, end)


# Off the diagonal of a zigzag ring of 8K tokens a GPU, 8 key heads: half of the keys are seen by all queries of a group
# of four heads, or all keys by half of the queries.
HALF_OF_KEYS = Shape(num_heads=8, batch=1, steps=(512,) * 32 + (0,) * 32, most_steps=512, is_causal=True)
ALL_KEYS = dataclasses.replace(HALF_OF_KEYS, steps=(256,) * 64)
SHAPES = [
    HALF_OF_KEYS,
    ALL_KEYS,
    dataclasses.replace(HALF_OF_KEYS, steps=(0,) * 32 + (512,) * 32),
    dataclasses.replace(HALF_OF_KEYS, steps=(0,) * 16 + (512,) * 32 + (0,) * 16),
    # No key, and a number of tiles that no split is for: none is shared.
    dataclasses.replace(HALF_OF_KEYS, steps=(0,) * 64),
    dataclasses.replace(HALF_OF_KEYS, steps=(0,) * 60 + (512,) * 4),
    Shape(num_heads=8, batch=1, steps=(4096,) * 512, most_steps=4096),
    Shape(num_heads=3, batch=2, steps=(300,) * 40, most_steps=300),
    Shape(num_heads=1, batch=1, steps=(64,) * 7, most_steps=64),
]


def _programs(shape: Shape) -> list:
    """What each program of the grid does: its tile, its steps, and the numbers of its share."""
    splits = shape.splits()
    assert splits is not None
    numbers = jax.tree.map(lambda field: field[0], splits.numbers(shape.ranges()))
    programs = jnp.arange(splits.num_programs, dtype=jnp.int32)
    found = jax.jit(jax.vmap(lambda program: splits.place_and_share(numbers, program)))(programs)
    found = jax.tree.map(lambda field: np.broadcast_to(field, programs.shape).tolist(), found)
    places, shares = (list(zip(*part, strict=True)) for part in found)
    all_programs = [(type(found[0])(*p), type(found[1])(*s)) for p, s in zip(places, shares, strict=True)]
    return [(place, share) for place, share in all_programs if place.exists]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step_is_taken_once_and_every_piece_has_a_place_of_its_own(shape):
    splits = shape.splits()
    assert splits is not None
    sizes = shape.batch, shape.num_heads, len(shape.steps)
    tiles = set(itertools.product(*(range(size) for size in sizes)))
    steps, pieces, taken_places = defaultdict(list), defaultdict(list), []
    for place, share in _programs(shape):
        tile = place.batch, place.head, place.tile
        all_steps = shape.steps[place.tile]
        assert tile in tiles
        steps[tile] += range(all_steps * share.first // share.units, all_steps * share.end // share.units)
        pieces[tile].append((share.piece if share.pieces > 1 else 0, share.pieces))
        if share.pieces > 1:
            taken_places.append(share.tile + share.piece * share.tiles)
            assert share.tile < splits.shared
    assert {tile: sorted(steps[tile]) for tile in tiles} == {tile: list(range(shape.steps[tile[2]])) for tile in tiles}
    # Also one that sees nothing has a program, which writes zeros.
    assert set(pieces) == tiles
    assert all(found == [(i, len(found)) for i in range(len(found))] for found in pieces.values())
    assert sorted(taken_places) == list(range(len(taken_places)))
    assert len(taken_places) <= splits.places


@pytest.mark.parametrize("shape", [HALF_OF_KEYS, ALL_KEYS, *SHAPES[6:]], ids=str)
def test_programs_that_are_shared_end_earlier(shape):
    """Each multiprocessor takes the next program when it has none; whole programs alone would end up to 3 % later."""
    unsplit = -(-sum(steps > 0 for steps in shape.steps) * shape.num_heads * shape.batch // MULTIPROCESSORS)
    unsplit *= max(shape.steps) + COSTS.program
    ends = [0.0] * MULTIPROCESSORS
    for place, share in _programs(shape):
        if not (steps := shape.steps[place.tile] * (share.end - share.first) / share.units):
            continue
        beside = COSTS.program + (COSTS.sharing if share.pieces > 1 else 0)
        heapq.heapreplace(ends, ends[0] + steps + beside)
    assert max(ends) < 0.99 * unsplit
    seen = sum(steps > 0 for steps in shape.steps)
    shared = sum(share.pieces > 1 and share.piece == 0 for _, share in _programs(shape))
    assert shared == seen * shape.num_heads * shape.batch % MULTIPROCESSORS


def test_programs_that_fill_the_multiprocessors_are_not_shared():
    assert Shape(num_heads=4, batch=1, steps=(64,) * 33, most_steps=64).splits() is None


def test_unequal_programs_are_not_shared():
    positions, segments = jnp.zeros(1, jnp.int32), jnp.zeros((1, 1), jnp.int32)
    for mask in (
        BlockMask(positions, positions, None, None, is_causal=True),
        BlockMask(positions, positions, segments, segments, is_causal=False),
    ):
        assert Splits.of(mask, 8, 64, 1, 512, COSTS) is None
