"""`ring_attention` wherever a user may call it: every kind of mesh and placement, every transformation."""

import inspect
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import ring_jax
from benchmarks.cases import Case, make_inputs
from ring_jax import layout_positions, ring_attention, ring_attention_shard
from ring_jax.kernels.reference import reference_attention, visible_pairs
from tests.budget import assert_within_budget

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
AXIS_TYPES = {
    "auto": (AUTO, AUTO, AUTO),
    "explicit": (EXPLICIT, EXPLICIT, EXPLICIT),
    "explicit seq": (AUTO, EXPLICIT, AUTO),
    "explicit data and tensor": (EXPLICIT, AUTO, EXPLICIT),
}
CASE = Case(2, 32, 4, 2, 8, "float32", is_causal=True, segments="packed")
INPUTS: Any = make_inputs(CASE)  # numpy arrays, which jax takes and type checkers do not
ARRAYS: tuple[Any, Any, Any] = INPUTS[:3]
NAMES = ("output", "dq", "dk", "dv")


def _mesh(shape: tuple[int, ...], names: tuple[str, ...], axis_types: tuple[AxisType, ...] | None = None) -> Mesh:
    count = int(np.prod(shape))
    return jax.make_mesh(shape, names, axis_types or (AUTO,) * len(shape), devices=jax.devices()[:count])


def _oracle(low_precision: np.dtype | None = None):
    positions = np.arange(CASE.seq_len)
    visible = visible_pairs(positions, positions, INPUTS.segment_ids, INPUTS.segment_ids, is_causal=True)
    return reference_attention(*ARRAYS, visible, d_out=INPUTS.d_out, low_precision=low_precision)


EXACT, BASELINE = _oracle(), _oracle(np.dtype(np.float32))


def _assert_exact(results, names: tuple[str, ...] = NAMES) -> None:
    for name, x in zip(names, results, strict=True):
        assert_within_budget(np.asarray(x), getattr(EXACT, name), getattr(BASELINE, name), "float32", name)


def _with_gradients(attend):
    """A function of query, key, value and the output's cotangent that returns the output and their gradients."""

    def run(query, key, value, d_out):
        output, vjp = jax.vjp(attend, query, key, value)
        return output, *vjp(_placed_like(output, d_out))

    return run


def _placed_like(output, cotangent):
    """A cotangent must lie where the output does."""
    if not isinstance(output, Tracer):
        return jax.device_put(cotangent, output.sharding)
    typed = jax.typeof(output).sharding
    return cotangent if typed.mesh.empty else jax.sharding.reshard(cotangent, typed)


def _causal(segment_ids=INPUTS.segment_ids, **kwargs):
    return lambda q, k, v: ring_attention(q, k, v, is_causal=True, segment_ids=segment_ids, **kwargs)


SPEC = PartitionSpec("data", "seq", "tensor")
PLACEMENTS = {
    "sharded": lambda x, mesh: jax.device_put(x, NamedSharding(mesh, SPEC)),
    "sharded otherwise": lambda x, mesh: jax.device_put(x, NamedSharding(mesh, PartitionSpec("seq", None, "data"))),
    "replicated": lambda x, mesh: jax.device_put(x, NamedSharding(mesh, PartitionSpec())),
    "one device": lambda x, mesh: jax.device_put(x, jax.devices()[3]),
    "uncommitted": lambda x, mesh: jnp.asarray(x),
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("axis_types", AXIS_TYPES.values(), ids=AXIS_TYPES)
def test_every_mesh_and_placement(axis_types, placement):
    """With the mesh given or in the context, eager and under jit."""
    mesh = _mesh((2, 2, 2), ("data", "seq", "tensor"), axis_types)
    arrays = [PLACEMENTS[placement](x, mesh) for x in (*ARRAYS, INPUTS.d_out)]
    _assert_exact(_with_gradients(_causal(mesh=mesh))(*arrays))
    with jax.set_mesh(mesh):
        results = _with_gradients(_causal())(*arrays)
        _assert_exact(results)
        if placement == "sharded":
            assert jax.typeof(results[0]) == jax.typeof(arrays[0])
            for gradient, array in zip(results[1:], arrays, strict=False):
                assert jax.typeof(gradient) == jax.typeof(array)
                assert gradient.sharding.is_equivalent_to(array.sharding, 4)
        if placement in ("sharded", "replicated"):
            _assert_exact(jax.jit(_with_gradients(_causal()))(*arrays))


@pytest.mark.parametrize("axis_types", [AXIS_TYPES["auto"], AXIS_TYPES["explicit"]], ids=["auto", "explicit"])
def test_given_mesh_under_jit(axis_types):
    mesh = _mesh((2, 2, 2), ("data", "seq", "tensor"), axis_types)
    arrays = [PLACEMENTS["sharded"](x, mesh) for x in (*ARRAYS, INPUTS.d_out)]
    _assert_exact(jax.jit(_with_gradients(_causal(mesh=mesh)))(*arrays))


def test_output_is_sharded_like_the_query():
    mesh = _mesh((2, 2, 2), ("data", "seq", "tensor"))
    output, lse = ring_attention(*ARRAYS, mesh=mesh, return_lse=True)
    assert output.sharding.is_equivalent_to(NamedSharding(mesh, SPEC), 4)
    assert lse.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", "tensor", "seq")), 3)
    assert (output.shape, output.dtype) == (ARRAYS[0].shape, jnp.float32)
    assert (lse.shape, lse.dtype) == ((2, 4, 32), jnp.float32)


@pytest.mark.parametrize(
    ("shape", "names", "kwargs"),
    [
        ((4,), ("seq",), {}),
        ((1,), ("seq",), {}),
        ((2, 2), ("pipe", "seq"), {}),
        ((2, 2, 2), ("x", "y", "z"), {"seq_axis": ("x", "y"), "head_axis": "z"}),
        ((2, 2, 2), ("y", "z", "x"), {"seq_axis": ("x", "y")}),
        ((1, 2, 2, 2), ("fsdp", "data", "context", "tp"), {"seq_axis": "context", "batch_axis": ("fsdp", "data")}),
        ((2, 2, 2), ("data", "seq", "tensor"), {"batch_axis": None, "head_axis": None}),
        ((2, 2), ("seq", "tensor"), {"head_axis": ("absent", "tensor")}),
    ],
    ids=str,
)
def test_axes_by_any_name(shape, names, kwargs):
    mesh = _mesh(shape, names)
    _assert_exact([_causal(mesh=mesh, **kwargs)(*ARRAYS)], ("output",))
    with jax.set_mesh(mesh):
        _assert_exact(jax.jit(_with_gradients(_causal(**kwargs)))(*ARRAYS, INPUTS.d_out))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_shard_function_is_the_same_attention(layout: str, check_vma: bool):
    mesh = _mesh((2, 2, 2), ("data", "seq", "tensor"))
    order = np.asarray(layout_positions(layout, CASE.seq_len, 2))
    query, key, value, d_out = (x[:, order] for x in (*ARRAYS, INPUTS.d_out))

    def shard(query, key, value, segment_ids, positions):
        return ring_attention_shard(
            query, key, value, axis_name="seq", positions=positions, segment_ids=segment_ids, is_causal=True
        )

    mapped = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(SPEC, SPEC, SPEC, PartitionSpec("data", "seq"), PartitionSpec("seq")),
        out_specs=SPEC,
        check_vma=check_vma,
    )
    run = jax.jit(_with_gradients(lambda q, k, v: mapped(q, k, v, INPUTS.segment_ids[:, order], jnp.asarray(order))))
    results = run(query, key, value, d_out)
    _assert_exact([np.asarray(x)[:, np.argsort(order)] for x in results])
    whole = _with_gradients(_causal(INPUTS.segment_ids[:, order], layout=layout, mesh=mesh))(query, key, value, d_out)
    for a, b in zip(results, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_shard_function_over_two_axes():
    mesh = _mesh((2, 2), ("x", "y"))
    spec, tokens = PartitionSpec(None, ("x", "y")), PartitionSpec(("x", "y"))

    def shard(query, key, value, segment_ids, positions):
        return ring_attention_shard(
            query, key, value, axis_name=("x", "y"), positions=positions, segment_ids=segment_ids, is_causal=True
        )

    mapped = jax.shard_map(shard, mesh=mesh, in_specs=(spec,) * 4 + (tokens,), out_specs=spec)
    positions = jnp.arange(CASE.seq_len, dtype=jnp.int32)
    _assert_exact([jax.jit(mapped)(*ARRAYS, INPUTS.segment_ids, positions)], ("output",))


@pytest.mark.parametrize("give_mesh", [True, False])
def test_inside_a_shard_map_over_the_batch(give_mesh: bool):
    mesh = _mesh((2, 2), ("data", "seq"))

    def of_one_row(query, key, value, segment_ids):
        return _causal(segment_ids, mesh=mesh if give_mesh else None)(query, key, value)

    rows = PartitionSpec("data")
    outer = jax.shard_map(of_one_row, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={"data"})
    with jax.set_mesh(mesh):
        run = _with_gradients(lambda q, k, v: outer(q, k, v, INPUTS.segment_ids))
        _assert_exact(jax.jit(run)(*ARRAYS, INPUTS.d_out))


@pytest.mark.parametrize("in_axis", [0, 2, -1])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "jit"])
def test_vmap_and_vmap_of_gradients(in_axis: int, eager: bool):
    mesh = _mesh((2, 2), ("data", "seq"))
    run = _with_gradients(_causal(mesh=mesh))
    stacked = [np.stack([x, -x], axis=in_axis) for x in (*ARRAYS, INPUTS.d_out)]
    mapped = jax.vmap(run, in_axes=in_axis, out_axes=in_axis)
    results = (mapped if eager else jax.jit(mapped))(*stacked)
    # q k is the same with both signs turned, so the output only changes its sign.
    _assert_exact([np.take(np.asarray(x), 0, axis=in_axis) for x in results])
    _assert_exact([-np.take(np.asarray(x), 1, axis=in_axis) for x in results])


def test_vmap_over_segment_ids_and_some_arguments():
    mesh = _mesh((2,), ("seq",))
    both = np.stack([INPUTS.segment_ids, np.zeros_like(INPUTS.segment_ids)])
    outputs = jax.vmap(lambda ids, q: _causal(ids, mesh=mesh)(q, *ARRAYS[1:]), in_axes=(0, None))(both, ARRAYS[0])
    _assert_exact([outputs[0]], ("output",))
    assert not np.asarray(outputs[1]).any()


@pytest.mark.parametrize("remat", [None, "everything", "saved names"])
def test_scan_over_layers_with_and_without_remat(remat: str | None):
    """Three layers in a scan equal three calls written out, whatever is kept for the backward pass."""
    mesh = _mesh((2, 2), ("data", "seq"))
    query, key, value = (jnp.asarray(x) for x in ARRAYS)
    scales = jnp.asarray([0.5, 1.0, 2.0])

    def layer(hidden, scale):
        return hidden + jnp.sin(_causal(mesh=mesh)(hidden * scale, key * scale, value * scale))

    def in_scan(hidden):
        policy = jax.checkpoint_policies.save_only_these_names(*ring_jax.SAVED_NAMES)
        body = layer
        if remat is not None:
            body = jax.checkpoint(layer, policy=policy if remat == "saved names" else None)
        return jax.lax.scan(lambda hidden, scale: (body(hidden, scale), None), hidden, scales)[0]

    def written_out(hidden):
        for scale in scales:
            hidden = layer(hidden, scale)
        return hidden

    expected, pull_back = jax.vjp(written_out, query)
    got, pull_back_scan = jax.jit(lambda x: jax.vjp(in_scan, x))(query)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    (gradient,), (expected_gradient,) = (f(jnp.asarray(INPUTS.d_out)) for f in (pull_back_scan, pull_back))
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_forward_mode_is_refused():
    mesh = _mesh((2,), ("seq",))
    with pytest.raises(TypeError, match=r"forward-mode autodiff \(jvp\)"):
        jax.jvp(_causal(mesh=mesh), ARRAYS, ARRAYS)


def test_segment_ids_have_no_gradient_and_scale_is_used():
    mesh = _mesh((2,), ("seq",))
    halved = _causal(mesh=mesh, scale=8**-0.5 / 2)(2 * ARRAYS[0], *ARRAYS[1:])
    _assert_exact([halved], ("output",))
    _assert_exact([_causal(mesh=mesh, scale=np.float32(8**-0.5))(*ARRAYS)], ("output",))


PUBLIC_NAMES = {
    "AttentionOptions",
    "BlockwiseMLP",
    "IMPLEMENTATIONS",
    "LAYOUTS",
    "RingAttention",
    "SAVED_NAMES",
    "STRATEGIES",
    "Transformer",
    "TransformerConfig",
    "attention_fn",
    "compiler_options",
    "cross_entropy",
    "from_layout",
    "layout_positions",
    "ring_attention",
    "ring_attention_shard",
    "to_layout",
}


def test_public_names_are_frozen():
    public = {name for name, x in vars(ring_jax).items() if name[0] != "_" and not isinstance(x, types.ModuleType)}
    assert public == PUBLIC_NAMES
    assert ring_jax.LAYOUTS == ("contiguous", "zigzag", "striped")
    assert "ring" in ring_jax.STRATEGIES
    assert "xla" in ring_jax.IMPLEMENTATIONS


@pytest.mark.parametrize(
    ("function", "required", "optional"),
    [
        (
            ring_attention,
            ["query", "key", "value"],
            {
                "is_causal": False,
                "scale": None,
                "segment_ids": None,
                "layout": "contiguous",
                "strategy": "ring",
                "mesh": None,
                "seq_axis": "seq",
                "batch_axis": "data",
                "head_axis": "tensor",
                "implementation": None,
                "return_lse": False,
            },
        ),
        (
            ring_attention_shard,
            ["query", "key", "value", "axis_name", "positions"],
            {"segment_ids": None, "is_causal": False, "scale": None, "implementation": None},
        ),
        (ring_jax.to_layout, ["x", "layout", "num_shards"], {"axis": 1}),
        (ring_jax.from_layout, ["x", "layout", "num_shards"], {"axis": 1}),
        (layout_positions, ["layout", "seq_len", "num_shards"], {}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_signatures_are_frozen(function, required, optional):
    parameters = inspect.signature(function).parameters
    assert [name for name, p in parameters.items() if p.default is p.empty] == required
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == optional
    if function in (ring_attention, ring_attention_shard):
        positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == ["query", "key", "value"]
