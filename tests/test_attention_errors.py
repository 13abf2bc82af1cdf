"""A wrong call of the attention says which value is wrong and what to do, before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from ring_jax import ring_attention, ring_attention_shard
from ring_jax.cluster import compile_only_devices
from ring_jax.mesh import make_mesh


def _mesh(**axes: int) -> Mesh:
    count = int(np.prod(tuple(axes.values())))
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=jax.devices()[:count])


def _array(*shape: int, dtype="float32"):
    return jnp.zeros(shape, dtype)


GOOD = {"query": _array(2, 16, 4, 8), "key": _array(2, 16, 2, 8), "value": _array(2, 16, 2, 8), "mesh": _mesh(seq=4)}
WRONG_CALLS = {
    "length": (
        {name: _array(2, 18, 2, 8) for name in ("query", "key", "value")},
        ["18", "4 shards", "pad it to 20", "segment id 0"],
    ),
    "length in zigzag": (
        {name: _array(2, 20, 2, 8) for name in ("query", "key", "value")} | {"layout": "zigzag"},
        ["20", "2 x 4 chunks", "pad it to 24"],
    ),
    "layout": ({"layout": "spiral"}, ["'spiral'", "contiguous, zigzag, striped"]),
    "strategy": ({"strategy": "star"}, ["'star'", "choose one of", "ring"]),
    "implementation": ({"implementation": "abacus"}, ["'abacus'", "choose one of", "xla"]),
    "number of dims": ({"query": _array(16, 4, 8)}, ["query", "[B, T, N, H]", "(16, 4, 8)"]),
    "dims of the key": ({"key": _array(2, 16, 8)}, ["key", "[B, T, K, H]", "(2, 16, 8)"]),
    "dtype": ({"query": _array(2, 16, 4, 8, dtype="int32")}, ["query", "int32", "float32, bfloat16, float16"]),
    "two dtypes": (
        {"value": _array(2, 16, 2, 8, dtype="bfloat16")},
        ["share one dtype", "cast", "float32, float32 and bfloat16"],
    ),
    "key and value": ({"value": _array(2, 16, 1, 8)}, ["key and value", "(2, 16, 2, 8)", "(2, 16, 1, 8)"]),
    "batch": (
        {"key": _array(1, 16, 2, 8), "value": _array(1, 16, 2, 8)},
        ["(2, 16, 4, 8)", "(1, 16, 2, 8)", "agree in batch"],
    ),
    "tokens": (
        {"key": _array(2, 32, 2, 8), "value": _array(2, 32, 2, 8)},
        ["(2, 16, 4, 8)", "(2, 32, 2, 8)", "self-attention"],
    ),
    "head dim": ({"key": _array(2, 16, 2, 4), "value": _array(2, 16, 2, 4)}, ["(2, 16, 2, 4)", "head dim"]),
    "head counts": (
        {"key": _array(2, 16, 3, 8), "value": _array(2, 16, 3, 8)},
        ["3 key/value heads", "divide", "4 query heads"],
    ),
    "empty": ({"query": _array(0, 16, 4, 8)}, ["query is empty", "(0, 16, 4, 8)"]),
    "segment shape": (
        {"segment_ids": _array(2, 15, dtype="int32")},
        ["segment_ids", "[B, T] = (2, 16)", "(2, 15)"],
    ),
    "segment dtype": ({"segment_ids": _array(2, 16)}, ["segment_ids", "float32", ".astype(jnp.int32)"]),
    "segments of numpy's default dtype": (
        {"segment_ids": np.zeros((2, 16), np.int64)},
        ["segment_ids", "int64", ".astype(jnp.int32)"],
    ),
    "segments in a list": ({"segment_ids": [[1] * 16] * 2}, ["segment_ids", "list", "int32"]),
    "mesh without the axis": (
        {"mesh": _mesh(data=2, context=2)},
        ["'seq'", "('data', 'context')", "seq_axis="],
    ),
    "no sequence axis": ({"seq_axis": ()}, ["seq_axis", "()"]),
    "one axis twice": ({"batch_axis": "seq"}, ["seq_axis='seq'", "batch_axis='seq'", "share"]),
    "batch over the mesh": (
        {"mesh": _mesh(data=4, seq=2)},
        ["batch 2", "('data',)", "size 4", "batch_axis=None"],
    ),
    "heads over the mesh": (
        {"mesh": _mesh(seq=2, tensor=4)},
        ["key/value heads 2", "('tensor',)", "size 4", "head_axis=None"],
    ),
    "scale in an array": ({"scale": jnp.float32(0.1)}, ["scale", "multiply the query"]),
    "no mesh": ({"mesh": None}, ["no mesh", "mesh=", "jax.set_mesh"]),
    "something else for a mesh": ({"mesh": "seq=4"}, ["mesh", "'seq=4'", "jax.make_mesh"]),
    "mesh of GPUs that are not there": (
        {"mesh": Mesh(compile_only_devices("h100", gpus_per_host=4), ("seq",))},
        ["4 devices", "there are 8", "jax.make_mesh", "only compile"],
    ),
    "mesh of no devices": (
        {"mesh": AbstractMesh((16,), ("seq",), (AxisType.Auto,))},
        ["16", "devices", "jax.make_mesh"],
    ),
}


@pytest.mark.parametrize(("changes", "words"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_error_names_the_value_and_the_cure(changes, words):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words are checked one by one)
        ring_attention(**(GOOD | changes))
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_a_mesh_larger_than_the_devices():
    """The trainer's way of making one, and jax's, which the README explains."""
    with pytest.raises(ValueError, match=r"mesh 'data=2,seq=8' needs 16 devices, but there are 8 .* at most 8"):
        make_mesh({"data": 2, "seq": 8})
    with pytest.raises(ValueError, match=r"Number of devices 8 must be >= the product of mesh_shape \(2, 8\)"):
        jax.make_mesh((2, 8), ("data", "seq"))


def test_the_good_call_is_good():
    assert ring_attention(**GOOD).shape == (2, 16, 4, 8)


def test_missing_mesh_is_an_error_under_jit_too():
    with pytest.raises(ValueError, match="no mesh"):
        jax.jit(lambda x: ring_attention(x, x, x))(GOOD["query"])


def test_inside_a_shard_map_over_the_sequence_the_other_function_is_named():
    spec = PartitionSpec(None, "seq")
    inside = jax.shard_map(lambda x: ring_attention(x, x, x), mesh=GOOD["mesh"], in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match=r"'seq' is already manual.*ring_attention_shard"):
        inside(GOOD["query"])


def test_outside_a_shard_map_the_other_function_is_named():
    query = GOOD["query"]
    with pytest.raises(ValueError, match=r"axis_name='seq'.*ring_jax\.ring_attention"):
        ring_attention_shard(query, query, query, axis_name="seq", positions=jnp.arange(16, dtype=jnp.int32))


WRONG_SHARDS = {
    "positions' shape": ({"positions": _array(16, dtype="int32")}, ["positions", "(4,)", "(16,)"]),
    "positions' dtype": ({"positions": _array(4)}, ["positions", "int32", "float32"]),
    "segments": ({"segment_ids": _array(2, 16, dtype="int32")}, ["segment_ids", "(2, 4)", "(2, 16)"]),
    "implementation": ({"implementation": "abacus"}, ["'abacus'", "choose one of", "xla"]),
    "axis": ({"axis_name": "context"}, ["axis_name='context'", "shard_map"]),
}


@pytest.mark.parametrize(("changes", "words"), WRONG_SHARDS.values(), ids=WRONG_SHARDS)
def test_wrong_shards(changes, words):
    def shard(query, key, value):
        good = {"axis_name": "seq", "positions": _array(4, dtype="int32")}
        return ring_attention_shard(query, key, value, **(good | changes))

    spec = PartitionSpec(None, "seq")
    mapped = jax.shard_map(shard, mesh=GOOD["mesh"], in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the words are checked one by one)
        mapped(GOOD["query"], GOOD["key"], GOOD["value"])
    for word in words:
        assert word in str(raised.value), str(raised.value)
