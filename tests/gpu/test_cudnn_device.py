"""The cuDNN blocks on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.kernels import cudnn
from ring_jax.kernels.contract import AttentionState, BlockMask
from ring_jax.kernels.reference import reference_attention, visible_pairs
from tests.block_cases import Case, arrays, blocks, failures
from tests.budget import assert_within_budget

pytestmark = pytest.mark.gpu

CASES = [
    Case("bfloat16", batch=2, queries=512, keys=384, heads=8, kv_heads=2, head_dim=128, is_causal=False),
    Case("float16", queries=300, keys=200, heads=4, kv_heads=4, head_dim=64, is_causal=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_full_blocks_agree_with_the_oracle(case):
    found = jax.jit(lambda data: blocks(case)(cudnn, data))(arrays(case))
    assert failures(case, jax.tree.map(np.asarray, found)) == []


def test_a_shards_causal_attention_to_itself():
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((1, 384, n, 64), np.float32).astype(jnp.bfloat16) for n in (4, 2, 2, 4))

    @jax.jit
    def run(q, k, v, d_out):
        positions = jnp.arange(384, dtype=jnp.int32) * 3
        mask = BlockMask(positions, positions, None, None, is_causal=True)
        state = AttentionState(jnp.zeros(q.shape), jnp.full((1, 4, 384), -jnp.inf))
        output, lse = cudnn.forward(q, k, v, state, mask, scale=0.125)
        delta = jnp.einsum("btnh,btnh->bnt", d_out.astype(jnp.float32), output)
        gradients = cudnn.backward(q, k, v, d_out, lse, delta, jnp.zeros(q.shape), None, mask, scale=0.125)
        return output, lse, gradients.dq, gradients.dk, gradients.dv

    positions = np.arange(384, dtype=np.int32)
    visible = visible_pairs(positions, positions, is_causal=True)
    want, dense = (
        reference_attention(q, k, v, visible, d_out=d_out, scale=0.125, low_precision=low)
        for low in (None, jnp.dtype("bfloat16"))
    )
    for name, found, exact, baseline in zip(want._fields, run(q, k, v, d_out), want, dense, strict=True):
        assert_within_budget(np.asarray(found), exact, baseline, "bfloat16", name)
