"""A Llama-shaped transformer over sharded sequences: RMSNorm, RoPE, grouped-query ring attention, SwiGLU."""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from .kernels import match_varying
from .modules import AttentionOptions, BlockwiseMLP, RingAttention, check_heads, default_head_dim, rms_norm
from .precision import matmul
from .ring import SAVED_NAMES
from .token_shards import call_on_auto_axes, constrain, map_token_shards, token_spec

type RematMode = Literal["none", "attention", "layer"]
REMAT_MODES: tuple[str, ...] = get_args(RematMode.__value__)
# Name of each layer's input, by which a remat policy can move it to the host.
LAYER_INPUT = "layer_input"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of a `Transformer` and how it computes. Raises ValueError for values that make no model.

    Attributes:
        vocab_size: number of token ids.
        model_dim: D, the size of the residual stream.
        num_layers: transformer layers.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; N if None.
        head_dim: H; `model_dim / num_heads` if None.
        mlp_dim: width of the feed-forward; if None, 8/3 of `model_dim` rounded up to a multiple of 32.
        rope_theta: base of the RoPE frequencies.
        norm_eps: added to mean squares in RMSNorm.
        qk_norm: whether each head's queries and keys are normalised before RoPE.
        tie_embeddings: whether the unembedding is the embedding table.
        dtype: of activations and products; float32, bfloat16 or float16.
        param_dtype: of the parameters.
        remat: what the backward pass computes again. "none": nothing but kernels' tiles and feed-forward chunks, every
            activation is kept. "attention": all but each layer's attention output and logsumexp, so that the forward
            ring does not run again. "layer": everything but each layer's input.
        offload: whether what remat keeps of each layer waits for the backward pass in pinned host memory.
        mlp_chunk: the most tokens of a shard that the feed-forward expands at once.
        attention: how attention runs on the mesh.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_embeddings: bool = False
    dtype: DTypeLike = "float32"
    param_dtype: DTypeLike = "float32"
    remat: RematMode = "none"
    offload: bool = False
    mlp_chunk: int = 2048
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "model_dim", "num_layers", "num_heads", "mlp_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.remat not in REMAT_MODES:
            raise ValueError(f"unknown remat {self.remat!r}: choose one of {', '.join(REMAT_MODES)}")
        if self.offload and self.remat == "none":
            raise ValueError("offload moves what remat keeps, but remat 'none' keeps all: use attention or layer")
        # The derived sizes and canonical dtypes are filled in, so that configs compare and print by what they mean.
        fill = functools.partial(object.__setattr__, self)
        if self.num_kv_heads is None:
            fill("num_kv_heads", self.num_heads)
        if self.head_dim is None:
            fill("head_dim", default_head_dim(self.model_dim, self.num_heads))
        if self.mlp_dim is None:
            fill("mlp_dim", -(-8 * self.model_dim // 96) * 32)
        for name in ("dtype", "param_dtype"):
            fill(name, _float_dtype_name(name, getattr(self, name)))
        assert self.num_kv_heads is not None
        assert self.head_dim is not None
        assert self.mlp_dim is not None
        if self.mlp_dim < 1:
            raise ValueError(f"mlp_dim must be at least 1, got {self.mlp_dim}")
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim, uses_rope=True)


class Transformer(nnx.Module):
    """A decoder: token ids in, logits of each next token out. Tokens come in the order of `config.attention.layout`.

    Runs on the mesh of `jax.set_mesh`, tokens sharded over its batch and sequence axes. The layers' parameters are
    stacked along a new first dim and the layers are one `scan`, so that compile time does not grow with depth.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        """Creates the parameters, in `config.param_dtype`."""
        self.config = config
        # Layers add outputs of order 1: an embedding much smaller would drown in the mean over a long context that
        # attention starts as, and tokens would all look alike. A tied one also makes logits and must stay small.
        table_init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.model_dim,
            dtype=jnp.dtype(config.dtype),
            param_dtype=jnp.dtype(config.param_dtype),
            embedding_init=table_init if config.tie_embeddings else nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.layers = _stacked_layers(config, rngs)
        self.norm = rms_norm(config.model_dim, epsilon=config.norm_eps, param_dtype=config.param_dtype, rngs=rngs)
        shape = (config.model_dim, config.vocab_size)
        untied = not config.tie_embeddings
        self.head = nnx.Param(table_init(rngs.params(), shape, jnp.dtype(config.param_dtype))) if untied else None

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        *,
        positions: Int32[Array, "*B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> Float32[Array, "B T vocab"]:
        """Logits of the token after each one. For training use `hidden` and `cross_entropy`, which need less memory.

        Arguments and errors are those of `hidden`.
        """
        hidden = self.hidden(tokens, positions=positions, segment_ids=segment_ids)

        def logits(model: Transformer, hidden: Array) -> Array:
            return matmul("btd,dv->btv", hidden, model.unembedding.astype(hidden.dtype))

        return call_on_auto_axes(logits, self, hidden, out_spec=self._token_spec)

    def hidden(
        self,
        tokens: Int32[Array, "B T"],
        *,
        positions: Int32[Array, "*B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Normalised hidden states after the last layer, in `config.dtype`; `@ unembedding` makes them logits.

        Args:
            tokens: ids in `[0, vocab_size)`, in layout order; others give NaN.
            positions: int32 `[T]` or `[B, T]`, for RoPE; the tokens' global positions in the layout if None.
            segment_ids: int32 `[B, T]`: which document each token is of; 0 is padding.

        Raises:
            ValueError: tokens that are not int32 `[B, T]`, no mesh, or what `ring_attention` refuses.
        """
        if tokens.ndim != 2 or tokens.dtype != jnp.int32:
            raise ValueError(f"tokens must be int32 [B, T], got {tokens.dtype} {tokens.shape}")
        return call_on_auto_axes(Transformer._hidden, self, tokens, positions, segment_ids, out_spec=self._token_spec)

    @property
    def unembedding(self) -> Float[Array, "D vocab"]:
        """The matrix from hidden states to logits, in `config.param_dtype`."""
        return self.embedding.embedding[...].T if self.head is None else self.head[...]

    def _hidden(self, tokens: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        graph, stacked = nnx.split(self.layers)

        def apply_layer(h: Array, state: nnx.State) -> tuple[Array, None]:
            # Without the constraint XLA prefers another order of dims for the backward pass's products, and holds a
            # transposed copy of the inputs of all layers.
            h = with_layout_constraint(checkpoint_name(h, LAYER_INPUT), Layout((0, 1, 2)))
            return nnx.merge(graph, state)(h, positions, segment_ids), None

        axes = dict(batch_axis=self.config.attention.batch_axis, seq_axis=self.config.attention.seq_axis)
        embedded = map_token_shards(
            functools.partial(_look_up, jnp.dtype(self.config.dtype)), tokens, self.embedding.embedding[...], **axes
        )
        h, _ = lax.scan(_with_remat(apply_layer, self.config), constrain(embedded, self._token_spec), stacked)
        return self.norm(h).astype(h.dtype)

    @property
    def _token_spec(self):
        return token_spec(self.config.attention.batch_axis, self.config.attention.seq_axis)


class _Layer(nnx.Module):
    """`h + attention(norm(h))`, then `h + mlp(norm(h))`."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        dtypes = dict(dtype=config.dtype, param_dtype=config.param_dtype)
        norm = functools.partial(
            rms_norm, config.model_dim, epsilon=config.norm_eps, param_dtype=config.param_dtype, rngs=rngs
        )
        assert config.mlp_dim is not None
        self.attention_norm = norm()
        self.attention = RingAttention(
            config.model_dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            is_causal=True,
            rope_theta=config.rope_theta,
            qk_norm=config.qk_norm,
            options=config.attention,
            rngs=rngs,
            **dtypes,
        )
        self.mlp_norm = norm()
        self.mlp = BlockwiseMLP(
            config.model_dim,
            config.mlp_dim,
            chunk_size=config.mlp_chunk,
            seq_axis=config.attention.seq_axis,
            batch_axis=config.attention.batch_axis,
            width_axis=config.attention.head_axis,
            rngs=rngs,
            **dtypes,
        )

    def __call__(
        self, h: Float[Array, "B T D"], positions: Array | None, segment_ids: Array | None
    ) -> Float[Array, "B T D"]:
        # The names show in profiles, and tell the planner whose memory a buffer is.
        with jax.named_scope("attention"):
            normed = self.attention_norm(h).astype(h.dtype)
            h = h + self.attention(normed, positions=positions, segment_ids=segment_ids)
        with jax.named_scope("mlp"):
            return h + self.mlp(self.mlp_norm(h).astype(h.dtype))


def _stacked_layers(config: TransformerConfig, rngs: nnx.Rngs) -> _Layer:
    """One layer module whose parameters hold those of all layers."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> _Layer:
        return _Layer(config, rngs=rngs)

    return create(rngs)


def _with_remat(apply_layer, config: TransformerConfig):
    """`apply_layer` as the body of a scan, keeping for the backward pass what `config` says."""
    if config.remat == "none":
        return apply_layer
    names = SAVED_NAMES if config.remat == "attention" else ()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    if config.offload:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT, *names],
            offload_src="device",
            offload_dst="pinned_host",
        )
    # A scan already keeps XLA from merging the two computations of a layer.
    return jax.checkpoint(apply_layer, policy=policy, prevent_cse=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _look_up(dtype: jnp.dtype, tokens: Int32[Array, "B T"], table: Float[Array, "vocab D"]) -> Float[Array, "B T D"]:
    """The rows of `table` for the tokens of one shard, NaN for ids out of range; gradients are summed in float32."""
    return jnp.take(table.astype(dtype), tokens, axis=0)


def _look_up_forward(dtype: jnp.dtype, tokens: Array, table: Array):
    return _look_up(dtype, tokens, table), (tokens, table)


def _look_up_backward(dtype: jnp.dtype, residuals: tuple[Array, Array], d_rows: Array):
    tokens, table = residuals
    # Zeros that wait for the cotangent: constants would be made early and held through the backward pass.
    zero, d_rows = lax.optimization_barrier((jnp.zeros((), jnp.float32), d_rows))
    zeros = match_varying(jnp.broadcast_to(zero, table.shape), like=d_rows)
    return None, zeros.at[tokens].add(d_rows.astype(jnp.float32)).astype(table.dtype)


_look_up.defvjp(_look_up_forward, _look_up_backward)


def _float_dtype_name(name: str, dtype: DTypeLike) -> str:
    valid = ("float32", "bfloat16", "float16")
    try:
        canonical = jnp.dtype(dtype).name
    except TypeError:
        canonical = str(dtype)
    if canonical not in valid:
        raise ValueError(f"{name} {canonical!r} is not supported: choose one of {', '.join(valid)}")
    return canonical
