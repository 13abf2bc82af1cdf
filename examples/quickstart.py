"""Ring attention on four devices, checked against dense attention on one: output, gradients, packed documents.

Runs on a laptop (four virtual CPU devices) as on four GPUs: `python examples/quickstart.py`.
"""

import jax
import jax.numpy as jnp

import ring_jax

NUM_SHARDS = 4
LAYOUT = "zigzag"


def ring(query, key, value, segment_ids):
    """Attention of packed documents; arguments and result in natural order, the work in zigzag order."""
    query, key, value, segment_ids = (
        ring_jax.to_layout(x, LAYOUT, NUM_SHARDS) for x in (query, key, value, segment_ids)
    )
    output = ring_jax.ring_attention(query, key, value, is_causal=True, segment_ids=segment_ids, layout=LAYOUT)
    return ring_jax.from_layout(output, LAYOUT, NUM_SHARDS)


def dense(query, key, value, segment_ids):
    """The same, with every score in memory."""
    same_document = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, mask=same_document)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", NUM_SHARDS)  # changes nothing on GPUs
    jax.set_mesh(jax.make_mesh((NUM_SHARDS,), ("seq",)))

    # 8 query heads share 2 key/value heads. Three documents, whose borders fall anywhere in the 2,048 tokens.
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (1, 2048, 8, 64))
    key, value = (jax.random.normal(k, (1, 2048, 2, 64)) for k in keys[1:3])
    weights = jax.random.normal(keys[3], query.shape)
    segment_ids = jnp.repeat(jnp.array([[1, 2, 3]], jnp.int32), jnp.array([700, 11, 1337]), axis=1)

    def gradients(attention):
        def loss(query, key, value):
            return jnp.vdot(attention(query, key, value, segment_ids), weights)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)

    output = jax.jit(ring)(query, key, value, segment_ids)
    print(f"output    {output.shape}, sharded {output.sharding.spec}")
    difference = jnp.abs(output - dense(query, key, value, segment_ids)).max()
    print(f"output    differs from dense attention by at most {difference:.1e}")
    for name, ours, theirs in zip(("query", "key", "value"), gradients(ring), gradients(dense), strict=True):
        print(f"gradient  of {name} differs by at most {jnp.abs(ours - theirs).max():.1e}")


if __name__ == "__main__":
    main()
