"""The Flax modules: RoPE at any distance, attention as Flax computes it, a feed-forward that stays in its chunks."""

import contextlib
import functools
import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ring_jax
from ring_jax import AttentionOptions, BlockwiseMLP, RingAttention
from ring_jax.rope import apply_rope
from tests.budget import assert_within_budget
from tests.jaxpr_shapes import has_elements, intermediate_shapes, repeated

SEQ_LEN, DIM, HEADS = 32, 32, 4


def _mesh(kind=AxisType.Auto, sizes=(2, 4)):
    return jax.make_mesh(sizes, ("data", "seq"), axis_types=(kind, kind))


@pytest.fixture
def mesh():
    with jax.set_mesh(_mesh()):
        yield


def _normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


class TestRoPE:
    THETA = 10_000.0

    def _exact(self, x, positions):
        half = x.shape[-1] // 2
        angle = np.outer(positions, self.THETA ** (-np.arange(half) / half))[None, :, None, :]
        rotated = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
        return np.concatenate([rotated.real, rotated.imag], axis=-1)

    @pytest.mark.parametrize("start", [0, 2**20, 2**24])
    def test_is_right_at_any_distance(self, start):
        positions = start + np.arange(8)
        x = np.asarray(_normal(1, 8, 2, 16), np.float64)
        got = apply_rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions, jnp.int32), theta=self.THETA)
        # The frequencies are off by at most 2^-33 turns per token.
        allowed = (positions.max() * 2.0**-33 * 2 * np.pi + 2e-6) * np.abs(x).max() * 2
        assert np.abs(np.asarray(got) - self._exact(x, positions)).max() < allowed

    def test_depends_on_differences_of_positions_only(self):
        x, y = _normal(1, 8, 1, 64), _normal(1, 8, 1, 64, seed=1)

        def products(start):
            positions = start + jnp.arange(8, dtype=jnp.int32)
            rotated = (np.asarray(apply_rope(z, positions), np.float64)[0, :, 0] for z in (x, y))
            return np.matmul(next(rotated), next(rotated).T)

        np.testing.assert_allclose(products(1_000_000_000), products(0), atol=2e-5)

    def test_float32_angles_would_not_be(self):
        positions = 2**20 + np.arange(8)
        x = np.asarray(_normal(1, 8, 2, 16), np.float64)
        naive = nnx.RoPE(theta=self.THETA)(
            jnp.asarray(x[:, :, 0], jnp.float32), jnp.asarray(positions, jnp.float32)[None]
        )
        assert np.abs(np.asarray(naive)[0] - self._exact(x, positions)[0, :, 0]).max() > 0.01

    def test_positions_of_each_sequence(self):
        x = _normal(2, 8, 2, 16)
        positions = jnp.asarray([[5, 6, 7, 8, 0, 1, 2, 3], [9, 8, 7, 6, 5, 4, 3, 2]], jnp.int32)
        rows = jnp.concatenate([apply_rope(x[i : i + 1], positions[i]) for i in range(2)])
        np.testing.assert_array_equal(apply_rope(x, positions), rows)

    def test_refuses(self):
        with pytest.raises(ValueError, match="head dim 15 is odd"):
            apply_rope(_normal(1, 8, 2, 15), jnp.arange(8, dtype=jnp.int32))
        with pytest.raises(ValueError, match=r"positions of shape \(7,\) do not match tokens \(1, 8\)"):
            apply_rope(_normal(1, 8, 2, 16), jnp.arange(7, dtype=jnp.int32))


@pytest.mark.usefixtures("mesh")
class TestRingAttention:
    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    def test_equals_flax_attention_with_rope(self, kind):
        layer = RingAttention(
            DIM, num_heads=HEADS, is_causal=True, options=AttentionOptions(layout="zigzag"), rngs=nnx.Rngs(0)
        )
        flax_layer = nnx.MultiHeadAttention(
            HEADS,
            DIM,
            use_bias=False,
            decode=False,
            attention_fn=functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE()),
            rngs=nnx.Rngs(1),
        )
        nnx.update(flax_layer, nnx.state(layer))
        x = _normal(2, SEQ_LEN, DIM)
        expected = flax_layer(x, is_causal=True)
        with jax.set_mesh(_mesh(kind)):
            got = nnx.jit(lambda m, x: m(x))(layer, ring_jax.to_layout(jnp.asarray(np.asarray(x)), "zigzag", 4))
            got = ring_jax.from_layout(got, "zigzag", 4)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)

    def test_dtypes_and_parameters(self):
        make = functools.partial(RingAttention, DIM, num_heads=HEADS, num_kv_heads=2, head_dim=6, qk_norm=True)
        layer = nnx.eval_shape(lambda: make(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        assert nnx.eval_shape(lambda m: m(jnp.zeros((2, SEQ_LEN, DIM))), layer).dtype == jnp.bfloat16
        shapes = {
            jax.tree_util.keystr(k): (v.shape, v.dtype)
            for k, v in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(layer)))
        }
        assert shapes == {
            f"['{name}']['{leaf}']": (shape, jnp.float32)
            for name, leaf, shape in (
                ("query", "kernel", (DIM, HEADS, 6)),
                ("key", "kernel", (DIM, 2, 6)),
                ("value", "kernel", (DIM, 2, 6)),
                ("out", "kernel", (HEADS, 6, DIM)),
                ("query_norm", "scale", (6,)),
                ("key_norm", "scale", (6,)),
            )
        }

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(num_heads=5), "32 features do not divide by 5 heads: change either, or give head_dim"),
            (dict(num_heads=4, num_kv_heads=3), "num_kv_heads 3 does not divide num_heads 4"),
            (dict(num_heads=4, num_kv_heads=0), "num_kv_heads must be at least 1, got 0"),
            (dict(num_heads=4, head_dim=5), "head_dim 5 is odd; use an even one, or no RoPE"),
        ],
    )
    def test_refuses(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            RingAttention(DIM, **arguments, rngs=nnx.Rngs(0))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (dict(layout="zig"), "unknown layout 'zig': choose one of contiguous, zigzag, striped"),
            (dict(strategy="star"), "unknown strategy 'star': choose one of ring"),
            (dict(implementation="magic"), "unknown implementation 'magic': choose one of None, .*xla"),
        ],
    )
    def test_options_refuse(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            AttentionOptions(**arguments)


@pytest.mark.usefixtures("mesh")
class TestAttentionFn:
    """Plugged into Flax's own layers, `attention_fn` changes nothing but where the attention runs."""

    def test_names_every_argument_of_flax(self):
        ours = inspect.signature(ring_jax.attention_fn()).parameters
        theirs = inspect.signature(nnx.dot_product_attention).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert {n: p.default for n, p in theirs.items()} == {n: ours[n].default for n in theirs}
        assert "input_positions" in ours
        assert not [p for p in ours.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]

    @pytest.mark.parametrize(("bound", "called"), [(False, False), (True, False), (False, True)])
    def test_equals_nnx(self, bound, called):
        make = functools.partial(nnx.MultiHeadAttention, HEADS, DIM, num_kv_heads=2, decode=False)
        x = _normal(2, SEQ_LEN, DIM)
        expected = make(rngs=nnx.Rngs(0))(x, is_causal=bound or called)
        ring = make(rngs=nnx.Rngs(0), attention_fn=ring_jax.attention_fn(is_causal=bound))
        np.testing.assert_allclose(
            nnx.jit(lambda m, x: m(x, is_causal=called))(ring, x), expected, rtol=1e-5, atol=2e-6
        )

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_equals_linen(self, is_causal):
        x = _normal(2, SEQ_LEN, DIM)
        dense = nn.MultiHeadDotProductAttention(num_heads=HEADS, dropout_rate=0.5, deterministic=True)
        variables = dense.init(jax.random.key(0), x)
        expected = np.asarray(dense.apply(variables, x, mask=nn.make_causal_mask(x[..., 0]) if is_causal else None))
        ring = dense.copy(attention_fn=ring_jax.attention_fn(is_causal=is_causal))
        np.testing.assert_allclose(jax.jit(ring.apply)(variables, x), expected, rtol=1e-5, atol=2e-6)

    def test_gradients_in_a_layout_with_documents_equal_flax(self):
        segments = jnp.asarray(np.repeat([[1, 2, 3]], [13, 9, 10], axis=1).repeat(2, axis=0), jnp.int32)
        query, cotangent = _normal(2, SEQ_LEN, HEADS, 8), _normal(2, SEQ_LEN, HEADS, 8, seed=1)
        key, value = _normal(2, SEQ_LEN, 2, 8, seed=2), _normal(2, SEQ_LEN, 2, 8, seed=3)
        layout = functools.partial(ring_jax.to_layout, layout="striped", num_shards=4)
        attend = ring_jax.attention_fn(layout="striped", segment_ids=layout(segments), is_causal=True)

        def run(attend, *arrays):
            return jax.jit(lambda *arrays: jax.vjp(attend, *arrays[:3])[1](arrays[3]))(*arrays)

        got = run(attend, *(layout(x) for x in (query, key, value, cotangent)))
        mask = segments[:, None, :, None] == segments[:, None, None, :]
        dense = functools.partial(nnx.dot_product_attention, mask=mask, is_causal=True)
        for ours, theirs in zip(got, run(dense, query, key, value, cotangent), strict=True):
            np.testing.assert_allclose(ring_jax.from_layout(ours, "striped", 4), theirs, rtol=1e-4, atol=2e-6)

    def test_input_positions_are_rope_positions(self):
        make = functools.partial(nnx.MultiHeadAttention, HEADS, DIM, decode=False)
        rope = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE(theta=500.0))
        x = _normal(2, SEQ_LEN, DIM)
        expected = make(rngs=nnx.Rngs(0), attention_fn=rope)(x, is_causal=True)
        ring = make(rngs=nnx.Rngs(0), attention_fn=ring_jax.attention_fn(rope_theta=500.0))
        positions = jnp.broadcast_to(jnp.arange(SEQ_LEN, dtype=jnp.int32), (2, SEQ_LEN))
        got = ring(x, is_causal=True, input_positions=positions)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize("batch", [(), (2, 3)])
    def test_any_number_of_batch_dims(self, batch):
        query, key, value = (_normal(*batch, SEQ_LEN, HEADS, 8, seed=seed) for seed in range(3))
        attend = ring_jax.attention_fn(batch_axis=None)
        expected = nnx.dot_product_attention(query, key, value, is_causal=True)
        np.testing.assert_allclose(attend(query, key, value, is_causal=True), expected, rtol=1e-5, atol=2e-6)

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            (dict(mask=np.ones((2, 1, SEQ_LEN, SEQ_LEN))), r"does not support mask \(mask of shape .*is_causal=True"),
            (dict(bias=np.ones((2, 1, SEQ_LEN, SEQ_LEN))), "does not support bias"),
            (dict(module=object()), "does not support module .*sow_weights=True"),
            (dict(precision="highest"), "does not support precision"),
            (dict(dropout_rate=0.1), r"does not support dropout_rate \(dropout_rate = 0.1\): pass deterministic=True"),
            (dict(qk_attn_weights_einsum=jnp.einsum), "does not support qk_attn_weights_einsum"),
        ],
    )
    def test_refuses_by_name_what_it_cannot_do(self, argument, message):
        x = _normal(2, SEQ_LEN, HEADS, 8)
        with pytest.raises(NotImplementedError, match=message):
            ring_jax.attention_fn()(x, x, x, **argument)

    def test_refuses_through_both_layers(self):
        x = _normal(2, SEQ_LEN, DIM)
        attend = ring_jax.attention_fn()
        layer = nnx.MultiHeadAttention(HEADS, DIM, decode=False, attention_fn=attend, rngs=nnx.Rngs(0))
        with pytest.raises(NotImplementedError, match="module"):
            layer(x, sow_weights=True)
        linen = nn.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=attend)
        with pytest.raises(NotImplementedError, match="mask"):
            linen.init(jax.random.key(0), x, mask=nn.make_causal_mask(x[..., 0]))

    @pytest.mark.parametrize("name", ["return_lse", "query", "windows"])
    def test_lists_what_can_be_bound(self, name):
        with pytest.raises(
            ValueError, match=f"cannot bind '{name}': choose from is_causal, scale, segment_ids, layout"
        ):
            ring_jax.attention_fn(**{name: True})


def _swiglu(x, gate, up, down):
    hidden = jnp.matmul(x, gate, precision="highest")
    hidden = hidden / (1 + jnp.exp(-hidden)) * jnp.matmul(x, up, precision="highest")
    return jnp.matmul(hidden, down, precision="highest")


class TestBlockwiseMLP:
    @pytest.mark.parametrize(
        ("kind", "sizes", "chunk_size"),
        [
            (AxisType.Auto, (2, 4), 5),
            (AxisType.Explicit, (2, 4), 2048),
            (AxisType.Explicit, (1, 4), 2048),
            (AxisType.Explicit, (1, 1), 2048),
        ],
    )
    def test_output_and_gradients_equal_dense(self, kind, sizes, chunk_size):
        layer = BlockwiseMLP(16, 40, chunk_size=chunk_size, rngs=nnx.Rngs(0))
        x, cotangent = _normal(2, 92, 16), _normal(2, 92, 16, seed=1)
        weights = layer.gate[...], layer.up[...], layer.down[...]
        graph, state = nnx.split(layer)

        def run(f, cotangent, *arrays):
            output, vjp = jax.vjp(f, *arrays)
            return output, vjp(cotangent)

        with jax.set_mesh(mesh := _mesh(kind, sizes)):
            placed = jax.device_put(cotangent, NamedSharding(mesh, PartitionSpec("data", "seq")))
            ours = functools.partial(run, lambda state, x: nnx.merge(graph, state)(x))
            output, (d_state, d_x) = jax.jit(ours)(placed, state, x)
        got = output, d_x, d_state["gate"][...], d_state["up"][...], d_state["down"][...]
        baseline = jax.tree.leaves(jax.jit(functools.partial(run, _swiglu))(cotangent, x, *weights))
        with jax.enable_x64(True):
            in_float64 = (np.asarray(a, np.float64) for a in (cotangent, x, *weights))
            exact = jax.tree.leaves(jax.jit(functools.partial(run, _swiglu))(*in_float64))
        names = ("output", "d_x", "d_gate", "d_up", "d_down")
        for name, ours, want, base in zip(names, got, exact, baseline, strict=True):
            assert_within_budget(np.asarray(ours), np.asarray(want), np.asarray(base), "float32", name)

    @pytest.mark.parametrize("on_mesh", [False, True])
    def test_never_expands_all_tokens_of_a_shard(self, on_mesh):
        batch, seq_len, features, width = 2, 512, 4, 256
        on_a_shard = batch * seq_len // (8 if on_mesh else 1)
        layer = nnx.eval_shape(lambda: BlockwiseMLP(features, width, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(layer)
        x = jax.ShapeDtypeStruct((batch, seq_len, features), jnp.float32)

        def step(state, x):
            return jax.grad(lambda state, x: (nnx.merge(graph, state)(x) ** 2).sum(), argnums=(0, 1))(state, x)

        def dense(state, x):
            weights = (state[name][...] for name in ("gate", "up", "down"))
            return jax.grad(lambda x: _swiglu(x, *weights).sum())(x)

        def offending(function):
            shapes = intermediate_shapes(jax.make_jaxpr(function)(state, x))
            return [s for s in shapes if has_elements(s, on_a_shard, width)]

        with jax.set_mesh(_mesh()) if on_mesh else contextlib.nullcontext():
            assert not offending(step)
            assert offending(dense)

    @pytest.mark.usefixtures("mesh")
    def test_compiled_for_a_device_it_neither_expands_nor_gathers(self):
        batch, seq_len, features, width, chunk = 2, 2048, 16, 64, 32
        layer = nnx.eval_shape(lambda: BlockwiseMLP(features, width, chunk_size=chunk, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(layer)
        spec = NamedSharding(_mesh(), PartitionSpec("data", "seq"))
        x = jax.ShapeDtypeStruct((batch, seq_len, features), jnp.float32, sharding=spec)

        def step(state, x):
            return jax.grad(lambda state, x: (nnx.merge(graph, state)(x) ** 2).sum(), argnums=(0, 1))(state, x)

        text = jax.jit(step).lower(state, x).compile().as_text() or ""
        shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
        assert any(has_elements(shape, chunk, width) for shape in shapes)
        assert not [shape for shape in shapes if has_elements(shape, batch * seq_len // 8, width)]
        assert not [s for s in shapes if has_elements(s, batch * seq_len // 8 + 1, features)]
        reductions = [line for line in text.splitlines() if " all-reduce(" in line]
        assert reductions
        assert not [line for line in reductions if "while/body" in line]

    def test_weights_are_cast_once_for_all_chunks(self):
        """In each chunk it would be paid for again."""
        layer = nnx.eval_shape(lambda: BlockwiseMLP(16, 40, dtype=jnp.bfloat16, chunk_size=32, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(layer)
        x = jax.ShapeDtypeStruct((1, 256, 16), jnp.bfloat16)

        def loss(state, x):
            return (nnx.merge(graph, state)(x).astype(jnp.float32) ** 2).sum()

        program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(state, x)
        assert len(repeated(program, "dot_general")) == 3 + 8
        assert not [shape for shape in repeated(program, "convert_element_type") if set(shape) == {16, 40}]

    def test_dtypes(self):
        layer = nnx.eval_shape(
            lambda: BlockwiseMLP(16, 40, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        )
        assert nnx.eval_shape(lambda m: m(jnp.zeros((2, 32, 16))), layer).dtype == jnp.bfloat16
        assert layer.gate.dtype == jnp.float32

    @pytest.mark.usefixtures("mesh")
    def test_refuses(self):
        with pytest.raises(ValueError, match="width must be at least 1, got 0"):
            BlockwiseMLP(16, 0, rngs=nnx.Rngs(0))
        layer = nnx.eval_shape(lambda: BlockwiseMLP(16, 40, rngs=nnx.Rngs(0)))
        for shape, message in (((2, 32, 15), "with D = 16, got"), ((2, 30, 16), "30 does not divide .* pad it to 32")):
            with pytest.raises(ValueError, match=message):
                nnx.eval_shape(lambda m, shape=shape: m(jnp.zeros(shape)), layer)
