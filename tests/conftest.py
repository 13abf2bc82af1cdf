"""Eight virtual CPU devices for every test, and strict promotion of dtypes and ranks."""

import os

# Tests compile far more than they run: machine code may be slow, which spares a quarter of their time. XLA's older
# emitters of fused loops take half as long as the newer ones, which make an MLIR module of each.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true",
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from ring_jax.kernels import mosaic_gpu_backward

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def taken_stretches(monkeypatch) -> list[int]:
    """In how many stretches programs of the Hopper backward go through a head's queries, kernel by kernel."""
    stretches: list[int] = []
    decide = mosaic_gpu_backward.backward_stretches

    def watched(*args):
        stretches.append(decide(*args))
        return stretches[-1]

    monkeypatch.setattr(mosaic_gpu_backward, "backward_stretches", watched)
    return stretches
