"""What the ring must be, whatever it computes: N-1 hops, nothing gathered, linear memory, balanced work."""

import itertools
import math
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ring_jax import LAYOUTS, SAVED_NAMES, layout_positions, ring_attention
from ring_jax.kernels.contract import BlockMask
from ring_jax.kernels.tiles import key_ranges
from ring_jax.ring_steps import RingSteps
from tests.jaxpr_shapes import intermediate_shapes

COLLECTIVES = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-broadcast|collective-permute"


def _mesh(shards: int) -> Mesh:
    return jax.make_mesh((shards,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:shards])


def _arguments(
    shards: int,
    seq_len: int,
    *,
    dtype: str = "float32",
    with_segments: bool = False,
    num_heads: int = 2,
    head_dim: int = 8,
):
    """Shapes of query, key, value, segment ids and the output's cotangent; half as many key/value heads."""
    sharding = NamedSharding(_mesh(shards), PartitionSpec(None, "seq"))

    def struct(num_heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, seq_len, num_heads, head_dim), dtype, sharding=sharding)

    segment_ids = jax.ShapeDtypeStruct((1, seq_len), jnp.int32, sharding=sharding) if with_segments else None
    return struct(num_heads), struct(num_heads // 2), struct(num_heads // 2), segment_ids, struct(num_heads)


def _programs(shards: int, layout: str = "zigzag", is_causal: bool = True):
    """Attention, and attention with its gradients, of the arguments above."""

    def forward(query, key, value, segment_ids, d_out):
        del d_out
        return ring_attention(
            query, key, value, is_causal=is_causal, segment_ids=segment_ids, layout=layout, mesh=_mesh(shards)
        )

    def gradient(query, key, value, segment_ids, d_out):
        _, vjp = jax.vjp(lambda q, k, v: forward(q, k, v, segment_ids, None), query, key, value)
        return vjp(d_out)

    return {"forward": forward, "gradient": gradient}


def _collectives(compiled) -> Counter:
    """How often each collective of a compiled program occurs, by its name and the type of its result."""
    found = re.findall(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", compiled.as_text() or "")
    return Counter((name, re.sub(r"\{[\d,]*\}", "", result)) for result, name in found)


# K, V and segment ids travel N-1 times forward; backward they do so again, and dK, dV travel N times in float32.


@pytest.mark.parametrize(("shards", "with_segments"), [(2, True), (3, False), (8, True)])
def test_hops_and_their_bytes(shards: int, with_segments: bool):
    seq_len = 48 * shards
    arguments = _arguments(shards, seq_len, with_segments=with_segments)
    block, ids = ("collective-permute", "f32[1,48,1,8]"), ("collective-permute", "s32[1,48]")
    hops = shards - 1
    forward, gradient = (
        _collectives(jax.jit(program).lower(*arguments).compile()) for program in _programs(shards).values()
    )
    assert forward == Counter({block: 2 * hops} | ({ids: hops} if with_segments else {}))
    assert gradient == Counter({block: 4 * hops + 2 * shards} | ({ids: 2 * hops} if with_segments else {}))


_SHORT: dict[str, Any] = dict(
    implementation="mosaic_gpu", query_shape=(1, 8192, 32, 128), key_shape=(1, 8192, 8, 128), size=8, layout="zigzag",
    is_causal=True, has_segments=False, is_in_one_process=True,
)  # fmt: skip


def _shapes(shard_len: int, heads: int, kv_heads: int, head_dim: int = 128) -> dict[str, Any]:
    return {"query_shape": (1, shard_len, heads, head_dim), "key_shape": (1, shard_len, kv_heads, head_dim)}


@pytest.mark.parametrize(
    ("change", "forward", "backward"),
    [
        ({}, [1, 3, 4], [1, 1, 2, 2, 2]),
        ({"size": 4}, [1, 3], [1, 1, 2]),
        ({"size": 3}, [1, 2], [1] * 3),
        ({"size": 2}, [1, 1], [1, 1]),
        ({"size": 16}, [1, 3, 4, 4, 4], [1, 1] + [2] * 7),
        ({"size": 20}, [1] * 20, [1] * 20),
        (_shapes(8192, 32, 32), [1] * 8, [1, 1, 2, 2, 2]),
        (_shapes(4096, 40, 8), [1, 2, 4, 1], [1, 1, 2, 2, 2]),
        (_shapes(256, 32, 8), [1] * 8, [1, 1, 2, 2, 2]),
        (_shapes(8192 - 128, 32, 8), [1] * 8, [1] * 8),
        (_shapes(16384, 32, 8), [1] * 8, [1] * 8),
        (_shapes(8192, 32, 8, 64), [1] * 8, [1] * 8),
        ({"layout": "contiguous"}, [1] * 8, [1] * 8),
        ({"layout": "contiguous", "is_causal": False}, [1, 4, 3], [1, 1, 2, 2, 2]),
        ({"layout": "contiguous", "is_causal": False} | _shapes(8192, 16, 8), [1, 3, 4], [1, 1, 2, 2, 2]),
        ({"layout": None}, [1] * 8, [1] * 8),
        ({"has_segments": True}, [1] * 8, [1] * 8),
        ({"is_in_one_process": False}, [1] * 8, [1] * 8),
        ({"implementation": "triton"}, [1] * 8, [1] * 8),
        ({"implementation": "mosaic_gpu_deterministic"}, [1] * 8, [1] * 8),
    ],
)
def test_short_shards_are_taken_several_at_a_time(change, forward, backward):
    """Forward as many as arrive under the step before; backward two, if none is left over.

    Not in loops, where halves are no whole tiles, or of runs with a gap.
    """
    steps = RingSteps.of(**_SHORT | change)
    assert [len(hops) for hops in steps.forward] == forward
    assert [len(hops) for hops in steps.backward] == backward
    hops = list(range((_SHORT | change)["size"]))
    assert [list(itertools.chain(*taken)) for taken in (steps.forward, steps.backward)] == [hops, hops]


def test_one_shard_sends_nothing():
    for program in _programs(1).values():
        assert not _collectives(jax.jit(program).lower(*_arguments(1, 64)).compile())


def test_low_precision_blocks_travel_in_16_bits_and_their_gradients_in_float32():
    """The gradients' last hop, when the sums are complete, is one of 16 bits again."""
    shards = 4
    program = jax.jit(_programs(shards)["gradient"]).lower(*_arguments(shards, 192, dtype="bfloat16"))
    sent = _collectives(program.compile())
    hops = shards - 1
    narrow, wide = ("collective-permute", "u16[1,48,1,8]"), ("collective-permute", "f32[1,48,1,8]")
    assert sent == {narrow: 4 * hops + 2, wide: 2 * hops}


def test_every_hop_goes_to_the_next_device():
    text = jax.jit(_programs(4)["gradient"]).lower(*_arguments(4, 192)).compile().as_text() or ""
    pairs = re.findall(r"collective-permute\(.*source_target_pairs=(\{\{.*?\}\})", text)
    assert pairs
    assert set(pairs) == {"{{0,1},{1,2},{2,3},{3,0}}"}


def test_remat_that_saves_attention_makes_no_hop_twice():
    shards = 4
    arguments = _arguments(shards, 192)

    def hops(policy) -> int:
        def gradient(query, key, value, segment_ids, d_out):
            attend = _programs(shards)["forward"]

            def layer(q, k, v):
                return jnp.sin(attend(jnp.sin(q), jnp.sin(k), jnp.sin(v), segment_ids, None))

            kept = layer if policy is None else jax.checkpoint(layer, policy=policy)
            output, vjp = jax.vjp(kept, query, key, value)
            return output, vjp(d_out)

        return sum(_collectives(jax.jit(gradient).lower(*arguments).compile()).values())

    policies = jax.checkpoint_policies
    without_remat = hops(None)
    assert hops(policies.save_only_these_names(*SAVED_NAMES)) == without_remat
    assert hops(policies.nothing_saveable) == without_remat + 2 * (shards - 1)


def _largest_intermediate(program, arguments) -> int:
    return max(math.prod(shape) for shape in intermediate_shapes(jax.make_jaxpr(program)(*arguments)))


@pytest.mark.parametrize("with_segments", [False, True], ids=["", "segments"])
@pytest.mark.parametrize(("shards", "seq_len"), [(2, 512), (4, 2048)])
def test_no_intermediate_as_large_as_the_scores_of_a_block(shards: int, seq_len: int, with_segments: bool):
    """Less than T/shards x S/shards elements, heads counted, in all of the traced program, forward and backward."""
    arguments = _arguments(shards, seq_len, with_segments=with_segments)
    scores = (seq_len // shards) ** 2
    assert math.prod(arguments[0].shape) < scores  # or else the inputs alone would be too large
    for layout in LAYOUTS:
        program = _programs(shards, layout)["gradient"]  # and the forward pass in it
        assert _largest_intermediate(program, arguments) < scores, layout


def test_the_largest_intermediate_of_dense_attention_is_seen():
    query, *_ = arguments = _arguments(2, 512)

    def dense(query, key, value, *_):
        return jax.nn.dot_product_attention(query, key, value)

    assert _largest_intermediate(jax.jit(dense), arguments) >= query.shape[1] ** 2
    in_a_loop = jax.jit(lambda *x: jax.lax.scan(lambda carry, _: (carry, dense(*x)), 0, length=2))
    assert _largest_intermediate(in_a_loop, arguments) >= query.shape[1] ** 2


@pytest.mark.parametrize("shards", [1, 8])
def test_no_branch_on_the_rank(shards: int):
    """One uniform program: a `cond` on a GPU copies its predicate to the host and stalls every step."""
    for program in _programs(shards).values():
        lowered = jax.jit(program).lower(*_arguments(shards, 64 * shards, with_segments=True)).as_text()
        assert "stablehlo.while" in lowered
        assert "stablehlo.case" not in lowered
        assert "stablehlo.if" not in lowered


def _temp_bytes(program: str, shards: int, seq_len: int, **kwargs) -> int:
    arguments = _arguments(shards, seq_len, num_heads=4, head_dim=64, **kwargs)
    analysis = jax.jit(_programs(shards)[program]).lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize(("dtype", "with_segments"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize("program", ["forward", "gradient"])
def test_memory_is_linear_in_the_tokens_of_a_shard(program: str, dtype: str, with_segments: bool):
    """Temporary memory of one device: halved by twice the shards, and by half the tokens, within 5 %."""
    total = 256 * 1024
    on_four, on_eight, half = (
        _temp_bytes(program, shards, tokens, dtype=dtype, with_segments=with_segments)
        for shards, tokens in ((4, total), (8, total), (4, total // 2))
    )
    assert on_eight == pytest.approx(on_four / 2, rel=0.05)
    assert half == pytest.approx(on_four / 2, rel=0.05)


def _tiles_of_each_shard(layout: str, shards: int, shard_len: int, tile: int, is_causal: bool) -> np.ndarray:
    """The number of tiles that each shard computes in a whole ring."""
    positions = layout_positions(layout, shards * shard_len, shards).reshape(shards, shard_len)

    def tiles(own, theirs):
        ranges = key_ranges(BlockMask(own, theirs, None, None, is_causal), tile, tile)
        return jnp.sum(ranges.end - ranges.start)

    one_shard = jax.vmap(tiles, in_axes=(None, 0))
    return np.asarray(jax.vmap(one_shard, in_axes=(0, None))(positions, positions).sum(axis=1))


@pytest.mark.parametrize(("shard_len", "tile"), [(256, 16), (240, 16), (200, 16), (96, 32)])
@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_zigzag_and_striped_are_balanced(shards: int, shard_len: int, tile: int):
    one_row = -(-shard_len // tile)
    for layout in ("zigzag", "striped"):
        tiles = _tiles_of_each_shard(layout, shards, shard_len, tile, True)
        assert tiles.max() - tiles.min() <= one_row, layout
    contiguous = _tiles_of_each_shard("contiguous", shards, shard_len, tile, True)
    assert contiguous.max() - contiguous.min() > one_row
    assert (_tiles_of_each_shard("contiguous", shards, shard_len, tile, False) == shards * one_row**2).all()
