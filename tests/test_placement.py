"""`ring_attention` takes arrays wherever they are: on every kind of mesh, inside and outside transformations."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ring_jax import ring_attention

MESHES = {
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "mixed": (AxisType.Explicit, AxisType.Auto),
}
SHAPE = (2, 16, 2, 8)


def _draw() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(4)]


def _value_and_gradients(attend, query, key, value, d_out) -> list[jax.Array]:
    output, vjp = jax.vjp(attend, query, key, value)
    return [output, *vjp(jax.device_put(d_out, output.sharding))]


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """The same on a mesh of one device."""
    alone = jax.make_mesh((1,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:1])
    results = _value_and_gradients(
        lambda *x: ring_attention(*x, is_causal=True, mesh=alone), *map(jnp.asarray, _draw())
    )
    return [np.asarray(x) for x in results]


@pytest.mark.parametrize("place", ["host", "one device", "sharded", "replicated"])
@pytest.mark.parametrize("by", ["set_mesh", "argument"])
@pytest.mark.parametrize("kind", MESHES)
def test_arrays_are_taken_from_anywhere(kind, by, place, expected):
    mesh = jax.make_mesh((2, 4), ("data", "seq"), MESHES[kind])
    homes = {
        "one device": jax.devices()[5],
        "sharded": NamedSharding(mesh, PartitionSpec("data", "seq")),
        "replicated": NamedSharding(mesh, PartitionSpec()),
    }
    options = {} if by == "set_mesh" else {"mesh": mesh}
    with jax.set_mesh(mesh) if by == "set_mesh" else contextlib.nullcontext():
        arrays = [jax.device_put(x, homes[place]) if place in homes else jnp.asarray(x) for x in _draw()]

        def attend(query, key, value):
            return ring_attention(query, key, value, is_causal=True, **options)

        results = _value_and_gradients(attend, *arrays)
        for got, want in zip(results, expected, strict=True):
            np.testing.assert_allclose(np.asarray(got), want, atol=1e-5)
        if place == "one device":
            assert all(x.devices() == {homes[place]} for x in results[1:])
            return

        def batched(*arrays):
            return jax.vmap(jax.grad(lambda q, k, v, d: jnp.sum(attend(q, k, v) * d)))(*(x[None] for x in arrays))[0]

        if place == "host":
            np.testing.assert_allclose(np.asarray(jax.jit(batched)(*arrays)), expected[1], atol=1e-5)
