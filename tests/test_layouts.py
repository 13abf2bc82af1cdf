"""Layouts: every token on exactly one shard, as the definitions say; and back again, wherever the array lives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.cases import SHARDS
from ring_jax import LAYOUTS, from_layout, layout_positions, to_layout

AXIS_TYPES = {
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "mixed": (AxisType.Auto, AxisType.Explicit),
    "mixed the other way": (AxisType.Explicit, AxisType.Auto),
}


def _positions_by_definition(layout: str, seq_len: int, shards: int) -> list[int]:
    """What each shard holds, written from the layout's description with nothing but lists."""
    tokens = list(range(seq_len))
    if layout == "contiguous":
        return tokens
    if layout == "striped":
        return [token for rank in range(shards) for token in tokens[rank::shards]]
    size = seq_len // (2 * shards)
    chunks = [tokens[i * size : (i + 1) * size] for i in range(2 * shards)]
    return [token for rank in range(shards) for token in chunks[rank] + chunks[2 * shards - 1 - rank]]


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_are_those_of_the_definition(layout: str, shards: int):
    for seq_len in (2 * shards, 48, 240):
        positions = layout_positions(layout, seq_len, shards)
        assert positions.dtype == jnp.int32
        assert positions.shape == (seq_len,)
        assert positions.tolist() == _positions_by_definition(layout, seq_len, shards)


@settings(max_examples=30, derandomize=True, deadline=None, database=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    shards=st.integers(1, 9),
    chunk=st.integers(1, 5),
    before=st.lists(st.integers(1, 3), max_size=2),
    after=st.lists(st.integers(1, 3), max_size=2),
    from_the_end=st.booleans(),
)
def test_reorders_the_named_dim_and_back(layout, shards, chunk, before, after, from_the_end):
    seq_len = 2 * shards * chunk
    shape = (*before, seq_len, *after)
    dim = len(before)
    axis = dim - len(shape) if from_the_end else dim
    x = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    dealt = to_layout(jnp.asarray(x), layout, shards, axis)
    assert dealt.dtype == x.dtype
    np.testing.assert_array_equal(dealt, np.take(x, _positions_by_definition(layout, seq_len, shards), axis=dim))
    np.testing.assert_array_equal(from_layout(dealt, layout, shards, axis), x)


@pytest.mark.parametrize("axis_types", AXIS_TYPES.values(), ids=AXIS_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_arrays_keep_their_sharding(layout: str, axis_types):
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types)
    x = np.arange(2 * 48 * 3, dtype=np.float32).reshape(2, 48, 3)
    sharding = NamedSharding(mesh, PartitionSpec("data", "seq"))
    sharded = jax.device_put(x, sharding)
    expected = x[:, _positions_by_definition(layout, 48, 4)]
    with jax.set_mesh(mesh):
        for transform in (lambda f: f, jax.jit):
            dealt = transform(lambda x: to_layout(x, layout, 4))(sharded)
            np.testing.assert_array_equal(dealt, expected)
            np.testing.assert_array_equal(transform(lambda x: from_layout(x, layout, 4))(dealt), x)
            assert jax.typeof(dealt) == jax.typeof(sharded)
            # Inside jit nobody says how an array lies on Auto axes.
            if transform is not jax.jit or axis_types[1] == AxisType.Explicit:
                assert dealt.sharding.is_equivalent_to(sharding, 3)


@pytest.mark.parametrize("axis_types", AXIS_TYPES.values(), ids=AXIS_TYPES)
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_gradient_is_the_inverse_permutation(layout: str, axis_types):
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types)
    sharding = NamedSharding(mesh, PartitionSpec("data", "seq"))
    x, cotangent = (
        jax.device_put(np.random.default_rng(seed).standard_normal((2, 48)).astype(np.float32), sharding)
        for seed in (0, 1)
    )
    with jax.set_mesh(mesh):
        _, pull_back = jax.vjp(lambda x: to_layout(x, layout, 4), x)
        (gradient,) = pull_back(cotangent)
        np.testing.assert_array_equal(gradient, from_layout(cotangent, layout, 4))
        assert jax.typeof(gradient) == jax.typeof(x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_array_on_one_device_and_vmap(layout: str):
    x = jax.device_put(jnp.arange(3 * 24, dtype=jnp.int32).reshape(3, 24), jax.devices()[5])
    expected = np.asarray(x)[:, _positions_by_definition(layout, 24, 3)]
    np.testing.assert_array_equal(to_layout(x, layout, 3), expected)
    np.testing.assert_array_equal(jax.vmap(lambda row: to_layout(row, layout, 3, axis=0))(x), expected)


@pytest.mark.parametrize("axis_types", [AXIS_TYPES["auto"], AXIS_TYPES["explicit"]], ids=["auto", "explicit"])
@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_no_device_collects_the_sequence(layout: str, axis_types):
    mesh = jax.make_mesh((2, 4), ("data", "seq"), axis_types)
    sharding = NamedSharding(mesh, PartitionSpec("data", "seq"))
    x = jax.ShapeDtypeStruct((2, 64), jnp.int32, sharding=sharding)
    for reorder in (to_layout, from_layout):
        compiled = jax.jit(lambda x, reorder=reorder: reorder(x, layout, 4), out_shardings=sharding).lower(x).compile()
        assert compiled.output_shardings.is_equivalent_to(sharding, 2)
        text = compiled.as_text() or ""
        assert "all-gather" not in text
        assert "all-to-all" in text or "collective-permute" in text


def test_vmap_over_explicit_axes():
    mesh = jax.make_mesh((2, 4), ("data", "seq"), AXIS_TYPES["explicit"])
    x = jax.device_put(
        jnp.arange(96, dtype=jnp.int32).reshape(2, 48), NamedSharding(mesh, PartitionSpec("data", "seq"))
    )
    with jax.set_mesh(mesh):
        dealt = jax.vmap(lambda row: to_layout(row, "striped", 4, axis=0))(x)
    np.testing.assert_array_equal(dealt, np.asarray(x)[:, _positions_by_definition("striped", 48, 4)])
    assert jax.typeof(dealt) == jax.typeof(x)


def test_numpy_arrays_are_taken():
    tokens: Any = np.arange(8)
    np.testing.assert_array_equal(to_layout(tokens, "striped", 2, axis=0), [0, 2, 4, 6, 1, 3, 5, 7])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: layout_positions("spiral", 8, 2), ["'spiral'", "contiguous, zigzag, striped"]),
        (lambda: layout_positions("contiguous", 10, 4), ["10", "4 shards", "pad it to 12", "segment id 0"]),
        (lambda: layout_positions("zigzag", 12, 4), ["12", "2 x 4 chunks", "pad it to 16"]),
        (lambda: to_layout(jnp.zeros((2, 10)), "striped", 4), ["10", "4 shards", "pad it to 12"]),
        (lambda: from_layout(jnp.zeros((2, 12)), "zigzag", 4), ["12", "2 x 4 chunks", "pad it to 16"]),
        (lambda: to_layout(jnp.zeros((2, 8)), "spiral", 4), ["'spiral'", "contiguous, zigzag, striped"]),
        (lambda: to_layout(jnp.zeros((2, 8)), "zigzag", 2, axis=2), ["axis 2", "(2, 8)"]),
        (lambda: to_layout(jnp.zeros((8,)), "zigzag", 2), ["axis 1", "(8,)"]),
        (lambda: layout_positions("zigzag", 8, 0), ["num_shards", "0"]),
    ],
)
def test_errors_name_the_value_and_the_cure(call, words):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words are checked one by one)
        call()
    for word in words:
        assert word in str(raised.value)
