"""Triton kernels of one block of flash attention: forward, dQ, and dK/dV.

Written for Ampere and newer NVIDIA GPUs; importing this module needs the `triton` package. One program computes one
tile of queries (or of keys) of one head, and every pointer names an array in the layout of the block kernel contract:
query, d_out, output, dq `[B, T, N, H]`; key, value, dk, dv `[B, S, K, H]`; lse, delta `[B, N, T]`. No program reads
what another one writes, so results do not depend on scheduling: two runs give identical bits.

The online softmax and its backward pass are those of FlashAttention-2 (arXiv:2307.08691, algorithms 1 and 2), with
exponentials in base 2: `exp(scale * x - lse) = exp2(scale * log2(e) * x - lse * log2(e))`.
"""

# Triton's compile-time values are ordinary Python ones where a kernel calls another.
# pyright: reportArgumentType=false, reportAssignmentType=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Backward in float16, weights of at most 1 are brought to at most 2^15 before they are rounded, and score gradients, by
# a factor chosen as they come, to about as much: with a million keys most would be subnormal otherwise.
FLOAT16_BITS = tl.constexpr(15.0)
FLOAT16_WEIGHT = tl.constexpr(2.0**15)
# Where that factor's exponent starts, for sums that have nothing in them yet.
MOST_BITS = tl.constexpr(100.0)


@triton.jit
def _tile_pointers(base, batch, head, first_row, num_rows, SHAPE: tl.constexpr):
    """Pointers to a tile of `[B, rows, heads, H]` and which of them lie inside the array.

    `SHAPE` is (number of heads, rows of the tile, head dim, padded head dim), here and below.

    The offset of the tile is 64 bits wide, so arrays may hold more than 2^31 elements; inside a tile 32 bits suffice.
    """
    STRIDE: tl.constexpr = SHAPE[0] * SHAPE[2]
    rows = tl.arange(0, SHAPE[1])
    dims = tl.arange(0, SHAPE[3])
    offset = (tl.cast(batch, tl.int64) * num_rows + first_row) * STRIDE + head * SHAPE[2]
    inside = (first_row + rows < num_rows)[:, None] & (dims < SHAPE[2])[None, :]
    return base + offset + (rows[:, None] * STRIDE + dims[None, :]), inside


@triton.jit
def _load_tile(source, batch, head, first_row, num_rows, SHAPE: tl.constexpr, IS_WHOLE: tl.constexpr,
               USE_TMA: tl.constexpr):  # fmt: skip
    """The tile `[rows, padded head dim]` from `first_row` on, zero beyond the last row and beyond the head dim.

    `source` is a pointer, or with `USE_TMA` a descriptor of the array seen as `[B, heads, rows, H]`, where the copy
    engine does the zero filling. `IS_WHOLE` promises that all rows exist.
    """
    if USE_TMA:
        return source.load([batch, head, first_row, 0]).reshape([SHAPE[1], SHAPE[3]])
    else:
        pointers, inside = _tile_pointers(source, batch, head, first_row, num_rows, SHAPE)
        if not IS_WHOLE:
            return tl.load(pointers, mask=inside, other=0.0)
        elif SHAPE[2] == SHAPE[3]:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(tl.arange(0, SHAPE[3]) < SHAPE[2])[None, :], other=0.0)


@triton.jit
def _store_tile(base, batch, head, first_row, num_rows, tile, SHAPE: tl.constexpr):
    pointers, inside = _tile_pointers(base, batch, head, first_row, num_rows, SHAPE)
    tl.store(pointers, tile, mask=inside)


@triton.jit
def _load_ids(positions, segment_ids, first, length, batch, TOKENS: tl.constexpr, IS_CAUSAL: tl.constexpr,
              HAS_SEGMENTS: tl.constexpr):  # fmt: skip
    """Index, position and segment id of a tile's tokens. A token beyond the end has segment id 0: padding."""
    index = first + tl.arange(0, TOKENS)
    position = index
    segment = index
    if IS_CAUSAL:
        position = tl.load(positions + index, mask=index < length, other=0)
    if HAS_SEGMENTS:
        segment = tl.load(segment_ids + tl.cast(batch, tl.int64) * length + index, mask=index < length, other=0)
    return index, position, segment


@triton.jit
def _visible(q_index, q_position, q_segment, k_index, k_position, k_segment, num_queries, num_keys,
             IS_CAUSAL: tl.constexpr, HAS_SEGMENTS: tl.constexpr):  # fmt: skip
    """Which pairs attend; the two sides come shaped to broadcast against each other."""
    visible = (q_index < num_queries) & (k_index < num_keys)
    if IS_CAUSAL:
        visible = visible & (q_position >= k_position)
    if HAS_SEGMENTS:
        visible = visible & (q_segment == k_segment) & (k_segment != 0)
    return visible


@triton.jit
def _partial_tile(step, start, full_start, full_end):
    """The `step`-th partial tile: those before the full ones, then those after."""
    return tl.where(step < full_start - start, start + step, full_end + step - (full_start - start))


@triton.jit
def _softmax(scores, total, peak, scale, visible, MASKED: tl.constexpr):
    """Weights of one tile of keys, and the running maximum (in units of log2) and denominator that include it.

    The last result is the factor that brings everything summed before to the new maximum.
    """
    if MASKED:
        scores = tl.where(visible, scores * scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen no key keeps the maximum -inf; subtracting 0 instead keeps NaN out.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(peak - shift)
    else:
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_peak[:, None])
        correction = tl.exp2(peak - new_peak)
    return weights, total * correction + tl.sum(weights, 1), new_peak, correction


@triton.jit
def _add_product(sums, x, y, PRECISION: tl.constexpr):
    """`sums + x @ y`. In float32 each product is summed by itself first: one running sum over a million keys, term by
    term, would lose four digits. Tensor cores sum a tile by themselves."""
    if x.dtype == tl.float32:
        return tl.fma(tl.dot(x, y, input_precision=PRECISION), 1.0, sums)
    else:
        return tl.dot(x, y, sums, input_precision=PRECISION)


@triton.jit
def forward_kernel(query, key, value, q_positions, k_positions, q_segment_ids, k_segment_ids, starts, full_starts,
                   full_ends, ends, given_output, given_lse, output, lse, num_queries, num_keys, range_stride, scale,
                   NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                   PADDED_DIM: tl.constexpr, Q_TILE: tl.constexpr, K_TILE: tl.constexpr, IS_CAUSAL: tl.constexpr,
                   HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, USE_TMA: tl.constexpr, HAS_STATE: tl.constexpr,
                   IN_PLACE: tl.constexpr):  # fmt: skip
    """Grid (query tiles, N, B). Continues the softmax of a state, if there is one: `given_output` and `given_lse`, or
    with `IN_PLACE` what `output` and `lse` hold.

    The block is summed by itself and merged at the end. In one sum over all blocks weights would be tiny beside what
    has been seen, subnormal in float16, and matrix units round what they add to a large sum towards zero: over a
    million keys that makes 0.001 of the output.
    """
    # Under a causal mask the last queries meet the most keys: start with those, so that the short tiles fill the tail.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    Q_SHAPE: tl.constexpr = (NUM_HEADS, Q_TILE, HEAD_DIM, PADDED_DIM)
    K_SHAPE: tl.constexpr = (NUM_KV_HEADS, K_TILE, HEAD_DIM, PADDED_DIM)
    start = tl.load(starts + batch * range_stride + tile)
    full_start = tl.load(full_starts + batch * range_stride + tile)
    full_end = tl.load(full_ends + batch * range_stride + tile)
    end = tl.load(ends + batch * range_stride + tile)
    if (not IN_PLACE) or start < end:
        first = tile * Q_TILE
        q = _load_tile(query, batch, head, first, num_queries, Q_SHAPE, False, USE_TMA)
        rows = first + tl.arange(0, Q_TILE)
        statistics = (tl.cast(batch, tl.int64) * NUM_HEADS + head) * num_queries + rows
        old_output, old_lse = given_output, given_lse
        if IN_PLACE:
            old_output, old_lse = output, lse
        acc = tl.zeros([Q_TILE, PADDED_DIM], dtype=tl.float32)
        peak = tl.full([Q_TILE], float("-inf"), dtype=tl.float32)
        total = tl.zeros([Q_TILE], dtype=tl.float32)
        exponent_scale = scale * LOG2_E

        for step in range(full_start, full_end):
            k = _load_tile(key, batch, kv_head, step * K_TILE, num_keys, K_SHAPE, True, USE_TMA)
            v = _load_tile(value, batch, kv_head, step * K_TILE, num_keys, K_SHAPE, True, USE_TMA)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            weights, total, peak, correction = _softmax(scores, total, peak, exponent_scale, True, False)
            acc = _add_product(acc * correction[:, None], weights.to(v.dtype), v, PRECISION)

        q_index, q_position, q_segment = _load_ids(
            q_positions, q_segment_ids, first, num_queries, batch, Q_TILE, IS_CAUSAL, HAS_SEGMENTS
        )
        for step in range(0, (end - start) - (full_end - full_start)):
            first_key = _partial_tile(step, start, full_start, full_end) * K_TILE
            k = _load_tile(key, batch, kv_head, first_key, num_keys, K_SHAPE, False, USE_TMA)
            v = _load_tile(value, batch, kv_head, first_key, num_keys, K_SHAPE, False, USE_TMA)
            k_index, k_position, k_segment = _load_ids(
                k_positions, k_segment_ids, first_key, num_keys, batch, K_TILE, IS_CAUSAL, HAS_SEGMENTS
            )
            visible = _visible(
                q_index[:, None], q_position[:, None], q_segment[:, None],
                k_index[None, :], k_position[None, :], k_segment[None, :],
                num_queries, num_keys, IS_CAUSAL, HAS_SEGMENTS,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            weights, total, peak, correction = _softmax(scores, total, peak, exponent_scale, visible, True)
            acc = _add_product(acc * correction[:, None], weights.to(v.dtype), v, PRECISION)

        top = peak * LN_2
        if HAS_STATE:
            # In natural units, as the lse is kept: going to units of log2 and back would round it twice more a block.
            carried = tl.load(old_lse + statistics, mask=rows < num_queries, other=float("-inf"))
            new_top = tl.maximum(top, carried)
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            old_weight, weight = tl.exp2((carried - shift) * LOG2_E), tl.exp2((top - shift) * LOG2_E)
            old = _load_tile(old_output, batch, head, first, num_queries, Q_SHAPE, False, False)
            acc = acc * weight[:, None] + old * old_weight[:, None]
            total, top = total * weight + old_weight, new_top
        has_keys = total > 0.0
        acc = acc * tl.where(has_keys, 1.0 / total, 0.0)[:, None]
        new_lse = tl.where(has_keys, top + tl.log2(total) * LN_2, float("-inf"))
        _store_tile(output, batch, head, first, num_queries, acc, Q_SHAPE)
        tl.store(lse + statistics, new_lse, mask=rows < num_queries)


@triton.jit
def _load_statistics(lse, delta, batch, head, first_row, num_rows, SHAPE: tl.constexpr, IS_WHOLE: tl.constexpr):
    """The rows' `lse` in units of log2, and `delta`. A row without keys, or past the end, gets +inf: all weights 0.

    `IS_WHOLE` promises that all rows exist and see a key of the tile at hand.
    """
    rows = first_row + tl.arange(0, SHAPE[1])
    offsets = (tl.cast(batch, tl.int64) * SHAPE[0] + head) * num_rows + rows
    if IS_WHOLE:
        return tl.load(lse + offsets) * LOG2_E, tl.load(delta + offsets)
    else:
        row_lse = tl.load(lse + offsets, mask=rows < num_rows, other=float("-inf"))
        row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
        return row_lse, tl.load(delta + offsets, mask=rows < num_rows, other=0.0)


@triton.jit
def _add_gradients(sums, bits, d_scores, x, PRECISION: tl.constexpr):
    """`sums + d_scores @ x`, and `bits`: in float16 the sums are kept times 2^bits, as much as the largest score
    gradient so far leaves room for. An infinite one leaves none: all sums of the tile become NaN."""
    if x.dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(d_scores), 1), 0)
        new_bits = tl.minimum(bits, FLOAT16_BITS - tl.ceil(tl.log2(largest)))
        d_scores = d_scores * tl.exp2(new_bits)
        sums = sums * tl.exp2(new_bits - bits)
        bits = new_bits
    return _add_product(sums, d_scores.to(x.dtype), x, PRECISION), bits


@triton.jit
def _dq_step(dq, bits, query, d_out, key, value, row_lse, row_delta, exponent_scale, visible, MASKED: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    d_weights = tl.dot(d_out, tl.trans(value), input_precision=PRECISION)
    weights = tl.exp2(scores * exponent_scale - row_lse[:, None])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    d_scores = weights * (d_weights - row_delta[:, None])
    return _add_gradients(dq, bits, d_scores, key, PRECISION)


@triton.jit
def dq_kernel(query, key, value, d_out, lse, delta, q_positions, k_positions, q_segment_ids, k_segment_ids, starts,
              full_starts, full_ends, ends, dq, num_queries, num_keys, range_stride, scale, NUM_HEADS: tl.constexpr,
              NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, Q_TILE: tl.constexpr,
              K_TILE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
              PRECISION: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """Grid (query tiles, N, B). Adds this block's share to `dq` in place."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    Q_SHAPE: tl.constexpr = (NUM_HEADS, Q_TILE, HEAD_DIM, PADDED_DIM)
    K_SHAPE: tl.constexpr = (NUM_KV_HEADS, K_TILE, HEAD_DIM, PADDED_DIM)
    start = tl.load(starts + batch * range_stride + tile)
    full_start = tl.load(full_starts + batch * range_stride + tile)
    full_end = tl.load(full_ends + batch * range_stride + tile)
    end = tl.load(ends + batch * range_stride + tile)
    if start < end:
        first = tile * Q_TILE
        q = _load_tile(query, batch, head, first, num_queries, Q_SHAPE, False, USE_TMA)
        do = _load_tile(d_out, batch, head, first, num_queries, Q_SHAPE, False, USE_TMA)
        row_lse, row_delta = _load_statistics(lse, delta, batch, head, first, num_queries, Q_SHAPE, False)
        exponent_scale = scale * LOG2_E
        acc = tl.zeros([Q_TILE, PADDED_DIM], dtype=tl.float32)
        bits = tl.cast(MOST_BITS, tl.float32)

        for step in range(full_start, full_end):
            k = _load_tile(key, batch, kv_head, step * K_TILE, num_keys, K_SHAPE, True, USE_TMA)
            v = _load_tile(value, batch, kv_head, step * K_TILE, num_keys, K_SHAPE, True, USE_TMA)
            acc, bits = _dq_step(acc, bits, q, do, k, v, row_lse, row_delta, exponent_scale, True, False, PRECISION)

        q_index, q_position, q_segment = _load_ids(
            q_positions, q_segment_ids, first, num_queries, batch, Q_TILE, IS_CAUSAL, HAS_SEGMENTS
        )
        for step in range(0, (end - start) - (full_end - full_start)):
            first_key = _partial_tile(step, start, full_start, full_end) * K_TILE
            k = _load_tile(key, batch, kv_head, first_key, num_keys, K_SHAPE, False, USE_TMA)
            v = _load_tile(value, batch, kv_head, first_key, num_keys, K_SHAPE, False, USE_TMA)
            k_index, k_position, k_segment = _load_ids(
                k_positions, k_segment_ids, first_key, num_keys, batch, K_TILE, IS_CAUSAL, HAS_SEGMENTS
            )
            visible = _visible(
                q_index[:, None], q_position[:, None], q_segment[:, None],
                k_index[None, :], k_position[None, :], k_segment[None, :],
                num_queries, num_keys, IS_CAUSAL, HAS_SEGMENTS,
            )  # fmt: skip
            acc, bits = _dq_step(acc, bits, q, do, k, v, row_lse, row_delta, exponent_scale, visible, True, PRECISION)

        if q.dtype == tl.float16:
            acc = acc * tl.exp2(-bits)
        given = _load_tile(dq, batch, head, first, num_queries, Q_SHAPE, False, False)
        acc = given + acc * scale
        _store_tile(dq, batch, head, first, num_queries, acc, Q_SHAPE)


@triton.jit
def _next_tile(step, head, start, end, GROUP: tl.constexpr):
    """Advances through the tiles `[start, end)` of one head and on to the next head of the group."""
    if GROUP == 1:
        return step + 1, head
    is_last = step + 1 == end
    return tl.where(is_last, start, step + 1), head + is_last.to(tl.int32)


@triton.jit
def _dkv_step(dk, dv, bits, key, value, query, d_out, row_lse, row_delta, exponent_scale, visible, MASKED: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """One tile of queries; scores and weights are transposed, `[keys, queries]`, as the two products need them."""
    scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    weights = tl.exp2(scores * exponent_scale - row_lse[None, :])
    if MASKED:
        weights = tl.where(visible, weights, 0.0)
    # The accumulator starts at -delta: the products leave dP - delta, and delta needs no registers meanwhile.
    start = tl.broadcast_to(-row_delta[None, :], scores.shape)
    d_weights = tl.dot(value, tl.trans(d_out), start, input_precision=PRECISION)
    d_scores = weights * d_weights
    if d_out.dtype == tl.float16:
        weights = weights * FLOAT16_WEIGHT
    dv = _add_product(dv, weights.to(d_out.dtype), d_out, PRECISION)
    dk, bits = _add_gradients(dk, bits, d_scores, query, PRECISION)
    return dk, dv, bits


@triton.jit
def dkv_kernel(query, key, value, d_out, lse, delta, q_positions, k_positions, q_segment_ids, k_segment_ids, starts,
               full_starts, full_ends, ends, dk, dv, num_queries, num_keys, range_stride, scale,
               NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
               Q_TILE: tl.constexpr, K_TILE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
               PRECISION: tl.constexpr, USE_TMA: tl.constexpr):  # fmt: skip
    """Grid (key tiles, K, B). One program sums over all query heads of its group, so K and V are never repeated."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    batch = tl.program_id(2)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    Q_SHAPE: tl.constexpr = (NUM_HEADS, Q_TILE, HEAD_DIM, PADDED_DIM)
    K_SHAPE: tl.constexpr = (NUM_KV_HEADS, K_TILE, HEAD_DIM, PADDED_DIM)
    start = tl.load(starts + batch * range_stride + tile)
    full_start = tl.load(full_starts + batch * range_stride + tile)
    full_end = tl.load(full_ends + batch * range_stride + tile)
    end = tl.load(ends + batch * range_stride + tile)
    first = tile * K_TILE
    acc_k = tl.zeros([K_TILE, PADDED_DIM], dtype=tl.float32)
    acc_v = tl.zeros([K_TILE, PADDED_DIM], dtype=tl.float32)
    bits = tl.cast(MOST_BITS, tl.float32)
    if start < end:
        k = _load_tile(key, batch, kv_head, first, num_keys, K_SHAPE, False, USE_TMA)
        v = _load_tile(value, batch, kv_head, first, num_keys, K_SHAPE, False, USE_TMA)
        k_index, k_position, k_segment = _load_ids(
            k_positions, k_segment_ids, first, num_keys, batch, K_TILE, IS_CAUSAL, HAS_SEGMENTS
        )
        exponent_scale = scale * LOG2_E
        # One loop over the tiles of all heads of the group, so that loads run ahead from one head into the next.
        head = kv_head * GROUP
        step = full_start
        for _ in range(GROUP * (full_end - full_start)):
            first_query = step * Q_TILE
            q = _load_tile(query, batch, head, first_query, num_queries, Q_SHAPE, True, USE_TMA)
            do = _load_tile(d_out, batch, head, first_query, num_queries, Q_SHAPE, True, USE_TMA)
            row_lse, row_delta = _load_statistics(lse, delta, batch, head, first_query, num_queries, Q_SHAPE, True)
            acc_k, acc_v, bits = _dkv_step(
                acc_k, acc_v, bits, k, v, q, do, row_lse, row_delta, exponent_scale, True, False, PRECISION
            )
            step, head = _next_tile(step, head, full_start, full_end, GROUP)

        num_partial = (end - start) - (full_end - full_start)
        head = kv_head * GROUP
        step = tl.cast(0, tl.int32)
        for _ in range(GROUP * num_partial):
            first_query = _partial_tile(step, start, full_start, full_end) * Q_TILE
            q = _load_tile(query, batch, head, first_query, num_queries, Q_SHAPE, False, USE_TMA)
            do = _load_tile(d_out, batch, head, first_query, num_queries, Q_SHAPE, False, USE_TMA)
            q_index, q_position, q_segment = _load_ids(
                q_positions, q_segment_ids, first_query, num_queries, batch, Q_TILE, IS_CAUSAL, HAS_SEGMENTS
            )
            row_lse, row_delta = _load_statistics(lse, delta, batch, head, first_query, num_queries, Q_SHAPE, False)
            visible = _visible(
                q_index[None, :], q_position[None, :], q_segment[None, :],
                k_index[:, None], k_position[:, None], k_segment[:, None],
                num_queries, num_keys, IS_CAUSAL, HAS_SEGMENTS,
            )  # fmt: skip
            acc_k, acc_v, bits = _dkv_step(
                acc_k, acc_v, bits, k, v, q, do, row_lse, row_delta, exponent_scale, visible, True, PRECISION
            )
            step, head = _next_tile(step, head, 0, num_partial, GROUP)
        if k.dtype == tl.float16:
            acc_k = acc_k * tl.exp2(-bits)
            acc_v = acc_v * (1.0 / FLOAT16_WEIGHT)
    _store_tile(dk, batch, kv_head, first, num_keys, acc_k * scale, K_SHAPE)
    _store_tile(dv, batch, kv_head, first, num_keys, acc_v, K_SHAPE)
