"""The Triton kernels on a GPU. Where jax-triton cannot run, they come from `tests.gpu.triton_programs`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.kernels.reference import reference_attention, visible_pairs
from tests.block_cases import arrays, failures
from tests.budget import allowed, assert_does_not_grow, assert_within_budget, error
from tests.gpu.triton_programs import CASES, LONG_KEYS, LONG_SHAPE, MANY_BLOCKS, ONE_BLOCK, load, long_program, program

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_oracle_and_repeats_its_bits(case):
    run, data = load(str(case), program(case)), arrays(case)
    first, second = (jax.tree.map(np.asarray, run(data)) for _ in range(2))
    assert failures(case, first) == []
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_error_does_not_grow_with_the_number_of_blocks():
    data = arrays(MANY_BLOCKS)
    visible = visible_pairs(data["q_positions"], data["k_positions"], is_causal=True)
    want = reference_attention(
        data["query"], data["key"], data["value"], visible,
        d_out=data["d_out"], d_lse=data["d_lse"], scale=MANY_BLOCKS.scale,
    )  # fmt: skip
    many, one = (load(str(case), program(case))(data) for case in (MANY_BLOCKS, ONE_BLOCK))
    for name in ("output", "lse", "dq", "dk", "dv"):
        many_blocks, one_block = (error(np.asarray(found[name]), getattr(want, name)) for found in (many, one))
        assert_does_not_grow(many_blocks, one_block, "bfloat16", name)


def test_arrays_past_2_to_the_31_elements():
    """The last tokens lie beyond what 32 bits address."""
    keys = jax.random.split(jax.random.key(0), 3)
    key, value = (jax.random.normal(k, (1, LONG_KEYS, 8, 128), jnp.bfloat16) for k in keys[:2])
    query = jax.random.normal(keys[2], LONG_SHAPE, jnp.bfloat16)
    output, lse, dq = load("long", long_program)(query, key, value)
    last, key, value = np.asarray(query[:, -16:]), np.asarray(key), np.asarray(value)
    visible = np.ones((1, 16, LONG_KEYS), bool)
    # With delta = 0 the gradient misses the term rowsum(d_out * output), which d_lse can supply.
    exact = reference_attention(last, key, value, visible, scale=0.1)
    d_lse = np.einsum("btnh,btnh->bnt", last.astype(np.float64), exact.output)
    want, dense = (
        reference_attention(last, key, value, visible, d_out=last, d_lse=d_lse, scale=0.1, low_precision=low)
        for low in (None, jnp.dtype("bfloat16"))
    )
    assert_within_budget(np.asarray(output), want.output, dense.output, "bfloat16", "output")
    assert_within_budget(np.asarray(lse), want.lse, dense.lse, "bfloat16", "lse")
    assert error(np.asarray(dq), want.dq) <= allowed(error(dense.dq, want.dq), "bfloat16")
