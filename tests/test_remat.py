"""Remat that knows attention: saving its output and logsumexp, the backward pass runs no forward ring again."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType

import ring_jax
from ring_jax import AttentionOptions, Transformer, TransformerConfig
from ring_jax.model import REMAT_MODES

SHARDS = 2


@pytest.fixture(scope="module")
def compiled():
    """A gradient step of two layers, compiled in every remat mode."""
    mesh = jax.make_mesh((SHARDS,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:SHARDS])
    with jax.set_mesh(mesh):
        return {mode: _compile(mode) for mode in REMAT_MODES}


def _compile(mode):
    config = TransformerConfig(
        vocab_size=16,
        model_dim=16,
        num_layers=2,
        num_heads=2,
        remat=mode,
        attention=AttentionOptions(layout="zigzag"),
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

    def loss(state, tokens):
        model = nnx.merge(graph, state)
        return ring_jax.cross_entropy(model.hidden(tokens), model.unembedding, tokens)

    tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    return jax.jit(jax.grad(loss)).lower(state, tokens).compile()


def _permutes(compiled) -> int:
    return len(re.findall(r" collective-permute(?:-start)?\(", compiled.as_text()))


def test_saving_attention_rotates_as_often_as_no_remat(compiled):
    forward, backward = 2 * (SHARDS - 1), 2 * (SHARDS - 1) + 2 * SHARDS
    assert _permutes(compiled["none"]) == forward + backward
    assert _permutes(compiled["attention"]) == forward + backward


def test_saving_layer_inputs_runs_the_forward_ring_again(compiled):
    again = 2 * (SHARDS - 1)
    assert _permutes(compiled["layer"]) == _permutes(compiled["none"]) + again


def test_each_mode_needs_less_memory(compiled):
    none, attention, layer = (compiled[m].memory_analysis().temp_size_in_bytes for m in ("none", "attention", "layer"))
    assert layer < attention < none
