"""The transformer again, dense and on one device, from a dict of weights: an oracle that shares no code with ring_jax.

Tokens come in natural order. Attention is a full softmax over a [T, T] mask; RoPE multiplies complex numbers. With
`dtype=jnp.float64` (inside `jax.enable_x64()`) it is the exact answer, with float32 the baseline of the error budget.
"""

import jax
import jax.numpy as jnp
import numpy as np


def dense_logits(weights, tokens, segment_ids, *, theta, eps, dtype, zero_attention=False):
    """Logits [B, T, vocab] of `weights`, a nested dict with the names and shapes of the model's parameters."""
    weights = jax.tree.map(lambda w: jnp.asarray(w, dtype), weights)
    visible = _visible(tokens.shape[1], segment_ids)
    h = weights["embedding"]["embedding"][tokens]
    layers = weights["layers"]
    for index in range(layers["mlp"]["gate"].shape[0]):
        layer = jax.tree.map(lambda w, index=index: w[index], layers)
        x = _rms_norm(h, layer["attention_norm"]["scale"], eps)
        if not zero_attention:
            h = h + _attention(layer["attention"], x, visible, theta, eps)
        x = _rms_norm(h, layer["mlp_norm"]["scale"], eps)
        gate, up = _einsum("btd,df->btf", x, layer["mlp"]["gate"]), _einsum("btd,df->btf", x, layer["mlp"]["up"])
        h = h + _einsum("btf,fd->btd", gate / (1 + jnp.exp(-gate)) * up, layer["mlp"]["down"])
    h = _rms_norm(h, weights["norm"]["scale"], eps)
    unembedding = weights["head"] if "head" in weights else weights["embedding"]["embedding"].T
    return _einsum("btd,dv->btv", h, unembedding)


def _attention(weights, x, visible, theta, eps):
    query, key, value = (_einsum("btd,dnh->btnh", x, weights[name]["kernel"]) for name in ("query", "key", "value"))
    if "query_norm" in weights:
        query = _rms_norm(query, weights["query_norm"]["scale"], 1e-5)
        key = _rms_norm(key, weights["key_norm"]["scale"], 1e-5)
    query, key = _rope(query, theta), _rope(key, theta)
    group = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
    scores = _einsum("btnh,bsnh->bnts", query, key) / float(np.sqrt(query.shape[-1]))
    scores = jnp.where(visible, scores, -jnp.inf)
    largest = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.asarray(-1e30, scores.dtype))
    unnormalised = jnp.exp(scores - jax.lax.stop_gradient(largest))
    total = unnormalised.sum(axis=-1, keepdims=True)
    probabilities = unnormalised / jnp.where(total == 0, jnp.ones_like(total), total)
    return _einsum("btnh,nhd->btd", _einsum("bnts,bsnh->btnh", probabilities, value), weights["out"]["kernel"])


def _rope(x, theta):
    half = x.shape[-1] // 2
    frequency = theta ** (-np.arange(half, dtype=np.float64) / half)
    rotation = np.exp(1j * np.outer(np.arange(x.shape[1]), frequency))[None, :, None, :]
    rotated = jax.lax.complex(x[..., :half], x[..., half:])
    rotated = rotated * jnp.asarray(rotation, rotated.dtype)
    return jnp.concatenate([rotated.real, rotated.imag], axis=-1)


def _rms_norm(x, scale, eps):
    return x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def _visible(seq_len, segment_ids):
    causal = np.tril(np.ones((seq_len, seq_len), bool))[None, None]
    if segment_ids is None:
        return causal
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids[:, :, None] != 0)
    return causal & same[:, None]


def _einsum(equation, x, y):
    return jnp.einsum(equation, x, y, precision="highest")
