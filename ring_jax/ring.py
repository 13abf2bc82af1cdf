"""The ring strategy: queries stay, keys and values go round (Ring Attention, arXiv:2310.01889).

Runs inside `jax.shard_map`. The forward ring makes N-1 hops; the gradients are a ring of their own, tied to it by
`custom_vjp`: keys and values go round once more, and the gradients of each block travel with it in float32 and arrive
at its owner after N hops. What each step computes is the kernels' business, see `kernels/contract.py`.

Where shards are short, kernels that can do so take the blocks of several ranks at once (`ring_steps.py`): forward the
own block and then several at a time, that come from their owners in one hop each; backward the own block, that of the
rank before, and then two at a time, in hops of two places. As many bytes are sent as one by one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32, Int32

from . import kernels
from .collectives import AxisName, gather_shards, rotate
from .kernels import AttentionState, BlockMask, Blocks, Sums, match_varying
from .layouts import EVEN_LAYOUTS, shard_positions
from .ring_steps import RingMasks, RingSteps, Step, Steps, takes_several

# Names of the two residuals that a remat policy can save, so that the backward pass need not run the forward ring.
SAVED_NAMES = ("ring_attention_output", "ring_attention_lse")


class Block(NamedTuple):
    """What travels round the ring."""

    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K H"]
    segment_ids: Int32[Array, "B T"] | None


# What a step takes: the block of one rank, or of several.
type Held = Block | tuple[Block, ...]
# dK and dV of a block.
type Pair = tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]


class Carry(NamedTuple):
    """What a step of the backward ring in place is given: the block that it holds, two sums of gradients, and dQ.

    It adds the block's dK and dV to the first sum. The second one is what the step before has added to.
    """

    block: Block
    sums: Float32[Array, "B 2 T K H"]
    sums_before: Float32[Array, "B 2 T K H"]
    dq: Float32[Array, "B T N H"]


@dataclasses.dataclass(frozen=True)
class RingOptions:
    """What is fixed when a ring is traced. With `layout=None` the tokens' positions are given, not computed."""

    axis_name: AxisName
    implementation: str
    target: kernels.Target
    scale: float
    is_causal: bool
    layout: str | None
    # Whether the ring's devices belong to one process: hops are then made by copy engines, on the links of a host.
    is_in_one_process: bool


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segment_ids: Int32[Array, "B T"] | None,
    positions: Int32[Array, " T"] | None,
    options: RingOptions,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Attention of this device's queries over the keys of all devices of the ring, and its logsumexp.

    `positions` are this device's global token positions, needed where `options.layout` is None.
    """
    gathered = None if positions is None else gather_shards(positions, options.axis_name)
    arrays = query, key, value, segment_ids, gathered
    return _attend(options, *match_varying(arrays, like=lax.axis_index(options.axis_name)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: RingOptions,
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None,
    gathered_positions: Int32[Array, "num_shards T"] | None,
) -> tuple[Array, Array]:
    ring = _masks(options, query, gathered_positions)
    steps = _steps(options, query, key, segment_ids).forward
    kernel = kernels.load(options.implementation, options.target)

    def attend(mask: BlockMask, held: Held, state: AttentionState | None, *, is_last: bool = False) -> AttentionState:
        state = kernel.forward(query, *_keys_and_values(held), state, mask, scale=options.scale, is_last=is_last)
        return AttentionState(*match_varying(tuple(state), like=query))

    def compute(step: Step, block: Block, state: AttentionState | None, *, is_last: bool = False) -> AttentionState:
        return attend(ring.mask(step, segment_ids, block.segment_ids), block, state, is_last=is_last)

    def compute_and_pass_on(step: Step, carry: tuple[Block, AttentionState | None]) -> tuple[Block, AttentionState]:
        block, state = carry
        arriving = rotate(block, options.axis_name)
        # Without the barrier XLA starts every hop at once and keeps all keys and values of the sequence.
        return lax.optimization_barrier((arriving, compute(step, block, state)))

    block = Block(key, value, segment_ids)
    if ring.size == 1:
        state = compute(0, block, None, is_last=True)
    elif takes_several(steps):
        assert segment_ids is None
        state = _attend_by_groups(attend, ring, steps, options.axis_name, block)
    else:
        carry = compute_and_pass_on(0, (block, None))
        block, state = _repeat(compute_and_pass_on, carry, last=ring.size - 1, loop_steps=2 if ring.is_loop else None)
        state = compute(ring.size - 1, block, state, is_last=True)
    return state.output, state.lse


def _attend_by_groups(
    attend: Callable[..., AttentionState], ring: RingMasks, steps: Steps, axis_name: AxisName, own_block: Block
) -> AttentionState:
    """The forward ring of kernels that take several blocks at once, each of which comes in one hop from its owner."""
    masks = ring.of_steps(steps)
    held, state = own_block, None
    for mask, next_hops in zip(masks[:-1], steps[1:], strict=True):
        arriving = tuple(rotate(own_block, axis_name, by=hops) for hops in next_hops)
        # The own block is passed through, or all hops would start at once.
        own_block, held, state = lax.optimization_barrier((own_block, arriving, attend(mask, held, state)))
    return attend(masks[-1], held, state, is_last=True)


def _attend_forward(options: RingOptions, query: Array, key: Array, value: Array, segment_ids, gathered_positions):
    attended: Any = _attend(options, query, key, value, segment_ids, gathered_positions)
    # Without the barrier XLA sees that delta casts the output back to float32, and keeps the larger array until then.
    output, lse = lax.optimization_barrier(attended)
    output, lse = (checkpoint_name(x, name) for x, name in zip((output, lse), SAVED_NAMES, strict=True))
    return (output, lse), (query, key, value, segment_ids, gathered_positions, output, lse)


def _attend_backward(options: RingOptions, residuals: tuple, cotangents: tuple[Array, Array]):
    query, key, value, segment_ids, gathered_positions, output, lse = residuals
    d_out, d_lse = cotangents
    ring = _masks(options, query, gathered_positions)
    steps = _steps(options, query, key, segment_ids).backward
    kernel = kernels.load(options.implementation, options.target)
    # d lse / d score is the probability itself: the logsumexp's cotangent joins delta (FlashAttention-2, section 2.2).
    delta = jnp.sum(d_out.astype(jnp.float32) * output.astype(jnp.float32), axis=-1).swapaxes(1, 2) - d_lse

    def differentiate(
        mask: BlockMask, held: Held, dq: Array, sums: Sums | None = None, hidden_keys: Array | None = None
    ) -> tuple[Array, Any]:
        mask = mask if hidden_keys is None else mask.without(hidden_keys)
        arrays = (query, *_keys_and_values(held), d_out, lse, delta, dq, sums)
        dq, sums_or_share = kernel.backward(*arrays, mask, scale=options.scale, is_only=ring.size == 1)
        return dq, match_varying(sums_or_share, like=query)

    def compute(
        step: Step, block: Block, dq: Array, sums: Sums | None = None, hidden_keys: Array | None = None
    ) -> tuple[Array, Any]:
        return differentiate(ring.mask(step, segment_ids, block.segment_ids), block, dq, sums, hidden_keys)

    # The ring begins when delta is there. Otherwise XLA makes dQ's zeros at the program's start, and keeps what the
    # forward ring's first hop brought because this one's first hop will bring the same.
    own_block, delta, zero = lax.optimization_barrier(
        (Block(key, value, segment_ids), delta, jnp.zeros((), jnp.float32))
    )
    zero = match_varying(zero, like=query)
    dq = jnp.broadcast_to(zero, query.shape)
    if ring.size == 1:
        dq, (dk, dv) = compute(0, own_block, dq)
    elif takes_several(steps):
        assert segment_ids is None
        assert kernels.has_fused_backward(options.implementation, query.shape[3])
        dq, dk, dv = _differentiate_by_twos(differentiate, ring, steps, options.axis_name, own_block, dq, zero)
    elif kernels.has_fused_backward(options.implementation, query.shape[3]):
        dq, dk, dv = _differentiate_in_place(compute, ring, options.axis_name, own_block, dq, zero)
    else:
        dq, dk, dv = _differentiate(compute, ring, options.axis_name, own_block, dq)
    dq = kernel.finished_d_query(dq, scale=options.scale)
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype), None, None


def _differentiate(
    compute: Callable[..., tuple[Array, Any]], ring: RingMasks, axis_name: AxisName, own_block: Block, dq: Array
) -> tuple[Array, Array, Array]:
    """The backward ring of kernels that add only dQ in place: dQ, and dK and dV of this device's own block."""

    def compute_and_pass_on(step: Step, carry: tuple[Block, Pair, Array]) -> tuple[Block, Pair, Array]:
        block, gradients, dq = carry
        # The gradients that the previous step added to travel under this step's kernel, beside the next block; this
        # step's share is added on arrival.
        arriving, arriving_gradients = rotate((block, gradients), axis_name)
        dq, share = compute(step, block, dq)
        return lax.optimization_barrier((arriving, jax.tree.map(jnp.add, arriving_gradients, share), dq))

    arriving = rotate(own_block, axis_name)
    dq, gradients = compute(0, own_block, dq)
    carry = lax.optimization_barrier((arriving, gradients, dq))
    loop_steps = 2 if ring.is_loop else None
    block, gradients, dq = _repeat(compute_and_pass_on, carry, last=ring.size - 1, loop_steps=loop_steps)
    arriving_gradients = rotate(gradients, axis_name)
    dq, share = compute(ring.size - 1, block, dq)
    dk, dv = jax.tree.map(jnp.add, arriving_gradients, share)
    # The sums are complete: rounded now, they make the hop home to their owner in half the bytes.
    dk, dv = rotate((dk.astype(own_block.key.dtype), dv.astype(own_block.value.dtype)), axis_name)
    return dq, dk, dv


def _differentiate_in_place(
    compute: Callable[..., tuple[Array, Any]],
    ring: RingMasks,
    axis_name: AxisName,
    own_block: Block,
    dq: Array,
    zero: Float32[Array, ""],
) -> tuple[Array, Array, Array]:
    """The same where one kernel computes all three gradients and adds them to what it is given.

    Each block has two sums of every second rank's shares. While a step's kernel adds to the one, the other, which the
    step before has added to, makes two hops in one to the rank that holds the same block after this step. So no sum
    waits for a kernel and no kernel for a sum, and nothing is added between them.
    """
    shape = (own_block.key.shape[0], 2, *own_block.key.shape[1:])
    # Half of the own block is left for last: there is a kernel under the last sum's hop home.
    late_keys = _inner_half(own_block.key.shape[1])

    def compute_and_pass_on(step: Step, carry: Carry) -> Carry:
        arriving = rotate(carry.block, axis_name)
        arriving_sums = rotate(carry.sums_before, axis_name, by=2)
        dq, sums = compute(step, carry.block, carry.dq, carry.sums)
        return Carry(*lax.optimization_barrier((arriving, arriving_sums, sums, dq)))

    arriving = rotate(own_block, axis_name)
    dq, sums = compute(0, own_block, dq, jnp.broadcast_to(zero, shape), hidden_keys=late_keys)
    arriving, sums, dq, zero = lax.optimization_barrier((arriving, sums, dq, zero))
    carry = Carry(arriving, jnp.broadcast_to(zero, shape), sums, dq)
    loop_steps = 6 if ring.is_loop else None
    block, sums, sums_before, dq = _repeat(compute_and_pass_on, carry, last=ring.size - 1, loop_steps=loop_steps)
    at_home = rotate(sums_before, axis_name, by=2)
    dq, sums = compute(ring.size - 1, block, dq, sums)
    at_home, sums, dq = lax.optimization_barrier((at_home, sums, dq))
    arriving_sums = rotate(sums, axis_name)
    dq, at_home = compute(0, own_block, dq, at_home, hidden_keys=~late_keys)
    # What is left to do with dQ comes after the hop, under which there is a kernel.
    arriving_sums, at_home, dq = lax.optimization_barrier((arriving_sums, at_home, dq))
    sums = arriving_sums + at_home
    return dq, sums[:, 0], sums[:, 1]


def _differentiate_by_twos(
    differentiate: Callable[..., tuple[Array, Any]],
    ring: RingMasks,
    steps: Steps,
    axis_name: AxisName,
    own_block: Block,
    dq: Array,
    zero: Float32[Array, ""],
) -> tuple[Array, Array, Array]:
    """The same where the kernel takes two blocks at once, for which it adds to a sum of each.

    A sum rests while the next step's kernel adds to others, and makes the hops of two steps in one. So a block has four
    sums: of the ranks that take it first of two and of those that take it second, in every second step each.
    """
    late_keys = _inner_half(own_block.key.shape[1])
    own_mask, mask_of_one, *masks_of_two = ring.of_steps(steps)

    def zeros(zero: Float32[Array, ""]) -> Float32[Array, "B 2 T K H"]:
        return jnp.broadcast_to(zero, (own_block.key.shape[0], 2, *own_block.key.shape[1:]))

    before = rotate(own_block, axis_name)
    dq, own_sums = differentiate(own_mask, own_block, dq, zeros(zero), hidden_keys=late_keys)
    before, own_sums, dq, zero = lax.optimization_barrier((before, own_sums, dq, zero))
    # All ranks pass on what they have from the one before, and so the blocks from two and three places before arrive.
    two = rotate(before, axis_name), rotate(before, axis_name, by=2)
    own_sums = rotate(own_sums, axis_name, by=2)
    dq, sums_of_one = differentiate(mask_of_one, before, dq, zeros(zero))
    two, own_sums, sums_of_one, dq, zero = lax.optimization_barrier((two, own_sums, sums_of_one, dq, zero))
    # By how many hops each sum is away from its block's owner.
    arrived, rested, hops = (own_sums,), (sums_of_one,), (1,)
    for step, mask in zip(range(2, ring.size, 2), masks_of_two, strict=True):
        # To the ranks that add to them two steps on, or home.
        to = [min(step + 2 + i, ring.size) for i in range(len(rested))]
        arriving = tuple(rotate(x, axis_name, by=end - h) for x, h, end in zip(rested, hops, to, strict=True))
        next_two = two if step + 2 == ring.size else rotate(two, axis_name, by=2)
        dq, rested = differentiate(mask, two, dq, (*arrived, zeros(zero))[:2])
        two, arrived, rested, dq, zero = lax.optimization_barrier((next_two, arriving, rested, dq, zero))
        hops = (step, step + 1)
    arriving = tuple(rotate(x, axis_name, by=ring.size - h) for x, h in zip(rested, hops, strict=True))
    dq, at_home = differentiate(own_mask, own_block, dq, arrived[0], hidden_keys=~late_keys)
    arriving, at_home, dq = lax.optimization_barrier((arriving, at_home, dq))
    sums = functools.reduce(jnp.add, (*arrived[1:], *arriving), at_home)
    return dq, sums[:, 0], sums[:, 1]


_attend.defvjp(_attend_forward, _attend_backward)


def _keys_and_values(held: Held) -> tuple[Blocks, Blocks]:
    """The keys and the values that a step takes."""
    if isinstance(held, Block):
        return held.key, held.value
    return tuple(block.key for block in held), tuple(block.value for block in held)


def _inner_half(shard_len: int) -> Bool[Array, " T"]:
    """The second and third quarter of a shard's keys: in a causal diagonal block, half of the work."""
    index, quarter = jnp.arange(shard_len, dtype=jnp.int32), shard_len // 4
    return (index >= quarter) & (index < shard_len - quarter)


def _repeat[C](step_fn: Callable[[Step, C], C], carry: C, *, last: int, loop_steps: int | None) -> C:
    """Runs the steps 1 to `last - 1`: written out one by one, or in a loop where that would compile too long.

    An iteration of the loop takes as many steps as bring arrays back into the buffers that they were in: XLA would have
    to copy what arrived into the loop's own buffers otherwise. Keys and values take two steps, out of one pair of
    buffers and back into it, and the backward ring's sums, of which two are kept and one arrives, three.
    """
    first = 1
    if loop_steps is not None:
        iterations = (last - first) // loop_steps

        def several_steps(iteration: Int32[Array, ""], carry: C) -> C:
            for i in range(loop_steps):
                carry = step_fn(first + loop_steps * iteration + i, carry)
            return carry

        carry = lax.fori_loop(0, iterations, several_steps, carry)
        first += loop_steps * iterations
    for step in range(first, last):
        carry = step_fn(step, carry)
    return carry


def _steps(
    options: RingOptions,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    segment_ids: Int32[Array, "B T"] | None,
) -> RingSteps:
    return RingSteps.of(
        *(options.implementation, query.shape, key.shape),
        size=lax.axis_size(options.axis_name),
        layout=options.layout,
        is_causal=options.is_causal,
        has_segments=segment_ids is not None,
        is_in_one_process=options.is_in_one_process,
    )


def _masks(
    options: RingOptions,
    query: Float[Array, "B T N H"],
    gathered_positions: Int32[Array, "num_shards T"] | None,
) -> RingMasks:
    size, shard_len = lax.axis_size(options.axis_name), query.shape[1]

    def positions(rank: Step) -> Int32[Array, " T"]:
        if options.layout is None:
            assert gathered_positions is not None
            return lax.dynamic_index_in_dim(gathered_positions, rank, keepdims=False)
        return shard_positions(options.layout, rank, shard_len, size)

    is_ascending, is_even = options.layout is not None, options.layout in EVEN_LAYOUTS
    return RingMasks(size, lax.axis_index(options.axis_name), positions, options.is_causal, is_ascending, is_even)
