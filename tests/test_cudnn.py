"""The cuDNN block kernel without a GPU: what it asks of jax, what it refuses, and its merging around a stand-in."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.kernels import cudnn
from ring_jax.kernels.contract import AttentionState, BlockMask
from ring_jax.kernels.reference import reference_attention, visible_pairs
from tests.block_cases import Case, arrays, blocks, failures
from tests.budget import assert_within_budget


@pytest.fixture
def dense_cudnn(monkeypatch):
    """What cuDNN's two calls compute, written densely in float32 and rounded to the inputs' dtype as cuDNN does."""

    def scores(query, key, mask_name, scale):
        group = query.shape[2] // key.shape[2]
        result = scale * jnp.einsum("btnh,bsnh->bnts", _wide(query), _wide(key, group))
        seen = jnp.tri(query.shape[1], key.shape[1], dtype=bool)[None, None]
        return jnp.where(seen, result, -jnp.inf) if mask_name == "CAUSAL" else result

    def forward(query, key, value, mask_name, scale):
        s = scores(query, key, mask_name, scale)
        lse = jax.nn.logsumexp(s, axis=-1)
        probs = jnp.exp(s - lse[..., None])
        output = jnp.einsum("bnts,bsnh->btnh", probs, _wide(value, query.shape[2] // value.shape[2]))
        return output.astype(query.dtype), lse

    def backward(query, key, value, lse, output, d_out, mask_name, scale):
        group = query.shape[2] // key.shape[2]
        probs = jnp.exp(scores(query, key, mask_name, scale) - lse[..., None])
        delta = jnp.einsum("btnh,btnh->bnt", _wide(d_out), _wide(output))
        d_probs = jnp.einsum("btnh,bsnh->bnts", _wide(d_out), _wide(value, group))
        d_scores = scale * probs * (d_probs - delta[..., None])
        dq = jnp.einsum("bnts,bsnh->btnh", d_scores, _wide(key, group))
        dk = jnp.einsum("bnts,btnh->bsnh", d_scores, _wide(query))
        dv = jnp.einsum("bnts,btnh->bsnh", probs, _wide(d_out))
        dk, dv = (x.reshape(*key.shape[:3], group, key.shape[3]).sum(axis=3) for x in (dk, dv))
        return tuple(x.astype(query.dtype) for x in (dq, dk, dv))

    monkeypatch.setattr(cudnn, "_call_forward", forward)
    monkeypatch.setattr(cudnn, "_call_backward", backward)


def _wide(x, repeats=1):
    return jnp.repeat(x.astype(jnp.float32), repeats, axis=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merged_blocks_agree_with_the_oracle(dense_cudnn, dtype):
    case = Case(dtype, batch=2, queries=48, keys=40, heads=4, kv_heads=2, head_dim=32, is_causal=False)
    found = blocks(case)(cudnn, arrays(case))
    assert failures(case, jax.tree.map(np.asarray, found)) == []


def test_rows_without_a_cotangent_still_pass_on_that_of_the_logsumexp(dense_cudnn):
    case = Case(queries=16, keys=24, is_causal=False)
    data = arrays(case)
    data["d_out"] = np.zeros_like(data["d_out"])
    found = blocks(case)(cudnn, data)
    visible = visible_pairs(data["q_positions"], data["k_positions"])
    want = reference_attention(
        data["query"], data["key"], data["value"], visible, d_lse=data["d_lse"], scale=case.scale
    )
    dense = reference_attention(
        data["query"], data["key"], data["value"], visible, d_lse=data["d_lse"], scale=case.scale,
        low_precision=jnp.dtype(case.dtype),
    )  # fmt: skip
    for name in ("dq", "dk"):
        assert_within_budget(found[name], getattr(want, name), getattr(dense, name), case.dtype, name)
    assert np.abs(found["dv"]).max() < 1e-6


def test_a_shards_causal_attention_to_itself(dense_cudnn):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 32, heads, 16), np.float32).astype(jnp.bfloat16) for heads in (4, 2, 2))
    positions = np.arange(100, 132, dtype=np.int32)
    there = jnp.asarray(positions)
    state = AttentionState(jnp.zeros(q.shape, jnp.float32), jnp.full((1, 4, 32), -jnp.inf))
    mask = BlockMask(there, there, None, None, True)
    found = cudnn.forward(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), state, mask, scale=0.25)
    visible = visible_pairs(positions, positions, is_causal=True)
    want = reference_attention(q, k, v, visible, scale=0.25)
    dense = reference_attention(q, k, v, visible, scale=0.25, low_precision=jnp.dtype("bfloat16"))
    assert_within_budget(np.asarray(found.output), want.output, dense.output, "bfloat16", "output")
    assert_within_budget(np.asarray(found.lse), want.lse, dense.lse, "bfloat16", "lse")


@pytest.mark.parametrize(("is_causal", "name"), [(True, "CAUSAL"), (False, "NO_MASK")])
def test_asks_jax_for_cudnn_with_the_right_mask(is_causal, name):
    q, k = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 64, 2, 64), jnp.bfloat16)
    out, lse = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((2, 4, 64), jnp.float32)
    positions = jnp.arange(64, dtype=jnp.int32)
    mask = BlockMask(positions, positions, None, None, is_causal)

    def step(q, k, out, lse):
        state = cudnn.forward(q, k, k, AttentionState(out, lse), mask, scale=0.125)
        return state, cudnn.backward(q, k, k, q, lse, lse, out, None, mask, scale=0.125)

    text = jax.jit(step).trace(q, k, out, lse).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$\w+", text)) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    masks = re.findall(r"mask_type\\22: \\22(\w+)\\22", text)
    assert masks == [name, name]


def test_refuses_masks_it_does_not_know():
    q, ids = jnp.zeros((1, 8, 1, 64), jnp.bfloat16), jnp.ones((1, 8), jnp.int32)
    state = AttentionState(jnp.zeros(q.shape), jnp.zeros((1, 1, 8)))
    here, there = jnp.arange(8, dtype=jnp.int32), jnp.arange(8, 16, dtype=jnp.int32)
    with pytest.raises(NotImplementedError, match=r"known only at run time\. 'triton' and 'xla' mask by position"):
        cudnn.forward(q, q, q, state, BlockMask(here, there, None, None, True), scale=1.0)
    with pytest.raises(NotImplementedError, match="no segment ids; 'triton' and 'xla' do"):
        cudnn.forward(q, q, q, state, BlockMask(here, here, ids, ids, False), scale=1.0)


@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype", "reason"),
    [
        (None, 128, "bfloat16", "needs an NVIDIA GPU"),
        (75, 128, "bfloat16", "this GPU has 7.5"),
        (80, 256, "bfloat16", "up to 128 on this GPU, and this one is 256"),
        (90, 100, "bfloat16", "multiples of 8 up to 256"),
        (90, 128, "float32", "bfloat16 and float16, and the inputs are float32"),
    ],
)
def test_says_what_it_cannot_do(capability, head_dim, dtype, reason):
    assert reason in (cudnn.unsupported_reason(capability, head_dim, dtype) or "")
    assert cudnn.unsupported_reason(90, 256, "bfloat16") is None


def test_says_when_jax_has_moved_its_names(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.cudnn.fused_attention_stablehlo", None)
    with pytest.raises(NotImplementedError, match=r"it was written for jax 0\.11\.2"):
        cudnn._wrappers()
