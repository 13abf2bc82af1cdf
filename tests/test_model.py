"""The transformer equals a dense one with the same weights; configs and inputs that make no sense are refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ring_jax
from ring_jax import AttentionOptions, Transformer, TransformerConfig
from tests.budget import assert_within_budget
from tests.dense_transformer import dense_logits

SHARDS = 4
SEQ_LEN = 64
CONFIG = TransformerConfig(vocab_size=40, model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48)
VARIANTS = {
    "llama": CONFIG,
    "tied": dataclasses.replace(CONFIG, num_kv_heads=1, qk_norm=True, tie_embeddings=True),
}


def _mesh(kind):
    return jax.make_mesh((2, SHARDS), ("data", "seq"), axis_types=(kind, kind))


@pytest.fixture(scope="module")
def auto_mesh():
    return _mesh(AxisType.Auto)


def _packed_documents() -> np.ndarray:
    """Documents whose borders fall inside shards, a document over several shards, and padding at the end."""
    rows = [np.repeat([1, 2, 3, 0], [5, 36, 17, 6]), np.repeat([1, 2], [33, 31])]
    return np.stack(rows).astype(np.int32)


def _inputs(config, packed):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (2, SEQ_LEN)).astype(np.int32)
    cotangent = rng.standard_normal((2, SEQ_LEN, config.vocab_size)).astype(np.float32)
    return tokens, _packed_documents() if packed else None, cotangent


@functools.cache
def _random_state(variant) -> nnx.State:
    """Weights, norms' scales included, that are random and large enough for attention to be far from uniform."""
    config = VARIANTS[variant]
    rng = np.random.default_rng(1)

    def draw(path, w):
        scale, around = (0.3, 1) if "scale" in jax.tree_util.keystr(path) else (config.model_dim**-0.5, 0)
        return jnp.asarray(around + scale * rng.standard_normal(w.shape), w.dtype)

    return jax.tree.map_with_path(draw, nnx.split(_abstract(config))[1])


def _abstract(config) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


@functools.cache
def _dense(variant, packed, dtype_name, zero_attention=False):
    """The dense logits and the gradients of all weights for the same random cotangent."""
    config = VARIANTS[variant]
    tokens, segment_ids, cotangent = _inputs(config, packed)
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(_random_state(variant)))
    with jax.enable_x64(dtype_name == "float64"):
        dtype = jnp.dtype(dtype_name)

        @jax.jit
        def run(weights):
            logits, vjp = jax.vjp(
                lambda w: dense_logits(
                    w,
                    tokens,
                    segment_ids,
                    theta=config.rope_theta,
                    eps=config.norm_eps,
                    dtype=dtype,
                    zero_attention=zero_attention,
                ),
                weights,
            )
            return logits, vjp(jnp.asarray(cotangent, dtype))[0]

        return jax.tree.map(np.asarray, run(jax.tree.map(lambda w: jnp.asarray(w, dtype), weights)))


def _sharded(variant, remat, layout):
    """Logits, in natural order, and gradients of the model on the mesh of `jax.set_mesh`."""
    config = dataclasses.replace(VARIANTS[variant], remat=remat, attention=AttentionOptions(layout=layout))
    arrays = (ring_jax.to_layout(jnp.asarray(x), layout, SHARDS) for x in _inputs(config, packed=True))
    spec = NamedSharding(jax.sharding.get_mesh(), PartitionSpec("data", "seq"))
    tokens, segment_ids, cotangent = (jax.device_put(x, spec) for x in arrays)
    graph = nnx.split(_abstract(config))[0]

    @jax.jit
    def run(state, tokens, segment_ids, cotangent):
        logits, vjp = jax.vjp(lambda state: nnx.merge(graph, state)(tokens, segment_ids=segment_ids), state)
        return ring_jax.from_layout(logits, layout, SHARDS), vjp(cotangent)[0]

    logits, gradients = run(_random_state(variant), tokens, segment_ids, cotangent)
    return np.asarray(logits), jax.tree.map(np.asarray, nnx.to_pure_dict(gradients))


def _assert_equal(got, variant):
    exact, baseline = _dense(variant, True, "float64"), _dense(variant, True, "float32")
    named = jax.tree.leaves_with_path(exact)
    assert jax.tree.structure(exact) == jax.tree.structure(got)
    for (path, want), have, base in zip(named, jax.tree.leaves(got), jax.tree.leaves(baseline), strict=True):
        assert_within_budget(have, want, base, "float32", jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("layout", "variant", "remat", "kind"),
    [
        ("contiguous", "llama", "none", AxisType.Auto),
        ("zigzag", "tied", "attention", AxisType.Auto),
        ("striped", "llama", "layer", AxisType.Explicit),
    ],
)
def test_logits_and_all_gradients_equal_the_dense_model(layout, variant, remat, kind):
    with jax.set_mesh(_mesh(kind)):
        _assert_equal(_sharded(variant, remat, layout), variant)


@pytest.fixture(scope="module")
def striped():
    """The jitted forward pass of the "llama" variant in striped layout, without documents."""
    config = dataclasses.replace(CONFIG, attention=AttentionOptions(layout="striped"))
    graph = nnx.split(_abstract(config))[0]
    # Fused loops round differently where positions are known while compiling: the same bits need loops of their own.
    options = {"xla_disable_hlo_passes": "fusion"}
    return jax.jit(
        lambda state, tokens, positions: nnx.merge(graph, state)(tokens, positions=positions), compiler_options=options
    )


def test_zeroed_attention_is_noticed(auto_mesh, striped):
    tokens = ring_jax.to_layout(jnp.asarray(_inputs(CONFIG, packed=False)[0]), "striped", SHARDS)
    exact, baseline = _dense("llama", False, "float64")[0], _dense("llama", False, "float32")[0]
    state = _random_state("llama")
    out = state["layers"]["attention"]["out"]["kernel"]
    zeroed = jax.tree.map(lambda w: jnp.zeros_like(w) if w is out[...] else w, state)
    with jax.set_mesh(auto_mesh):
        logits, without = (
            np.asarray(ring_jax.from_layout(striped(weights, tokens, None), "striped", SHARDS))
            for weights in (state, zeroed)
        )
    assert_within_budget(logits, exact, baseline, "float32", "logits")
    with pytest.raises(AssertionError, match="exceeds its budget"):
        assert_within_budget(without, exact, baseline, "float32", "logits")
    # What is left without attention is what the dense model says is left.
    dense_without = _dense("llama", False, "float64", zero_attention=True)[0]
    assert_within_budget(without, dense_without, baseline - exact + dense_without, "float32", "logits")


def test_positions_are_those_of_the_layout_unless_given(auto_mesh, striped):
    tokens, state = jnp.asarray(_inputs(CONFIG, packed=False)[0]), _random_state("llama")
    positions = ring_jax.layout_positions("striped", SEQ_LEN, SHARDS)
    with jax.set_mesh(auto_mesh):
        expected = np.asarray(striped(state, tokens, positions))
        np.testing.assert_array_equal(striped(state, tokens, None), expected)
        np.testing.assert_allclose(striped(state, tokens, positions + 1000), expected, atol=1e-4)
        unordered = striped(state, tokens, jnp.arange(SEQ_LEN, dtype=jnp.int32))
        assert np.abs(np.asarray(unordered) - expected).max() > 0.01


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_dtypes_of_parameters_and_activations(auto_mesh, param_dtype):
    config = dataclasses.replace(CONFIG, qk_norm=True, dtype=jnp.bfloat16, param_dtype=param_dtype, remat="attention")
    graph, state = nnx.split(_abstract(config))
    tokens = jnp.zeros((2, SEQ_LEN), jnp.int32)

    def loss(state):
        model = nnx.merge(graph, state)
        hidden = model.hidden(tokens)
        assert hidden.dtype == jnp.bfloat16
        assert model(tokens).dtype == jnp.float32
        return ring_jax.cross_entropy(hidden, model.unembedding, tokens)

    with jax.set_mesh(auto_mesh):
        value, gradients = jax.eval_shape(jax.value_and_grad(loss), state)
    assert value.dtype == jnp.float32
    assert {x.dtype.name for x in jax.tree.leaves((state, gradients))} == {param_dtype}


def test_compile_size_does_not_grow_with_depth(auto_mesh):
    tokens = jax.ShapeDtypeStruct((2, SEQ_LEN), jnp.int32)

    def equations(num_layers):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        graph, state = nnx.split(_abstract(config))
        traced = jax.make_jaxpr(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, tokens)
        return str(traced).count("\n")

    with jax.set_mesh(auto_mesh):
        assert equations(1) == equations(6)


def test_the_tensor_axis_shares_the_work_wherever_weights_lie():
    """Heads, feed-forward and vocab are computed in halves on two devices, though no weight comes cut over them."""
    heads, width, vocab = 2 * 7, 2 * 53, 2 * 59
    config = TransformerConfig(
        vocab_size=vocab, model_dim=32, num_layers=2, num_heads=heads, head_dim=4, mlp_dim=width, remat="attention"
    )
    mesh = jax.make_mesh((2, 2, 2), ("data", "seq", "tensor"), axis_types=(AxisType.Auto,) * 3)
    graph, state = nnx.split(_abstract(config))

    def shard(weight):
        spec = PartitionSpec(*(("data", "seq") if size == config.model_dim else None for size in weight.shape))
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=NamedSharding(mesh, spec))

    def loss(state, tokens):
        model = nnx.merge(graph, state)
        return ring_jax.cross_entropy(model.hidden(tokens), model.unembedding, tokens)

    sharding = NamedSharding(mesh, PartitionSpec("data", "seq"))
    tokens = jax.ShapeDtypeStruct((2, 1024), jnp.int32, sharding=sharding)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(jax.tree.map(shard, state), tokens).compile()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text() or "")}
    on_a_shard, chunk = 1024 // 2, 1024 // 2 // 4
    for name, halves, all_of_it in (
        ("heads", (1, on_a_shard, heads // 2, 4), (1, on_a_shard, heads, 4)),
        ("feed-forward", (chunk, width // 2), (chunk, width)),
        ("logits", (chunk, vocab // 2), (chunk, vocab)),
    ):
        assert halves in shapes, name
        assert all_of_it not in shapes, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_layers=0), "num_layers must be at least 1, got 0"),
        (dict(num_heads=5), "32 features do not divide by 5 heads"),
        (dict(num_kv_heads=3, head_dim=8), "num_kv_heads 3 does not divide num_heads 4"),
        (dict(head_dim=7), "head_dim 7 is odd"),
        (dict(mlp_dim=0), "mlp_dim must be at least 1, got 0"),
        (dict(remat="full"), "unknown remat 'full': choose one of none, attention, layer"),
        (dict(dtype="int8"), "dtype 'int8' is not supported: choose one of float32, bfloat16, float16"),
        (dict(param_dtype="float33"), "param_dtype 'float33' is not supported"),
    ],
)
def test_config_refuses(changes, message):
    arguments = dict(vocab_size=40, model_dim=32, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(arguments | changes))


@pytest.mark.parametrize(
    ("shape", "dtype", "positions", "message"),
    [
        ((2, SEQ_LEN), jnp.float32, None, r"tokens must be int32 \[B, T\], got float32 \(2, 64\)"),
        ((2, 62), jnp.int32, None, "sequence length 62 does not divide .* pad it to 64"),
        ((3, SEQ_LEN), jnp.int32, None, "batch size 3 does not divide .* pad it to 4"),
        ((2, SEQ_LEN), jnp.int32, 63, r"positions of shape \(63,\) do not match"),
    ],
)
def test_inputs_are_refused_with_a_cure(auto_mesh, shape, dtype, positions, message):
    positions = positions and jnp.arange(positions, dtype=jnp.int32)
    tokens = jnp.zeros(shape, dtype)
    with jax.set_mesh(auto_mesh), pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda model: model(tokens, positions=positions), _abstract(CONFIG))


def test_a_missing_mesh_is_named():
    with pytest.raises(ValueError, match=r"no mesh: .* jax.set_mesh"):
        nnx.eval_shape(lambda model: model(jnp.zeros((2, SEQ_LEN), jnp.int32)), _abstract(CONFIG))
