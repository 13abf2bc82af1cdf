"""Chunked cross entropy equals the dense one of optax, gradients too, and never holds the logits of all tokens."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ring_jax
from tests.budget import assert_within_budget
from tests.jaxpr_shapes import has_elements, intermediate_shapes, repeated

BATCH, SEQ_LEN, DIM, VOCAB = 2, 88, 16, 38
MESHES = {
    "auto": ((2, 4), ("data", "seq"), (AxisType.Auto,) * 2),
    "explicit": ((2, 4), ("data", "seq"), (AxisType.Explicit,) * 2),
    "mixed, two axes for the sequence": ((2, 2, 2), ("a", "b", "tensor"), (AxisType.Auto, *[AxisType.Explicit] * 2)),
}


def _mesh(name):
    sizes, names, kinds = MESHES[name]
    return jax.make_mesh(sizes, names, axis_types=kinds)


def _inputs(dtype="float32"):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((BATCH, SEQ_LEN, DIM)), dtype)
    unembedding = jnp.asarray(rng.standard_normal((DIM, VOCAB)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, SEQ_LEN)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, (BATCH, SEQ_LEN)) * 0.5, jnp.float32)
    return hidden, unembedding, targets, weights


def _dense(dtype, hidden, unembedding, targets, weights):
    """Optax's loss and its gradients, computed in `dtype`."""
    with jax.enable_x64(dtype == "float64"):
        hidden, unembedding, weights = (np.asarray(x).astype(dtype) for x in (hidden, unembedding, weights))

        def loss(hidden, unembedding):
            logits = jnp.einsum("btd,dv->btv", hidden, unembedding, precision="highest")
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return (losses * weights).sum() / weights.sum()

        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, unembedding))


def _chunked(hidden, unembedding, targets, weights, **options):
    def loss(hidden, unembedding):
        return ring_jax.cross_entropy(hidden, unembedding, targets, weights=weights, **options)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, unembedding)


def _assert_equal(got, inputs):
    exact, baseline = _dense("float64", *inputs), _dense("float32", *inputs)
    leaves = [jax.tree.leaves(tree) for tree in (got, exact, baseline)]
    for name, x, want, base in zip(("loss", "d_hidden", "d_unembedding"), *leaves, strict=True):
        assert_within_budget(np.asarray(x), want, base, "float32", name)


@pytest.mark.parametrize("chunk_size", [7, 1024])
def test_equals_optax_without_a_mesh(chunk_size):
    inputs = _inputs()
    _assert_equal(_chunked(*inputs, chunk_size=chunk_size), inputs)


@pytest.mark.parametrize("name", MESHES)
def test_equals_optax_on_a_mesh(name):
    inputs = _inputs()
    axes = dict(seq_axis="seq", batch_axis="data") if "seq" in MESHES[name][1] else dict(seq_axis=("a", "b"))
    mesh = _mesh(name)
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, PartitionSpec(axes.get("batch_axis"), axes["seq_axis"]))
        hidden, targets, weights = (jax.device_put(x, spec) for x in (inputs[0], *inputs[2:]))
        loss, gradients = _chunked(hidden, inputs[1], targets, weights, **axes)
        if not name.startswith("mixed"):  # where half of a dim's axes are Auto, the compiler picks the other half
            assert gradients[0].sharding.is_equivalent_to(spec, 3)
    _assert_equal((loss, gradients), inputs)


def test_equals_optax_inside_shard_map():
    inputs = _inputs()
    everywhere = PartitionSpec("data", "seq")

    def local(hidden, unembedding, targets, weights):
        share = jax.lax.psum(weights.sum(), ("data", "seq"))
        return jax.lax.psum(
            ring_jax.cross_entropy(hidden, unembedding, targets, weights=weights) * weights.sum() / share,
            ("data", "seq"),
        )

    with jax.set_mesh(_mesh("auto")):
        specs = (everywhere, PartitionSpec(), everywhere, everywhere)
        mapped = jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec())
        got = jax.jit(jax.value_and_grad(mapped, argnums=(0, 1)))(*inputs)
    _assert_equal(got, inputs)


def test_bfloat16_gradients_are_those_of_the_rounded_inputs():
    hidden, unembedding, targets, weights = _inputs("bfloat16")
    unembedding = unembedding.astype(jnp.bfloat16).astype(jnp.float32)
    loss, (d_hidden, d_unembedding) = _chunked(hidden, unembedding, targets, weights)
    assert (loss.dtype, d_hidden.dtype, d_unembedding.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    exact = _dense("float64", hidden, unembedding, targets, weights)
    in_float32 = _dense("float32", hidden, unembedding, targets, weights)
    baseline = jax.tree.map(lambda x: np.asarray(jnp.asarray(x).astype(jnp.bfloat16)), in_float32)
    np.testing.assert_allclose(loss, exact[0], rtol=1e-5)
    assert_within_budget(d_hidden, exact[1][0], baseline[1][0], "bfloat16", "d_hidden")
    assert_within_budget(d_unembedding, exact[1][1], baseline[1][1], "bfloat16", "d_unembedding")


def test_tokens_of_no_weight_may_have_any_target_and_others_may_not():
    hidden, unembedding, targets, _ = _inputs()
    ignored = np.arange(SEQ_LEN) % 3 == 0
    marked = jnp.where(ignored[None], -100, targets)
    got = _chunked(hidden, unembedding, marked, jnp.broadcast_to(jnp.asarray(~ignored), targets.shape))
    _assert_equal(got, (hidden, unembedding, targets, jnp.broadcast_to(jnp.asarray(~ignored), targets.shape)))
    assert np.isnan(ring_jax.cross_entropy(hidden, unembedding, marked))
    assert np.isnan(ring_jax.cross_entropy(hidden, unembedding, targets.at[0, 0].set(VOCAB)))


def test_no_weight_at_all_gives_zero_and_zero_gradients():
    hidden, unembedding, targets, weights = _inputs()
    loss, gradients = _chunked(hidden, unembedding, targets, jnp.zeros_like(weights))
    assert loss == 0
    assert all((np.asarray(g) == 0).all() for g in gradients)


def test_large_logits_stay_finite():
    hidden, unembedding, targets, weights = _inputs()
    inputs = hidden * 1e4, unembedding, targets, weights
    _assert_equal(_chunked(*inputs), inputs)


def test_gradients_come_from_the_logits_of_the_loss():
    """Three products a chunk, of the logits and of both gradients; the unembedding is cast outside of the loop."""
    inputs = hidden, unembedding, targets, _ = _inputs("bfloat16")
    assert repeated(jax.make_jaxpr(ring_jax.cross_entropy)(hidden, unembedding, targets), "dot_general") == [
        (44, VOCAB)
    ]
    program = jax.make_jaxpr(_chunked)(*inputs)
    assert sorted(repeated(program, "dot_general")) == [(DIM, VOCAB), (44, DIM), (44, VOCAB)]
    assert (DIM, VOCAB) not in repeated(program, "convert_element_type")


def test_gradients_scale_with_the_cotangent():
    hidden, unembedding, targets, weights = _inputs()

    def scaled(hidden, unembedding, factor):
        return factor * ring_jax.cross_entropy(hidden, unembedding, targets, weights=weights)

    loss, gradients = jax.value_and_grad(scaled, argnums=(0, 1))(hidden, unembedding, 3.0)
    _assert_equal((loss / 3, [g / 3 for g in gradients]), (hidden, unembedding, targets, weights))


def test_a_scaled_loss_keeps_float16_gradients_in_range():
    """Of 256K tokens' mean each gradient is as small as float16 goes; scaled it is as exact as float16 is."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((1, 2**18, 4)), jnp.float16)
    unembedding = jnp.asarray(rng.standard_normal((4, 64)), jnp.float16)
    targets = jnp.asarray(rng.integers(0, 64, (1, 2**18)), jnp.int32)

    def gradient(hidden, unembedding):
        return jax.jit(jax.grad(lambda x: 2.0**17 * ring_jax.cross_entropy(x, unembedding, targets)))(hidden)

    want = np.asarray(gradient(hidden.astype(jnp.float32), unembedding.astype(jnp.float32)))
    error = np.abs(np.asarray(gradient(hidden, unembedding), np.float32) - want).max() / np.abs(want).max()
    assert error < 4 * np.finfo(np.float16).eps


@pytest.mark.parametrize("name", [None, "auto"])
def test_never_holds_the_logits_of_all_tokens(name):
    batch, seq_len, dim, vocab = 2, 512, 4, 64
    shapes = [(batch, seq_len, dim), (dim, vocab), (batch, seq_len), (batch, seq_len)]
    dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    on_a_shard = batch * seq_len // (8 if name else 1)

    def chunked(hidden, unembedding, targets, weights):
        return _chunked(hidden, unembedding, targets, weights)

    def dense(hidden, unembedding, targets, weights):
        return jax.grad(lambda h: jax.nn.logsumexp(h @ unembedding, axis=-1).sum())(hidden)

    def offending(function):
        return [s for s in intermediate_shapes(jax.make_jaxpr(function)(*arrays)) if has_elements(s, on_a_shard, vocab)]

    with jax.set_mesh(_mesh(name)) if name else contextlib.nullcontext():
        assert not offending(chunked)
        if name is None:
            assert offending(dense)


def test_the_sequence_is_not_gathered_and_the_unembedding_gradient_is_reduced_once():
    batch, seq_len, dim, vocab = 2, 2048, 16, 8
    shapes = [(batch, seq_len, dim), (dim, vocab), (batch, seq_len), (batch, seq_len)]
    mesh = _mesh("auto")
    with jax.set_mesh(mesh):
        specs = [PartitionSpec("data", "seq"), PartitionSpec(), *[PartitionSpec("data", "seq")] * 2]
        arrays = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in zip(shapes, (jnp.float32,) * 2 + (jnp.int32, jnp.float32), specs, strict=True)
        ]
        compiled = jax.jit(lambda *inputs: _chunked(*inputs, chunk_size=64)).lower(*arrays).compile()
    lines = (compiled.as_text() or "").splitlines()
    exchanges = " all-gather(", " all-to-all(", " collective-permute("
    assert not [line for line in lines if any(name in line for name in exchanges)]
    reductions = [line for line in lines if " all-reduce(" in line]
    assert reductions
    assert not [line for line in reductions if "while/body" in line]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(unembedding=(VOCAB, DIM)), r"given as table.T"),
        (dict(targets=(BATCH, SEQ_LEN - 1)), r"targets must be integers \[B, T\] = \(2, 88\), got int32 \(2, 87\)"),
        (dict(weights=(SEQ_LEN,)), r"weights must have the shape of targets, \(2, 88\), got \(88,\)"),
        (dict(chunk_size=0), "chunk_size must be at least 1 token, got 0"),
        (dict(hidden=(BATCH, 90, DIM), targets=(BATCH, 90), weights=(BATCH, 90)), "90 does not divide .* pad it to 92"),
    ],
)
def test_refuses(changes, message):
    shapes = dict(hidden=(BATCH, SEQ_LEN, DIM), unembedding=(DIM, VOCAB), targets=(BATCH, SEQ_LEN)) | changes
    weights = jnp.ones(shapes["weights"]) if "weights" in shapes else None
    hidden, unembedding, targets = (jnp.zeros(shapes[name]) for name in ("hidden", "unembedding", "targets"))
    with jax.set_mesh(_mesh("auto")), pytest.raises(ValueError, match=message):
        ring_jax.cross_entropy(
            hidden, unembedding, targets.astype(jnp.int32), weights=weights, chunk_size=changes.get("chunk_size", 1024)
        )
