"""What the steps of a ring take: the blocks of which ranks, and with what masks.

A step of most rings takes the block of one rank: the first a rank's own, the next that of the rank before, and so on.
Where shards are short, kernels that can take several blocks at once (`kernels/several_blocks.py`) read and write the
running state less often.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from . import kernels
from .kernels import BlockMask, folded

# Rings of more steps are compiled as a loop; at 16 a training step's compile time is still that of its other parts.
MAX_UNROLLED_STEPS = 16
# Forward steps take so many blocks at most. More would have little left to save, and as many more arrive meanwhile.
_MOST_BLOCKS = 4
# With so many tokens times query heads of a key head, the hop of a block takes half as long as its causal kernel:
# 16-bit keys and values of head dim 128 at 280 GB/s, as copy engines of two H200s sent seven blocks, and 750 TFLOP/s
# (`benchmarks/LOG.md`).
_TOKENS_PER_HOP = 10_000

# The number of a step, or a rank.
Step = int | Int32[Array, ""]
# How many places before a rank those are whose blocks a step takes.
type Hops = tuple[int, ...]
type Steps = tuple[Hops, ...]


@dataclasses.dataclass(frozen=True)
class RingSteps:
    """The steps of a ring's two passes."""

    forward: Steps
    backward: Steps

    @classmethod
    def one_by_one(cls, size: int) -> "RingSteps":
        """A block a step."""
        return cls(_one_by_one(size), _one_by_one(size))

    @classmethod
    def of(
        cls,
        implementation: str,
        query_shape: tuple[int, ...],
        key_shape: tuple[int, ...],
        *,
        size: int,
        layout: str | None,
        is_causal: bool,
        has_segments: bool,
        is_in_one_process: bool,
    ) -> "RingSteps":
        """The steps of a ring of `size` devices, whose shards have queries and keys of these shapes [B, T, N or K, H].

        Several blocks a step are taken where what a query sees of them is one run of keys, and by devices of one
        process: they need links within a host, for what they save is the time of few hops. Rings that are a loop take
        one, and hold less.
        """
        _, shard_len, num_heads, head_dim = query_shape
        plain = cls.one_by_one(size)
        is_one_run = layout == "zigzag" or not is_causal
        if not is_in_one_process or has_segments or is_loop(size) or not is_one_run:
            return plain
        if not kernels.prefers_several_blocks(implementation, head_dim, shard_len):
            return plain
        work = shard_len * (num_heads // key_shape[2]) * (1 if is_causal else 2)
        return cls(_in_groups(size, work // _TOKENS_PER_HOP), _in_twos(size))


def is_loop(size: int) -> bool:
    """Whether a ring of so many devices is compiled as a loop, in which a step's number is known only at run time."""
    return size - 2 > MAX_UNROLLED_STEPS


def takes_several(steps: Steps) -> bool:
    """Whether any of the steps takes several blocks."""
    return max(map(len, steps)) > 1


def _one_by_one(size: int) -> Steps:
    return tuple((hops,) for hops in range(size))


def _in_groups(size: int, hops_under_block: int) -> Steps:
    """The own block, and then as many at once as arrive in half the time of the step before, up to four."""
    steps: list[Hops] = [(0,)]
    hops = 1
    while hops < size:
        group = min(max(len(steps[-1]) * hops_under_block, 1), _MOST_BLOCKS, size - hops)
        steps.append(tuple(range(hops, hops + group)))
        hops += group
    return tuple(steps)


def _in_twos(size: int) -> Steps:
    """The own block, the next one, and then two at a time, if none is left over: what the backward ring takes.

    More were 1 % faster for a first rank and slower for a last one, and two sums go home under half a kernel.
    """
    if size < 4 or size % 2:
        return _one_by_one(size)
    return ((0,), (1,), *itertools.batched(range(2, size), 2))


@dataclasses.dataclass(frozen=True)
class RingMasks:
    """The masks of a rank's steps: after `step` hops it holds the block of the rank `step` places before it."""

    size: int
    rank: Step
    # The global positions of a rank's tokens.
    positions: Callable[[Step], Int32[Array, " T"]]
    is_causal: bool
    # Whether every shard holds its tokens in ascending order, as every layout deals them.
    is_ascending: bool = True
    # Whether a rank's queries that see anything of another rank's block see as much of it (`layouts.EVEN_LAYOUTS`).
    is_even: bool = False

    @property
    def is_loop(self) -> bool:
        return is_loop(self.size)

    def mask(
        self, step: Step, own_segment_ids: Int32[Array, "B T"] | None, segment_ids: Int32[Array, "B T"] | None
    ) -> BlockMask:
        """The mask of a step that takes one block, from the segment ids of the rank and of the block that it holds."""
        own = self.positions(self.rank)
        if isinstance(step, int) and step == 0 and self.is_ascending:
            # The very same array on the diagonal: there a kernel without positions (cuDNN) can mask by index.
            return BlockMask(own, own, own_segment_ids, segment_ids, self.is_causal)
        if isinstance(step, int) and not self.is_loop and self.is_causal and segment_ids is None:
            # All steps ask for the tiles of the same positions, which XLA sees, and computes them once for the ring.
            return BlockMask(own, self._of_all_steps, None, None, True, block=jnp.int32(step), is_even=self.is_even)
        theirs = self.positions((self.rank - step) % self.size)
        # Loops begin with the second step.
        is_even = self.is_even and not (isinstance(step, int) and step == 0)
        return BlockMask(own, theirs, own_segment_ids, segment_ids, self.is_causal, is_even=is_even)

    def of_steps(self, steps: Steps) -> list[BlockMask]:
        """The masks of steps of which some take several blocks, and the first the own one.

        Those of steps that take equally many are one stack, as in `mask`.
        """
        own, masks = self.positions(self.rank), [self.mask(0, None, None)]
        alike = {len(hops): [other for other in steps[1:] if len(other) == len(hops)] for hops in steps[1:]}
        stacks = {n: jax.vmap(self._of_blocks)(jnp.asarray(of_length, jnp.int32)) for n, of_length in alike.items()}
        for hops in steps[1:]:
            stack, index = stacks[len(hops)], alike[len(hops)].index(hops)
            if self.is_causal and stack.shape[0] > 1:
                masks.append(BlockMask(own, stack, None, None, True, block=jnp.int32(index), is_even=self.is_even))
            else:
                masks.append(BlockMask(own, stack[index], None, None, self.is_causal, is_even=self.is_even))
        return masks

    def _of_blocks(self, hops: Int32[Array, " blocks"]) -> Int32[Array, " blocks_T"]:
        """The positions of the keys of the blocks from so many places before, in the order of `folded`."""
        return folded([self.positions((self.rank - hops[i]) % self.size) for i in range(hops.shape[0])])

    @functools.cached_property
    def _of_all_steps(self) -> Int32[Array, "steps T"]:
        return jax.vmap(self.positions)((self.rank - jnp.arange(self.size, dtype=jnp.int32)) % self.size)
