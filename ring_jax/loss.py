"""Cross entropy from hidden states, in chunks: the logits of all tokens never exist at once, forward or backward."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int, Shaped

from .collectives import AxisName
from .kernels import match_varying
from .precision import matmul
from .token_shards import constrain_weight, from_chunks, map_token_shards, on_auto_axes, to_chunks


def cross_entropy(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D vocab"],
    targets: Int[Array, "B T"],
    *,
    weights: Shaped[Array, "B T"] | None = None,
    chunk_size: int = 1024,
    seq_axis: AxisName = "seq",
    batch_axis: AxisName | None = "data",
    vocab_axis: AxisName | None = "tensor",
) -> Float32[Array, ""]:
    """Mean cross entropy of `softmax(hidden @ unembedding)` against `targets`, in nats per token.

    The mean is over tokens, weighted: `sum(weights * loss) / sum(weights)` over all sequences and all shards, so a
    document's share is its number of tokens, however it is sharded; it is 0 where all weights are 0. Each shard works
    through its own tokens in chunks; at most `[min(chunk_size, tokens / 4), vocab]` logits exist on a device. Where
    gradients are wanted they are computed beside the loss from the same logits. Logits and all statistics are float32;
    products are taken in the dtype of `hidden`, and the gradient of `unembedding` is summed in float32.

    Args:
        hidden: final hidden states, sharded or not; any token order, the same as that of `targets`.
        unembedding: maps hidden states to logits.
        targets: the id of each token's successor, `0 <= id < vocab`. An id out of range gives NaN unless its weight
            is 0, so any id may stand for "nothing to predict" where the weight says so.
        weights: the weight of each token's loss, any numeric or bool dtype; 1 for all if None. Not differentiated.
        chunk_size: the most tokens of a shard whose logits are computed at once.
        seq_axis: mesh axis, or tuple of axes, that T is sharded over in the mesh of `jax.set_mesh`. Without a mesh,
            or inside `shard_map` over the axis, the mean is that of the tokens given.
        batch_axis: the same for B.
        vocab_axis: the same for the vocab, which stays whole where it does not divide by it.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or a dim that does not divide by its mesh axes.
    """
    _check(hidden, unembedding, targets, weights, chunk_size)

    def mean(hidden: Array, unembedding: Array, targets: Array, weights: Array | None) -> Float32[Array, ""]:
        weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
        total = lax.stop_gradient(jnp.where((total := weights.sum()) == 0, 1, total))
        # Shares of many tokens are too small for float16: there the gradients, whose cotangent may be scaled to keep
        # them in range, are divided last.
        divides_last = hidden.dtype == jnp.float16
        shares = lax.stop_gradient(weights if divides_last else weights / total)
        of_shards = map_token_shards(
            lambda tokens, kernel: _shard_loss(chunk_size, tokens[0], kernel, *tokens[1:]),
            (hidden, targets.astype(jnp.int32), shares),
            constrain_weight(unembedding, 1, vocab_axis),
            batch_axis=batch_axis,
            seq_axis=seq_axis,
        )
        return of_shards.sum() / total if divides_last else of_shards.sum()

    return on_auto_axes(mean, PartitionSpec())(hidden, unembedding, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shard_loss(
    chunk_size: int,
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "D vocab"],
    targets: Int[Array, "B T"],
    shares: Float32[Array, "B T"],
) -> Float32[Array, "1 1"]:
    """The losses of one shard's tokens times their shares, summed; not differentiated by these."""
    # Cast once for all chunks: in the loop it would be done, and be paid for, in each.
    rounded = unembedding.astype(hidden.dtype)
    chunks = (to_chunks(x, chunk_size) for x in (hidden, targets, shares))
    losses = lax.map(lambda chunk: _chunk_loss(rounded, *chunk)[0], tuple(chunks))
    return losses.sum().reshape(1, 1)


def _shard_loss_forward(chunk_size: int, hidden: Array, unembedding: Array, targets: Array, shares: Array):
    rounded = unembedding.astype(hidden.dtype)

    def add_chunk(d_unembedding: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        loss, d_logits = _chunk_loss(rounded, *chunk)
        d_hidden = matmul("tv,dv->td", d_logits, rounded).astype(hidden.dtype)
        return d_unembedding + matmul("td,tv->dv", chunk[0], d_logits), (loss, d_hidden)

    zeros = match_varying(jnp.zeros(unembedding.shape, jnp.float32), like=(hidden, unembedding))
    chunks = tuple(to_chunks(x, chunk_size) for x in (hidden, targets, shares))
    d_unembedding, (losses, d_hidden) = lax.scan(add_chunk, zeros, chunks)
    gradients = from_chunks(d_hidden, *targets.shape), d_unembedding.astype(unembedding.dtype)
    return losses.sum().reshape(1, 1), gradients


def _shard_loss_backward(chunk_size: int, gradients: tuple[Array, Array], d_loss: Float32[Array, "1 1"]):
    d_hidden, d_unembedding = ((x.astype(jnp.float32) * d_loss[0, 0]).astype(x.dtype) for x in gradients)
    return d_hidden, d_unembedding, None, None


_shard_loss.defvjp(_shard_loss_forward, _shard_loss_backward)


def _chunk_loss(
    unembedding: Float[Array, "D vocab"],
    hidden: Float[Array, "tokens D"],
    targets: Int[Array, " tokens"],
    shares: Float32[Array, " tokens"],
) -> tuple[Float32[Array, ""], Float[Array, "tokens vocab"]]:
    """A chunk's losses times their shares, summed, and the gradient of the logits, rounded to the dtype of `hidden`."""
    logits = matmul("td,dv->tv", hidden, unembedding)
    lse = jax.nn.logsumexp(logits, axis=-1)
    is_target = _is_target(targets, logits)
    chosen = jnp.where(is_target, logits, 0).sum(axis=-1)
    is_valid = (targets >= 0) & (targets < logits.shape[-1])
    losses = jnp.where(shares == 0, 0, jnp.where(is_valid, lse - chosen, jnp.nan))
    d_logits = (jnp.exp(logits - lse[:, None]) - is_target.astype(jnp.float32)) * shares[:, None]
    return (shares * losses).sum(), d_logits.astype(hidden.dtype)


def _is_target(ids: Int[Array, " tokens"], logits: Float32[Array, "tokens vocab"]) -> Array:
    """Compared rather than indexed, so that a vocab sharded over another mesh axis stays sharded."""
    return lax.broadcasted_iota(jnp.int32, logits.shape, 1) == ids[:, None]


def _check(hidden: Array, unembedding: Array, targets: Array, weights: Array | None, chunk_size: int) -> None:
    if hidden.ndim != 3 or unembedding.ndim != 2 or hidden.shape[-1] != unembedding.shape[0]:
        raise ValueError(
            f"hidden must be [B, T, D] and unembedding [D, vocab], got {hidden.shape} and {unembedding.shape}; "
            "an embedding table [vocab, D] is given as table.T"
        )
    if targets.shape != hidden.shape[:2] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets must be integers [B, T] = {hidden.shape[:2]}, got {targets.dtype} {targets.shape}")
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"weights must have the shape of targets, {targets.shape}, got {weights.shape}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
