"""The portable block kernel: plain JAX, tiled inside the block, for every platform XLA knows.

Queries are walked tile by tile, and for each of them only the key tiles that can be seen (FlashAttention-2,
arXiv:2307.08691); full tiles skip the mask. Never more than one tile of scores exists at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from .contract import AttentionState, BlockMask, Gradients, unchanged_d_query
from .tiles import TileRanges, TileSummary, key_ranges_between, query_ranges_between, summarize_tiles
from .varying import match_varying

finished_d_query = unchanged_d_query

_MAX_TILE_SIDE = 512
_FAST_TILE_SIDE = 64
_MIN_TILE_SIDE = 16
_MAX_TILE_SCORES = 2**18  # 1 MiB of float32 scores: stays in a CPU's second cache


class _Block(NamedTuple):
    """A block padded to whole tiles; G = N / K query heads share a key/value head.

    Only tiles are ever brought into the order that a product wants: of whole arrays that would be a copy each.
    """

    q: Float[Array, "B T K G H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    mask: BlockMask
    q_tile: int
    k_tile: int


def unsupported_reason(compute_capability: int | None, head_dim: int, dtype: jax.typing.DTypeLike) -> None:
    """None: this implementation runs on every device and takes every head dim and dtype of the contract."""
    del compute_capability, head_dim, dtype


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    state: AttentionState | None,
    mask: BlockMask,
    *,
    scale: float,
    is_last: bool = False,
) -> AttentionState:
    """See `contract.BlockKernel.forward`."""
    num_queries, num_kv_heads = query.shape[1], key.shape[2]
    state = state or AttentionState.before_any_key(query)
    block = _block(query, key, value, mask)
    q_tiles, k_tiles = _summaries(block)
    output = _pad_dim(_split_heads(state.output, num_kv_heads), 1, block.q_tile)
    lse = _pad_dim(_group_heads(state.lse, num_kv_heads), 3, block.q_tile, value=-jnp.inf)

    def query_tile(index: Int32[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        output, lse = carry
        at = index * block.q_tile
        q = _tile(block.q, at, block.q_tile, 1)
        old_output, old_lse = _tile(output, at, block.q_tile, 1), _tile(lse, at, block.q_tile, 3)
        zeros = jnp.zeros_like(old_lse)
        running = (zeros - jnp.inf, zeros, jnp.zeros_like(jnp.einsum("btkgh->bkgth", old_output)))

        def key_tile(masked: bool, k_index: Int32[Array, ""], running: tuple[Array, ...]) -> tuple[Array, ...]:
            top, total, acc = running
            k, v = _key_value_tiles(block, k_index)
            scores = scale * _dot("btkgh,bskh->bkgts", q, k)
            if masked:
                scores = jnp.where(_visible(block, index, k_index), scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            shift = _finite(new_top)
            keep = jnp.exp(top - shift)
            probs = jnp.exp(scores - shift[..., None])
            acc = acc * keep[..., None] + _dot("bkgts,bskh->bkgth", probs.astype(v.dtype), v)
            return new_top, total * keep + probs.sum(axis=-1), acc

        ranges = key_ranges_between(q_tiles.only(index), k_tiles, mask.is_causal, merge_batch=True)
        new_output, new_lse = _merge(old_output, old_lse, *_walk(ranges, key_tile, running))
        output = lax.dynamic_update_slice_in_dim(output, new_output, at, 1)
        return output, lax.dynamic_update_slice_in_dim(lse, new_lse, at, 3)

    output, lse = lax.fori_loop(0, q_tiles.whole.shape[1], query_tile, (output, lse))
    output = output[:, :num_queries].reshape(query.shape)
    lse = lse[..., :num_queries].reshape(state.lse.shape)
    return AttentionState(output.astype(query.dtype if is_last else jnp.float32), lse)


def _merge(
    output: Float32[Array, "B t K G H"],
    lse: Float32[Array, "B K G t"],
    top: Float32[Array, "B K G t"],
    total: Float32[Array, "B K G t"],
    acc: Float32[Array, "B K G t H"],
) -> tuple[Float32[Array, "B t K G H"], Float32[Array, "B K G t"]]:
    """The state of a tile of queries and what one block adds to it: `total` and `acc` are sums relative to `top`.

    Weights relative to the state's logsumexp from the start would be tiny after many blocks, and float16 has no room
    below 6e-5.
    """
    shift = _finite(jnp.maximum(top, lse))
    old_weight, weight = jnp.exp(lse - shift), jnp.exp(top - shift)
    total = total * weight + old_weight
    seen = total > 0
    inverse = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
    new_output = jnp.einsum("bkgth->btkgh", acc * (weight * inverse)[..., None])
    new_output += output * jnp.einsum("bkgt->btkg", old_weight * inverse)[..., None]
    return new_output, jnp.where(seen, shift + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    dq: Float32[Array, "B T N H"],
    sums: Float32[Array, "B 2 S K H"] | None,
    mask: BlockMask,
    *,
    scale: float,
    is_only: bool = False,
) -> Gradients:
    """See `contract.BlockKernel.backward`. One pass, five products a tile; dK and dV of a tile are summed in place."""
    num_queries, (_, num_keys, num_kv_heads, _) = query.shape[1], key.shape
    block = _block(query, key, value, mask)
    q_tiles, k_tiles = _summaries(block)
    d_out = _pad_dim(_split_heads(d_out, num_kv_heads), 1, block.q_tile)
    dq = _pad_dim(_split_heads(dq, num_kv_heads), 1, block.q_tile)
    lse = _pad_dim(_finite(_group_heads(lse, num_kv_heads)), 3, block.q_tile)
    delta = _pad_dim(_group_heads(delta, num_kv_heads), 3, block.q_tile)
    # Zeros that wait for this step's operands: constant ones would be filled at the start, for every step of a ring.
    zero, dq = lax.optimization_barrier((match_varying(jnp.float32(0), like=dq), dq))
    zeros = jnp.full(block.k.shape, zero)

    def key_tile(k_index: Int32[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
        dq, dk, dv = carry
        k, v = _key_value_tiles(block, k_index)

        def query_tile(masked: bool, index: Int32[Array, ""], carry: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, dk_tile, dv_tile = carry
            at = index * block.q_tile
            q, d_o = _tile(block.q, at, block.q_tile, 1), _tile(d_out, at, block.q_tile, 1)
            scores = scale * _dot("btkgh,bskh->bkgts", q, k)
            probs = jnp.exp(scores - _tile(lse, at, block.q_tile, 3)[..., None])
            if masked:
                probs = jnp.where(_visible(block, index, k_index), probs, 0.0)
            d_probs = _dot("btkgh,bskh->bkgts", d_o, v)
            d_scores = (scale * probs * (d_probs - _tile(delta, at, block.q_tile, 3)[..., None])).astype(q.dtype)
            dv_tile += _dot("bkgts,btkgh->bskh", probs.astype(q.dtype), d_o)
            dk_tile += _dot("bkgts,btkgh->bskh", d_scores, q)
            share = _tile(dq, at, block.q_tile, 1) + _dot("bkgts,bskh->btkgh", d_scores, k)
            return lax.dynamic_update_slice_in_dim(dq, share, at, 1), dk_tile, dv_tile

        at = k_index * block.k_tile
        start = (dq, _tile(dk, at, block.k_tile, 1), _tile(dv, at, block.k_tile, 1))
        ranges = query_ranges_between(q_tiles, k_tiles.only(k_index), mask.is_causal, merge_batch=True)
        dq, dk_tile, dv_tile = _walk(ranges, query_tile, start)
        dk = lax.dynamic_update_slice_in_dim(dk, dk_tile, at, 1)
        return dq, dk, lax.dynamic_update_slice_in_dim(dv, dv_tile, at, 1)

    dq, dk, dv = lax.fori_loop(0, k_tiles.whole.shape[1], key_tile, (dq, zeros, zeros))
    share = tuple(x[:, :num_keys].astype(key.dtype if is_only else jnp.float32) for x in (dk, dv))
    dq = dq[:, :num_queries].reshape(query.shape)
    return Gradients(dq, share if sums is None else sums + jnp.stack(share, axis=1))


def _walk(
    ranges: TileRanges, tile: Callable[[bool, Int32[Array, ""], tuple[Array, ...]], tuple[Array, ...]], carry: tuple
) -> tuple[Array, ...]:
    """Visits the tiles of the only row: with the mask, without it where every pair is visible, and with it again."""
    ranges = jax.tree.map(lambda x: x[0, 0], ranges)
    for masked, first, last in (
        (True, ranges.start, ranges.full_start),
        (False, ranges.full_start, ranges.full_end),
        (True, ranges.full_end, ranges.end),
    ):
        carry = lax.fori_loop(first, last, lambda i, c, masked=masked: tile(masked, i, c), carry)
    return carry


def _block(query: Array, key: Array, value: Array, mask: BlockMask) -> _Block:
    q_tile, k_tile = _tile_sides(query.shape, key.shape)
    # Padded queries and keys get segment id 0 where there are ids, and lie outside the last tile's length where not.
    return _Block(
        _pad_dim(_split_heads(query, key.shape[2]), 1, q_tile),
        _pad_dim(key, 1, k_tile),
        _pad_dim(value, 1, k_tile),
        mask,
        q_tile,
        k_tile,
    )


def _tile_sides(query_shape: tuple[int, ...], key_shape: tuple[int, ...]) -> tuple[int, int]:
    """Powers of two; one tile of scores, all heads counted, is far smaller than the dense matrix of a single head.

    It is also far smaller than the queries, or as small as is fast: the memory of a step is that of its tokens.
    """
    batch, num_queries, num_heads, head_dim = query_shape
    of_queries = batch * num_queries * num_heads * head_dim // 64
    enough = batch * num_heads * _FAST_TILE_SIDE**2
    most = min(_MAX_TILE_SCORES, num_queries * key_shape[1] // 2, max(of_queries, enough))
    side = _MAX_TILE_SIDE
    while side > _MIN_TILE_SIDE and batch * num_heads * side * side > most:
        side //= 2
    return side, side


def _summaries(block: _Block) -> tuple[TileSummary, TileSummary]:
    """Of the two sides. Ranges are taken from them one row of tiles at a time: all rows at once would need memory for
    every pair of tiles."""
    mask = block.mask
    return (
        summarize_tiles(mask.q_positions, mask.q_segment_ids, block.q_tile),
        summarize_tiles(mask.k_positions, mask.k_segment_ids, block.k_tile),
    )


def _visible(block: _Block, q_index: Int32[Array, ""], k_index: Int32[Array, ""]) -> Bool[Array, "B 1 1 q k"]:
    mask, q_at, k_at = block.mask, q_index * block.q_tile, k_index * block.k_tile
    num_keys = mask.k_positions.shape[0]
    inside = k_at + jnp.arange(block.k_tile, dtype=jnp.int32) < num_keys
    visible = jnp.broadcast_to(inside[None, None, :], (1, block.q_tile, block.k_tile))
    if mask.is_causal:
        q_pos = _tile(_pad_dim(mask.q_positions, 0, block.q_tile), q_at, block.q_tile, 0)
        k_pos = _tile(_pad_dim(mask.k_positions, 0, block.k_tile), k_at, block.k_tile, 0)
        visible &= (q_pos[:, None] >= k_pos[None, :])[None]
    if mask.q_segment_ids is not None and mask.k_segment_ids is not None:
        q_seg = _tile(_pad_dim(mask.q_segment_ids, 1, block.q_tile), q_at, block.q_tile, 1)
        k_seg = _tile(_pad_dim(mask.k_segment_ids, 1, block.k_tile), k_at, block.k_tile, 1)
        visible = visible & ((q_seg[:, :, None] == k_seg[:, None, :]) & (q_seg != 0)[:, :, None])
    return visible[:, None, None]


def _key_value_tiles(block: _Block, index: Int32[Array, ""]) -> tuple[Array, Array]:
    at = index * block.k_tile
    return _tile(block.k, at, block.k_tile, 1), _tile(block.v, at, block.k_tile, 1)


def _dot(equation: str, x: Array, y: Array) -> Array:
    """A product with float32 sums, whatever the inputs; float32 inputs are never rounded to TF32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST)


def _finite(lse: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """-inf, a row without keys, as 0: exp(-inf - 0) is 0 where exp(-inf + inf) would be NaN."""
    return jnp.where(lse == -jnp.inf, 0.0, lse)


def _tile(x: Array, at: Int32[Array, ""], size: int, dim: int) -> Array:
    return lax.dynamic_slice_in_dim(x, at, size, dim)


def _pad_dim(x: Array, dim: int, tile: int, value: float = 0) -> Array:
    missing = -x.shape[dim] % tile
    pads = [(0, missing if d == dim else 0) for d in range(x.ndim)]
    return jnp.pad(x, pads, constant_values=value) if missing else x


def _split_heads(x: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B T K G H"]:
    batch, tokens, num_heads, head_dim = x.shape
    return x.reshape(batch, tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)


def _group_heads(x: Float32[Array, "B N T"], num_kv_heads: int) -> Float32[Array, "B K G T"]:
    return x.reshape(x.shape[0], num_kv_heads, -1, x.shape[2])
