"""One rank's whole ring on one device: all its local steps, states and masks included, without the hops.

What a rank computes in a ring of N does not depend on having N devices: with the blocks of all shards at hand its steps
can be run one after the other on a single GPU. The tests compare such a replay with the oracle, and the benchmarks time
it against one kernel's own best rate. With one shard it is plain attention.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from ring_jax.kernels import AttentionState, BlockKernel, BlockMask
from ring_jax.layouts import EVEN_LAYOUTS, check_layout, shard_positions
from ring_jax.ring import RingMasks, Step, is_loop


@dataclasses.dataclass(frozen=True)
class Replay:
    """Which rank of which ring is replayed."""

    num_shards: int = 1
    rank: int = 0
    layout: str = "zigzag"
    is_causal: bool = True

    def __post_init__(self):
        if not 0 <= self.rank < self.num_shards:
            raise ValueError(f"rank {self.rank} is not one of the {self.num_shards} shards' ranks")

    @property
    def owners(self) -> list[int]:
        """Whose block the rank holds at each step."""
        return [(self.rank - step) % self.num_shards for step in range(self.num_shards)]

    @property
    def is_loop(self) -> bool:
        """Whether most steps are a loop, as in the ring."""
        return is_loop(self.num_shards)

    def positions(self, rank: Step, shard_len: int) -> Int32[Array, " shard_len"]:
        """Global positions of a rank's tokens."""
        check_layout(self.layout, shard_len * self.num_shards, self.num_shards)
        return shard_positions(self.layout, rank, shard_len, self.num_shards)

    def mask(self, owner: Step, shard_len: int, segment_ids: Int32[Array, "num_shards B T"] | None) -> BlockMask:
        """The mask of the step in which the rank holds the block of `owner`, as the ring has it."""
        positions = functools.partial(self.positions, shard_len=shard_len)
        is_even = self.layout in EVEN_LAYOUTS
        masks = RingMasks(self.num_shards, self.rank, positions, self.is_causal, is_even=is_even)
        ids = (None, None) if segment_ids is None else (segment_ids[self.rank], segment_ids[owner])
        return masks.mask((self.rank - owner) % self.num_shards, *ids)


def replay_forward(
    kernel: BlockKernel,
    replay: Replay,
    query: Float[Array, "B T N H"],
    keys: Float[Array, "num_shards B T K H"],
    values: Float[Array, "num_shards B T K H"],
    segment_ids: Int32[Array, "num_shards B T"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """The rank's output in the query's dtype and its logsumexp, as the ring computes them."""
    scale = query.shape[3] ** -0.5

    def attend(state: AttentionState | None, owner: Step, is_last: bool = False) -> AttentionState:
        mask = replay.mask(owner, query.shape[1], segment_ids)
        state = kernel.forward(query, keys[owner], values[owner], state, mask, scale=scale, is_last=is_last)
        return lax.optimization_barrier(state)

    first, *others = replay.owners
    state = attend(None, first, is_last=not others)
    if others:
        state, _ = _for_each(lambda state, owner: (attend(state, owner), ()), state, others[:-1], replay.is_loop)
        state = attend(state, others[-1], is_last=True)
    return state.output, state.lse


def replay_backward(
    kernel: BlockKernel,
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
    scale, is_only = query.shape[3] ** -0.5, replay.num_shards == 1

    def differentiate(dq: Array, owner: Step) -> tuple[Array, Any]:
        given = arriving[owner] if arriving is not None and isinstance(owner, int) else None
        sums = given if in_place and not is_only else None
        if in_place and not is_only and given is None:
            # Zeros that wait for this step, as the ring's do.
            zero, dq = lax.optimization_barrier((jnp.zeros((), jnp.float32), dq))
            sums = jnp.broadcast_to(zero, (keys.shape[1], 2, *keys.shape[2:]))
        mask = replay.mask(owner, query.shape[1], segment_ids)
        arrays = (query, keys[owner], values[owner], d_out, lse, delta, dq, sums)
        dq, share = kernel.backward(*arrays, mask, scale=scale, is_only=is_only)
        if given is not None and not in_place:
            share = jax.tree.map(jnp.add, given, share)
        return lax.optimization_barrier((dq, share))

    first, *others = replay.owners
    dq, share = differentiate(jnp.zeros(query.shape, jnp.float32), first)
    dq, shares = _for_each(differentiate, dq, others, replay.is_loop)
    by_owner = dict(zip(replay.owners, [share, *shares], strict=True))
    dq = kernel.finished_d_query(dq, scale=scale)
    return dq.astype(query.dtype), [by_owner[owner] for owner in range(replay.num_shards)]


def _for_each[C, Y](
    step_fn: Callable[[C, Step], tuple[C, Y]], carry: C, owners: list[int], is_loop: bool
) -> tuple[C, list[Y]]:
    """Takes the carry through the steps and gives what each gave."""
    if not is_loop:
        results = []
        for owner in owners:
            carry, result = step_fn(carry, owner)
            results.append(result)
        return carry, results
    carry, stacked = lax.scan(step_fn, carry, jnp.asarray(owners, jnp.int32))
    return carry, [jax.tree.map(operator.itemgetter(i), stacked) for i in range(len(owners))]
