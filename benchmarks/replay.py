"""One rank's whole ring on one device: all its local steps, states and masks included, without the hops.

What a rank computes in a ring of N does not depend on having N devices: with the blocks of all shards at hand its steps
can be run one after the other on a single GPU. The tests compare such a replay with the oracle, and the benchmarks time
it against one kernel's own best rate. With one shard it is plain attention.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from ring_jax.kernels import AttentionState, BlockMask, Blocks, StepKernel
from ring_jax.layouts import EVEN_LAYOUTS, check_layout, shard_positions
from ring_jax.ring_steps import RingMasks, RingSteps, Step, Steps, is_loop, takes_several


@dataclasses.dataclass(frozen=True)
class Replay:
    """Which rank of which ring is replayed."""

    num_shards: int = 1
    rank: int = 0
    layout: str = "zigzag"
    is_causal: bool = True
    # What the steps take, if not a block each.
    given_steps: RingSteps | None = None

    def __post_init__(self):
        if not 0 <= self.rank < self.num_shards:
            raise ValueError(f"rank {self.rank} is not one of the {self.num_shards} shards' ranks")

    @property
    def owners(self) -> list[int]:
        """Whose blocks the rank holds, one after the other."""
        return [(self.rank - step) % self.num_shards for step in range(self.num_shards)]

    @property
    def steps(self) -> RingSteps:
        """What the steps take."""
        return RingSteps.one_by_one(self.num_shards) if self.given_steps is None else self.given_steps

    @property
    def begun(self) -> list[int]:
        """Of whose blocks the rank begins sums of gradients, where kernels add in place.

        Each block has two sums, of every second rank's shares; where steps take two blocks also two of the ranks that
        take it second.
        """
        takes_two = takes_several(self.steps.backward)
        return [self.owners[i] for i in ((0, 1, 3, 5) if takes_two else (0, 1)) if i < self.num_shards]

    @property
    def is_loop(self) -> bool:
        """Whether most steps are a loop, as in the ring."""
        return is_loop(self.num_shards)

    def positions(self, rank: Step, shard_len: int) -> Int32[Array, " shard_len"]:
        """Global positions of a rank's tokens."""
        check_layout(self.layout, shard_len * self.num_shards, self.num_shards)
        return shard_positions(self.layout, rank, shard_len, self.num_shards)

    def by_owners(self, steps: Steps) -> list[tuple[int, ...]]:
        """Whose blocks each of the steps takes."""
        return [tuple(self.owners[i] for i in hops) for hops in steps]

    def mask(
        self, steps: Steps, owners: Sequence[Step], shard_len: int, segment_ids: Int32[Array, "num_shards B T"] | None
    ) -> BlockMask:
        """The mask of the one of the steps that takes the blocks of these owners, as the ring has it."""
        positions = functools.partial(self.positions, shard_len=shard_len)
        is_even = self.layout in EVEN_LAYOUTS
        masks = RingMasks(self.num_shards, self.rank, positions, self.is_causal, is_even=is_even)
        if takes_several(steps):
            assert segment_ids is None
            of_steps: list[Sequence[Step]] = [*self.by_owners(steps)]
            return masks.of_steps(steps)[of_steps.index(owners)]
        (owner,) = owners
        ids = (None, None) if segment_ids is None else (segment_ids[self.rank], segment_ids[owner])
        return masks.mask((self.rank - owner) % self.num_shards, *ids)


def replay_forward(
    kernel: StepKernel,
    replay: Replay,
    query: Float[Array, "B T N H"],
    keys: Float[Array, "num_shards B T K H"],
    values: Float[Array, "num_shards B T K H"],
    segment_ids: Int32[Array, "num_shards B T"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """The rank's output in the query's dtype and its logsumexp, as the ring computes them."""
    scale, steps = query.shape[3] ** -0.5, replay.steps.forward

    def attend(state: AttentionState | None, owners: Sequence[Step], is_last: bool = False) -> AttentionState:
        mask = replay.mask(steps, owners, query.shape[1], segment_ids)
        blocks = _of_owners(keys, owners), _of_owners(values, owners)
        return lax.optimization_barrier(kernel.forward(query, *blocks, state, mask, scale=scale, is_last=is_last))

    first, *others = replay.by_owners(steps)
    state = attend(None, first, is_last=not others)
    if others:
        state, _ = _for_each(lambda state, owners: (attend(state, owners), ()), state, others[:-1], replay.is_loop)
        state = attend(state, others[-1], is_last=True)
    return state.output, state.lse


def replay_backward(
    kernel: StepKernel,
    replay: Replay,
    query: Float[Array, "B T N H"],
    keys: Float[Array, "num_shards B T K H"],
    values: Float[Array, "num_shards B T K H"],
    output: Float[Array, "B T N H"],
    lse: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    arriving: Sequence[Any] | None = None,
    segment_ids: Int32[Array, "num_shards B T"] | None = None,
    *,
    in_place: bool = False,
) -> tuple[Float[Array, "B T N H"], list[Any]]:
    """The rank's dQ in the query's dtype, and by owner its shares of every block's dK and dV in float32.

    These are pairs or, where the kernel adds them `in_place`, arrays [B, 2, T, K, H]. They are added to what is
    `arriving`, by owner, as a ring adds them to what comes with the block; without, or where it is None, they begin
    sums. In a loop nothing may arrive. With one shard the only share is in the key's dtype.
    """
    assert not replay.is_loop or not jax.tree.leaves(arriving), "in a loop nothing arrives"
    delta = jnp.sum(d_out.astype(jnp.float32) * output.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    scale, is_only, steps = query.shape[3] ** -0.5, replay.num_shards == 1, replay.steps.backward

    def differentiate(dq: Array, owners: Sequence[Step]) -> tuple[Array, tuple[Any, ...]]:
        given = [None if arriving is None or not isinstance(owner, int) else arriving[owner] for owner in owners]
        sums: Any = None
        if in_place and not is_only:
            # Zeros that wait for this step, as the ring's do.
            zero, dq = lax.optimization_barrier((jnp.zeros((), jnp.float32), dq))
            zeros = jnp.broadcast_to(zero, (keys.shape[1], 2, *keys.shape[2:]))
            sums = tuple(zeros if x is None else x for x in given)
            sums = sums if len(sums) > 1 else sums[0]
        mask = replay.mask(steps, owners, query.shape[1], segment_ids)
        arrays = (query, _of_owners(keys, owners), _of_owners(values, owners), d_out, lse, delta, dq, sums)
        dq, shares = kernel.backward(*arrays, mask, scale=scale, is_only=is_only)
        shares = shares if len(owners) > 1 else (shares,)
        if not in_place:
            shares = tuple(s if x is None else jax.tree.map(jnp.add, x, s) for x, s in zip(given, shares, strict=True))
        return lax.optimization_barrier((dq, shares))

    first, *others = replay.by_owners(steps)
    dq, shares = differentiate(jnp.zeros(query.shape, jnp.float32), first)
    dq, more = _for_each(differentiate, dq, others, replay.is_loop)
    by_owner = dict(zip(replay.owners, itertools.chain(shares, *more), strict=True))
    dq = kernel.finished_d_query(dq, scale=scale)
    return dq.astype(query.dtype), [by_owner[owner] for owner in range(replay.num_shards)]


def _of_owners(blocks: Float[Array, "num_shards B T K H"], owners: Sequence[Step]) -> Blocks:
    """The keys or values of one block, or of several."""
    return blocks[owners[0]] if len(owners) == 1 else tuple(blocks[owner] for owner in owners)


def _for_each[C, Y](
    step_fn: Callable[[C, Sequence[Step]], tuple[C, Y]], carry: C, steps: list[tuple[int, ...]], is_loop: bool
) -> tuple[C, list[Y]]:
    """Takes the carry through the steps and gives what each gave. In a loop a step's owner is an array."""
    if not is_loop:
        results = []
        for owners in steps:
            carry, result = step_fn(carry, owners)
            results.append(result)
        return carry, results
    carry, stacked = lax.scan(lambda c, owners: step_fn(c, (owners[0],)), carry, jnp.asarray(steps, jnp.int32))
    return carry, [jax.tree.map(operator.itemgetter(i), stacked) for i in range(len(steps))]
