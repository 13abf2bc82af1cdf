"""Which implementation computes a block: the choice, its reasons, and what the ring is told about it."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ring_jax import ring_attention
from ring_jax.cluster import compile_only_devices
from ring_jax.kernels import IMPLEMENTATIONS, Need, Target, choose, has_fused_backward, load, registry
from tests.stablehlo import lines_as_run

H100 = Target("gpu", "NVIDIA H100 80GB HBM3", 90, is_compile_only=True)
A100 = Target("gpu", "NVIDIA A100-SXM4-80GB", 80, is_compile_only=True)


@pytest.fixture
def fresh_choice():
    """Defaults are chosen, and logged, once in a process."""
    registry._default.cache_clear()
    yield
    registry._default.cache_clear()


@pytest.mark.parametrize(
    ("target", "dtype", "head_dim", "check_vma", "best"),
    [
        (H100, "bfloat16", 128, False, "mosaic_gpu"),
        (H100, "bfloat16", 128, True, "triton"),
        (H100, "float32", 128, False, "triton"),
        (H100, "bfloat16", 512, False, "xla"),
        (A100, "bfloat16", 128, False, "triton"),
        (Target("gpu", "Tesla V100", 70), "float16", 128, False, "xla"),
        (Target("cpu", "cpu"), "float32", 8, True, "xla"),
    ],
)
def test_the_default_is_the_best_that_can(fresh_choice, target, dtype, head_dim, check_vma, best, caplog):
    with caplog.at_level(logging.INFO, logger="ring_jax"):
        for _ in range(2):
            assert choose(None, Need(target, dtype, head_dim, check_vma)) == best
    chosen = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert chosen == [f"attention on {target.device_kind} is computed by implementation {best!r}"]
    reasons = [r.getMessage().partition("implementation ")[2] for r in caplog.records if r.levelno == logging.WARNING]
    assert bool(reasons) == (target.platform == "gpu" and best != "mosaic_gpu")
    assert len({reason.partition(": ")[2] for reason in reasons}) == len(reasons)


DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops"


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        ("", "mosaic_gpu"),
        (DETERMINISTIC, "mosaic_gpu_deterministic"),
        (f"--xla_dump_to=somewhere {DETERMINISTIC}=true", "mosaic_gpu_deterministic"),
        ("--xla_gpu_deterministic_ops=1", "mosaic_gpu_deterministic"),
        (f"{DETERMINISTIC}=false", "mosaic_gpu"),
        (f"{DETERMINISTIC}=true {DETERMINISTIC}=false", "mosaic_gpu"),
        (f"{DETERMINISTIC}_of_another_name", "mosaic_gpu"),
    ],
)
def test_xlas_own_switch_asks_for_the_same_bits_in_every_run(fresh_choice, monkeypatch, flags, best):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert choose(None, Need(H100, "bfloat16", 128)) == best
    assert choose(None, Need(H100, "bfloat16", 256)) == "mosaic_gpu"
    assert choose(None, Need(A100, "bfloat16", 128)) == "triton"
    assert choose("mosaic_gpu_deterministic", Need(H100, "bfloat16", 128)) == "mosaic_gpu_deterministic"
    if best != "mosaic_gpu":
        words = r"'mosaic_gpu' cannot run .*XLA_FLAGS.*no fixed order.*can: mosaic_gpu_deterministic, triton, xla"
        with pytest.raises(NotImplementedError, match=words):
            choose("mosaic_gpu", Need(H100, "bfloat16", 128))


def _kernels(implementation: str, head_dim: int) -> list[str]:
    """The Mosaic kernels of a gradient on two H100s that are not there, in order."""
    mesh = Mesh(np.array(compile_only_devices("h100", gpus_per_host=2)), ("seq",), axis_types=(AxisType.Auto,))
    shape, place = (1, 256, 2, head_dim), NamedSharding(mesh, PartitionSpec(None, "seq"))
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    attend = functools.partial(ring_attention, mesh=mesh, implementation=implementation)
    gradient = jax.jit(lambda q, d_out: jax.vjp(lambda q: attend(q, q, q), q)[1](d_out))
    program = "\n".join(lines_as_run(gradient.lower(x, x).as_text()))
    return re.findall(r"ring_jax_attention_(\w+)_mosaic_gpu", program)


@pytest.mark.parametrize(
    ("implementation", "head_dim", "backward"),
    [
        ("mosaic_gpu", 128, ["backward"] * 3),
        ("mosaic_gpu", 256, ["dkv", "dq"] * 2),
        ("mosaic_gpu_deterministic", 128, ["dkv", "dq"] * 2),
    ],
)
def test_the_ring_runs_the_kernels_it_was_told_of(implementation, head_dim, backward):
    """The fused kernel, which adds in no fixed order, three times: its ring leaves a part of a step for last."""
    assert _kernels(implementation, head_dim) == ["forward"] * 2 + backward
    assert has_fused_backward(implementation, head_dim) == ("backward" in backward)


def test_no_other_implementation_has_a_fused_backward():
    fused = {name for name in IMPLEMENTATIONS for head_dim in (8, 64, 128, 256) if has_fused_backward(name, head_dim)}
    assert fused == {"mosaic_gpu"}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_is_loaded_and_says_what_it_cannot_do(implementation):
    kernel = load(implementation, H100)
    assert callable(kernel.forward)
    assert callable(kernel.backward)
    if implementation != "xla":
        with pytest.raises(NotImplementedError, match=rf"{implementation!r} cannot run on cpu: .* What can: xla"):
            choose(implementation, Need(Target("cpu", "cpu"), "bfloat16", 128))
