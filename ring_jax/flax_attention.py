"""`attention_fn`: ring attention behind the function signature that Flax's attention layers call."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax.nnx.nn.dtypes import promote_dtype as flax_promote_dtype
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from .attention import ring_attention
from .rope import apply_rope

_NOT_BOUND = ("query", "key", "value", "return_lse")


def attention_fn(*, rope_theta: float = 10_000.0, **ring_attention_kwargs: Any) -> Callable[..., Array]:
    """An `attention_fn` for `nnx.MultiHeadAttention` and Linen's `MultiHeadDotProductAttention`.

    The returned function takes every argument of `nnx.dot_product_attention` by name, plus `input_positions`, and
    computes `ring_attention`: attention is causal if `is_causal=True` is bound here or given in the call. Dropout that
    is not active (rate 0 or deterministic) is accepted; a `mask`, a `bias`, a `module` to sow weights into, a
    `precision` or active dropout is refused by name, never ignored. Any number of batch dims is accepted.

    Args:
        rope_theta: base of the RoPE frequencies, used where a call gives `input_positions`; without them there is no
            RoPE, as in `nnx.dot_product_attention`.
        **ring_attention_kwargs: `layout`, `segment_ids`, `mesh` and all others of `ring_attention`, except
            `return_lse`.

    Raises:
        ValueError: an argument that cannot be bound; lists those that can.
    """
    valid = [name for name in inspect.signature(ring_attention).parameters if name not in _NOT_BOUND]
    for name in ring_attention_kwargs:
        if name not in valid:
            raise ValueError(f"attention_fn cannot bind {name!r}: choose from {', '.join(valid)}, rope_theta")
    always_causal = bool(ring_attention_kwargs.pop("is_causal", False))

    def attend(
        query: Float[Array, "*batch T N H"],
        key: Float[Array, "*batch T K H"],
        value: Float[Array, "*batch T K H"],
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: PRNGKeyArray | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        promote_dtype: Callable[..., Any] = flax_promote_dtype,
        is_causal: bool = False,
        *,
        input_positions: Int32[Array, "*batch T"] | None = None,
        qk_attn_weights_einsum: Callable[..., Array] | None = None,
        attn_weights_value_einsum: Callable[..., Array] | None = None,
    ) -> Float[Array, "*batch T N H"]:
        del broadcast_dropout, dropout_rng  # of dropout, which is refused where it is active
        _refuse(
            bias=bias,
            mask=mask,
            precision=precision,
            module=module,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            dropout_rate=None if deterministic or dropout_rate == 0 else dropout_rate,
        )
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        shape = query.shape
        query, key, value = (_with_one_batch_dim(x) for x in (query, key, value))
        if input_positions is not None:
            positions = _positions(input_positions, shape)
            query, key = (apply_rope(x, positions, theta=rope_theta) for x in (query, key))
        is_causal = always_causal or bool(is_causal)
        return ring_attention(query, key, value, is_causal=is_causal, **ring_attention_kwargs).reshape(shape)

    return attend


_CURES = {
    "bias": "leave it None",
    "mask": "use is_causal=True, or bind segment_ids in attention_fn; decoding with a cache masks too",
    "precision": "leave it None: float32 inputs are multiplied in float32, smaller dtypes accumulate in float32",
    "module": "do not ask for sown attention weights (sow_weights=True): they never exist",
    "qk_attn_weights_einsum": "leave qk_attn_weights_einsum_cls None",
    "attn_weights_value_einsum": "leave attn_weights_value_einsum_cls None",
    "dropout_rate": "pass deterministic=True, or use dropout_rate=0 and drop out elsewhere",
}


def _refuse(**arguments: Any) -> None:
    """Raises for any argument that is not None: ignoring it would silently compute something else."""
    for name, value in arguments.items():
        if value is not None:
            shown = f"of shape {jnp.shape(value)}" if hasattr(value, "shape") else f"= {value!r}"
            raise NotImplementedError(f"ring attention does not support {name} ({name} {shown}): {_CURES[name]}")


def _with_one_batch_dim(x: Float[Array, "*batch T N H"]) -> Float[Array, "B T N H"]:
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _positions(positions: Int32[Array, "*batch T"], shape: tuple[int, ...]) -> Int32[Array, "*B T"]:
    """Positions as `apply_rope` takes them: `[T]` as they are, one for each token with one batch dim."""
    positions = positions.astype(jnp.int32)
    return positions if positions.ndim == 1 else jnp.broadcast_to(positions, shape[:-2]).reshape(-1, shape[-3])
