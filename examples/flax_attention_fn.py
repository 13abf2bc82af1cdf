"""Two Flax layers that already exist, one NNX and one Linen, made to work on a sharded sequence by one argument.

The weights stay the same; only where and how attention is computed changes: `python examples/flax_attention_fn.py`.
"""

import jax
import jax.numpy as jnp
from flax import linen, nnx

import ring_jax

NUM_SHARDS = 4
LAYOUT = "striped"
NUM_HEADS, FEATURES, NUM_TOKENS = 4, 64, 1024


def compare(name: str, ring_output: jax.Array, dense_output: jax.Array) -> None:
    difference = jnp.abs(ring_jax.from_layout(ring_output, LAYOUT, NUM_SHARDS) - dense_output).max()
    print(f"{name}: ring and dense attention with the same weights differ by at most {difference:.1e}")


def main() -> None:
    jax.config.update("jax_num_cpu_devices", NUM_SHARDS)  # changes nothing on GPUs
    jax.set_mesh(jax.make_mesh((NUM_SHARDS,), ("seq",)))
    attend = ring_jax.attention_fn(is_causal=True, layout=LAYOUT)

    inputs = jax.random.normal(jax.random.key(0), (1, NUM_TOKENS, FEATURES))
    in_layout = ring_jax.to_layout(inputs, LAYOUT, NUM_SHARDS)
    causal_mask = jnp.tril(jnp.ones((1, 1, NUM_TOKENS, NUM_TOKENS), bool))

    def nnx_layer(**how) -> nnx.MultiHeadAttention:
        return nnx.MultiHeadAttention(NUM_HEADS, in_features=FEATURES, decode=False, rngs=nnx.Rngs(0), **how)

    compare("nnx.MultiHeadAttention", nnx_layer(attention_fn=attend)(in_layout), nnx_layer()(inputs, mask=causal_mask))

    dense_layer = linen.MultiHeadDotProductAttention(num_heads=NUM_HEADS)
    ring_layer = linen.MultiHeadDotProductAttention(num_heads=NUM_HEADS, attention_fn=attend)
    weights = dense_layer.init(jax.random.key(0), inputs)
    ring_output = jnp.asarray(ring_layer.apply(weights, in_layout))
    dense_output = jnp.asarray(dense_layer.apply(weights, inputs, mask=causal_mask))
    compare("linen.MultiHeadDotProductAttention", ring_output, dense_output)


if __name__ == "__main__":
    main()
