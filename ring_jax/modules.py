"""Flax NNX modules for long sequences: attention round the ring, and a feed-forward that works in chunks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from .attention import STRATEGIES, ring_attention
from .collectives import AxisName
from .kernels import IMPLEMENTATIONS, match_varying
from .layouts import LAYOUTS, layout_positions
from .precision import matmul, matmul_precision
from .rope import apply_rope
from .token_shards import (
    call_on_auto_axes,
    constrain_weight,
    from_chunks,
    map_token_shards,
    num_shards,
    to_chunks,
    token_spec,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How attention runs on the mesh of `jax.set_mesh`; the meaning of each is that of `ring_attention`'s argument.

    None of them changes what a model computes, except that its inputs must come in `layout` order.
    """

    layout: str = "contiguous"
    strategy: str = "ring"
    implementation: str | None = None
    seq_axis: AxisName = "seq"
    batch_axis: AxisName | None = "data"
    head_axis: AxisName | None = "tensor"

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("layout", self.layout, LAYOUTS),
            ("strategy", self.strategy, STRATEGIES),
            ("implementation", self.implementation, (None, *IMPLEMENTATIONS)),
        ):
            if value not in valid:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(map(str, valid))}")

    def positions(self, seq_len: int) -> Int32[Array, " T"]:
        """The global position of each of `seq_len` tokens in `layout` order."""
        return layout_positions(self.layout, seq_len, num_shards(self.seq_axis))


class RingAttention(nnx.Module):
    """Multi-head self-attention over a sharded sequence: projections, optional q/k norm, RoPE, `ring_attention`.

    Heads are grouped (GQA, arXiv:2305.13245) where `num_kv_heads` is smaller than `num_heads`. Parameters:
    `query.kernel` `[D, N, H]`, `key.kernel` and `value.kernel` `[D, K, H]`, `out.kernel` `[N, H, D]`, no biases; with
    `qk_norm`, `query_norm.scale` and `key_norm.scale` `[H]` (RMSNorm over each head, before RoPE).
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        is_causal: bool = False,
        rope_theta: float | None = 10_000.0,
        qk_norm: bool = False,
        options: AttentionOptions | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Creates the parameters.

        Args:
            features: D, the size of the input and the output.
            num_heads: N, the query heads.
            num_kv_heads: K, the key and value heads; N if None.
            head_dim: H; `features / num_heads` if None.
            is_causal: whether a token sees only tokens at its own and earlier positions.
            rope_theta: base of the RoPE frequencies; None for no RoPE.
            qk_norm: whether queries and keys are normalised (arXiv:2302.05442).
            options: how attention runs on the mesh; `AttentionOptions()` if None.
            dtype: of projections, queries, keys, values and the result.
            param_dtype: of the parameters.
            rngs: where the parameters' randomness comes from.

        Raises:
            ValueError: head counts or head dim that do not fit together.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = default_head_dim(features, num_heads) if head_dim is None else head_dim
        check_heads(num_heads, num_kv_heads, head_dim, uses_rope=rope_theta is not None)
        options = AttentionOptions() if options is None else options
        project = functools.partial(
            nnx.LinearGeneral,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=matmul_precision(dtype),
            rngs=rngs,
        )
        to_heads = functools.partial(project, features, promote_dtype=_SplitHeads(1, options.head_axis))
        self.query = to_heads((num_heads, head_dim))
        self.key = to_heads((num_kv_heads, head_dim))
        self.value = to_heads((num_kv_heads, head_dim))
        from_heads = _SplitHeads(0, options.head_axis)
        self.out = project((num_heads, head_dim), features, axis=(-2, -1), promote_dtype=from_heads)
        self.query_norm = rms_norm(head_dim, param_dtype=param_dtype, rngs=rngs) if qk_norm else None
        self.key_norm = rms_norm(head_dim, param_dtype=param_dtype, rngs=rngs) if qk_norm else None
        self.is_causal = is_causal
        self.rope_theta = rope_theta
        self.options = options

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int32[Array, "*B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of each token of `x` over those it may see; tokens in the order of `options.layout`.

        Args:
            x: the global sequence, sharded or not.
            positions: int32 `[T]` or `[B, T]`, for RoPE; the tokens' global positions in the layout if None. Which
                tokens a causal mask hides follows from the layout alone.
            segment_ids: int32 `[B, T]`, 0 = padding, as in `ring_attention`.

        Raises:
            ValueError: from `ring_attention`, or positions of the wrong shape.
        """
        spec = token_spec(self.options.batch_axis, self.options.seq_axis)
        return call_on_auto_axes(RingAttention._attend, self, x, positions, segment_ids, out_spec=spec)

    def _attend(self, x: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query).astype(query.dtype), self.key_norm(key).astype(key.dtype)
        if self.rope_theta is not None:
            positions = self.options.positions(x.shape[1]) if positions is None else positions
            query = apply_rope(query, positions, theta=self.rope_theta)
            key = apply_rope(key, positions, theta=self.rope_theta)
        options = {field.name: getattr(self.options, field.name) for field in dataclasses.fields(self.options)}
        return self.out(ring_attention(query, key, value, is_causal=self.is_causal, segment_ids=segment_ids, **options))


@dataclasses.dataclass(frozen=True)
class _SplitHeads:
    """Flax's hook for casting a projection's arrays before use; also says that dim `dim` of the kernel is the heads."""

    dim: int
    head_axis: AxisName | None

    def __call__(self, args: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
        inputs, kernel, bias = flax_promote_dtype(args, dtype=dtype, inexact=inexact)
        return inputs, constrain_weight(kernel, self.dim, self.head_axis), bias


class BlockwiseMLP(nnx.Module):
    """SwiGLU feed-forward, `down(silu(gate(x)) * up(x))` (arXiv:2002.05202), a chunk of tokens at a time.

    Each shard works through its own tokens in chunks (Blockwise Parallel Transformer, arXiv:2305.19370) and computes a
    chunk's hidden activations again for the gradients, so an intermediate never has more than
    `[min(chunk_size, tokens of the shard / 4), width]` elements. Parameters: `gate` and `up` `[D, width]`, `down`
    `[width, D]`; their gradients are summed over chunks in `param_dtype`.
    """

    def __init__(
        self,
        features: int,
        width: int,
        *,
        chunk_size: int = 2048,
        seq_axis: AxisName = "seq",
        batch_axis: AxisName | None = "data",
        width_axis: AxisName | None = "tensor",
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Creates the parameters.

        Args:
            features: D, the size of the input and the output.
            width: the size of the hidden activations.
            chunk_size: the most tokens of a shard that are expanded to `width` at once.
            seq_axis: mesh axis, or tuple of axes, that T is sharded over in the mesh of `jax.set_mesh`, if any.
            batch_axis: the same for B.
            width_axis: the same for the hidden activations, which stay whole where they do not divide by it.
            dtype: of products and the result.
            param_dtype: of the parameters.
            rngs: where the parameters' randomness comes from.

        Raises:
            ValueError: a size below 1.
        """
        for name, size in (("features", features), ("width", width), ("chunk_size", chunk_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        init = nnx.initializers.lecun_normal()
        self.gate = nnx.Param(init(rngs.params(), (features, width), jnp.dtype(param_dtype)))
        self.up = nnx.Param(init(rngs.params(), (features, width), jnp.dtype(param_dtype)))
        self.down = nnx.Param(init(rngs.params(), (width, features), jnp.dtype(param_dtype)))
        self.chunk_size = chunk_size
        self.seq_axis = seq_axis
        self.batch_axis = batch_axis
        self.width_axis = width_axis
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The feed-forward of each token, in `dtype`.

        Raises:
            ValueError: an input that is not `[B, T, D]`, or B or T not divisible by its mesh axes.
        """
        features = self.gate.shape[0]
        if x.ndim != 3 or x.shape[-1] != features:
            raise ValueError(f"BlockwiseMLP takes [B, T, D] with D = {features}, got {x.shape}")
        spec = token_spec(self.batch_axis, self.seq_axis)
        return call_on_auto_axes(BlockwiseMLP._run, self, x.astype(self.dtype), out_spec=spec)

    def _run(self, x: Array) -> Array:
        weights = tuple(
            constrain_weight(weight[...], dim, self.width_axis)
            for weight, dim in ((self.gate, 1), (self.up, 1), (self.down, 0))
        )
        run = functools.partial(_swiglu_in_chunks, self.chunk_size)
        return map_token_shards(run, x, weights, batch_axis=self.batch_axis, seq_axis=self.seq_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu_in_chunks(
    chunk_size: int, x: Float[Array, "B T D"], weights: tuple[Array, Array, Array]
) -> Float[Array, "B T D"]:
    """The feed-forward of one shard's tokens, with `weights` gate, up and down."""
    return _swiglu_in_chunks_forward(chunk_size, x, weights)[0]


def _swiglu_in_chunks_forward(chunk_size: int, x: Array, weights: tuple[Array, Array, Array]):
    # Cast once for all chunks: in the loop it would be done, and be paid for, in each.
    gate, up, down = (w.astype(x.dtype) for w in weights)
    dot = functools.partial(jnp.dot, precision=matmul_precision(x.dtype))

    def feed_forward(chunk: Float[Array, "tokens D"]) -> Float[Array, "tokens D"]:
        return dot(_silu_times(dot(chunk, gate), dot(chunk, up)), down)

    return from_chunks(lax.map(feed_forward, to_chunks(x, chunk_size)), *x.shape[:2]), (x, weights)


def _swiglu_in_chunks_backward(chunk_size: int, residuals: tuple, d_out: Float[Array, "B T D"]):
    x, weights = residuals
    gate, up, down = (w.astype(x.dtype) for w in weights)
    dot = functools.partial(jnp.dot, precision=matmul_precision(x.dtype))

    def add_chunk(sums: tuple[Array, ...], chunk: tuple[Array, Array]) -> tuple[tuple[Array, ...], Array]:
        tokens, d_tokens_out = chunk
        hidden, multiplied = jax.vjp(_silu_times, dot(tokens, gate), dot(tokens, up))
        d_gate, d_up = multiplied(dot(d_tokens_out, down.T))
        pairs = ((tokens, d_gate), (tokens, d_up), (hidden, d_tokens_out))
        shares = (matmul("td,tw->dw", x, y) for x, y in pairs)
        sums = tuple(total + share.astype(total.dtype) for total, share in zip(sums, shares, strict=True))
        return sums, dot(d_gate, gate.T) + dot(d_up, up.T)

    zeros = match_varying(tuple(jnp.zeros_like(w) for w in weights), like=(x, d_out))
    d_weights, d_x = lax.scan(add_chunk, zeros, (to_chunks(x, chunk_size), to_chunks(d_out, chunk_size)))
    return from_chunks(d_x, *x.shape[:2]), d_weights


_swiglu_in_chunks.defvjp(_swiglu_in_chunks_forward, _swiglu_in_chunks_backward)


def _silu_times(gated: Float[Array, "tokens width"], up: Float[Array, "tokens width"]) -> Float[Array, "tokens width"]:
    return jax.nn.silu(gated) * up


def rms_norm(features: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs, epsilon: float = 1e-5) -> nnx.RMSNorm:
    """RMSNorm computed in float32 (arXiv:1910.07467); the caller casts the result to its own dtype."""
    return nnx.RMSNorm(features, epsilon=epsilon, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs)


def default_head_dim(features: int, num_heads: int) -> int:
    """`features / num_heads`, where that is a whole number."""
    if num_heads < 1 or features % num_heads:
        raise ValueError(f"{features} features do not divide by {num_heads} heads: change either, or give head_dim")
    return features // num_heads


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int, *, uses_rope: bool) -> None:
    """Raises ValueError if the head counts or the head dim cannot make an attention layer."""
    for name, size in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads {num_kv_heads} does not divide num_heads {num_heads}: each key/value head serves the same "
            "number of query heads"
        )
    if uses_rope and head_dim % 2:
        raise ValueError(f"RoPE rotates pairs of features: head_dim {head_dim} is odd; use an even one, or no RoPE")
