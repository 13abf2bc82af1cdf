"""The ring strategy: queries stay, keys and values go round (Ring Attention, arXiv:2310.01889).

Runs inside `jax.shard_map`. The forward ring makes N-1 hops; the gradients are a ring of their own, tied to it by
`custom_vjp`: keys and values go round once more, and the gradients of each block travel with it in float32 and arrive
at its owner after N hops. What each step computes is the kernels' business, see `kernels/contract.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32

from . import kernels
from .collectives import AxisName, gather_shards, rotate
from .kernels import AttentionState, BlockMask, match_varying
from .layouts import shard_positions

# Names of the two residuals that a remat policy can save, so that the backward pass need not run the forward ring.
SAVED_NAMES = ("ring_attention_output", "ring_attention_lse")


@dataclasses.dataclass(frozen=True)
class RingOptions:
    """What is fixed when a ring is traced. With `layout=None` the tokens' positions are given, not computed."""

    axis_name: AxisName
    implementation: str
    scale: float
    is_causal: bool
    layout: str | None


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
    ring = _Ring(options, query.shape[1], segment_ids, gathered_positions)
    kernel = kernels.load(options.implementation)
    zeros = jnp.zeros(query.shape, jnp.float32)
    nothing = jnp.full((query.shape[0], query.shape[2], query.shape[1]), -jnp.inf, jnp.float32)
    state = AttentionState(*match_varying((zeros, nothing), like=query))
    block = (key, value, segment_ids)
    for step in range(ring.size):
        is_last = step == ring.size - 1
        arriving = None if is_last else rotate(block, options.axis_name)
        state = kernel.forward(query, block[0], block[1], state, ring.mask(step, block[2]), scale=options.scale)
        if not is_last:
            # Without the barrier XLA starts every hop at once and keeps all keys and values of the sequence.
            block, state = lax.optimization_barrier((arriving, state))
    return state.output.astype(query.dtype), state.lse


def _attend_forward(options: RingOptions, query: Array, key: Array, value: Array, segment_ids, gathered_positions):
    output, lse = _attend(options, query, key, value, segment_ids, gathered_positions)
    output, lse = (checkpoint_name(x, name) for x, name in zip((output, lse), SAVED_NAMES, strict=True))
    return (output, lse), (query, key, value, segment_ids, gathered_positions, output, lse)


def _attend_backward(options: RingOptions, residuals: tuple, cotangents: tuple[Array, Array]):
    query, key, value, segment_ids, gathered_positions, output, lse = residuals
    d_out, d_lse = cotangents
    ring = _Ring(options, query.shape[1], segment_ids, gathered_positions)
    kernel = kernels.load(options.implementation)
    # d lse / d score is the probability itself, so the logsumexp's cotangent joins delta (FlashAttention-2, section 2.2).
    delta = jnp.einsum("btnh,btnh->bnt", d_out, output, preferred_element_type=jnp.float32) - d_lse
    dq = match_varying(jnp.zeros(query.shape, jnp.float32), like=query)
    block, block_gradients = (key, value, segment_ids), None
    for step in range(ring.size):
        is_last = step == ring.size - 1
        # What the previous step added to travels now, under this step's kernel; this step's share is added on arrival.
        arriving = None if is_last else rotate(block, options.axis_name)
        arriving_gradients = None if block_gradients is None else rotate(block_gradients, options.axis_name)
        mask = ring.mask(step, block[2])
        dq, *share = kernel.backward(query, block[0], block[1], d_out, lse, delta, dq, mask, scale=options.scale)
        block_gradients = share if arriving_gradients is None else jax.tree.map(jnp.add, arriving_gradients, share)
        if not is_last:
            block, block_gradients, dq = lax.optimization_barrier((arriving, block_gradients, dq))
    dk, dv = rotate(block_gradients, options.axis_name)
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)


class _Ring:
    """Who holds what: after `step` hops, this device holds the block of the device `step` places before it."""

    def __init__(self, options: RingOptions, shard_len: int, segment_ids, gathered_positions):
        self.size = lax.axis_size(options.axis_name)
        self._rank = lax.axis_index(options.axis_name)
        self._options, self._shard_len = options, shard_len
        self._segment_ids, self._gathered_positions = segment_ids, gathered_positions

    def mask(self, step: int, block_segment_ids: Int32[Array, "B T"] | None) -> BlockMask:
        owner = (self._rank - step) % self.size
        own, theirs = self._positions(self._rank), self._positions(owner)
        return BlockMask(own, theirs, self._segment_ids, block_segment_ids, self._options.is_causal)

    def _positions(self, rank: Int32[Array, ""]) -> Int32[Array, " T"]:
        if self._options.layout is None:
            assert self._gathered_positions is not None
            return lax.dynamic_index_in_dim(self._gathered_positions, rank, keepdims=False)
        return shard_positions(self._options.layout, rank, self._shard_len, self.size)
