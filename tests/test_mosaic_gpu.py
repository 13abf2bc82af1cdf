"""The Mosaic GPU kernels without a GPU: numbers and races in the interpreter, registers from the compiler."""

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest

from ring_jax.kernels import mosaic_gpu
from tests.triton_cases import Case, arrays, blocks, failures

# Tiles are 128 queries and 64 or 128 keys: these have full, partial and empty tiles, tails on both sides, and every
# route through the kernels. The interpreter takes seconds for each.
CASES = [
    Case(queries=256, keys=256, heads=1, kv_heads=1, head_dim=64),
    Case(queries=136, keys=72, heads=2, kv_heads=1, head_dim=128),
    Case(queries=72, keys=136, heads=1, kv_heads=1, head_dim=64, has_segments=True, batch=2),
    Case(dtype="float16", queries=99, keys=77, heads=1, kv_heads=1, head_dim=96, is_causal=False),
    Case(queries=64, keys=64, heads=1, kv_heads=1, head_dim=40, shuffled=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreter_agrees_with_the_oracle_without_races(case, capfd):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = blocks(case)(mosaic_gpu.forward, mosaic_gpu.backward, arrays(case))
    assert failures(case, {name: np.asarray(value) for name, value in found.items()}) == []
    assert _races(capfd.readouterr().out) == []


@pytest.mark.parametrize(
    "case",
    [
        Case(queries=136, keys=200, heads=2, kv_heads=1, head_dim=32),
        Case(dtype="float16", queries=99, keys=77, heads=1, kv_heads=1, head_dim=64, has_segments=True),
        Case(queries=72, keys=72, heads=1, kv_heads=1, head_dim=256, shuffled=True),
    ],
    ids=str,
)
def test_two_pass_backward_agrees_with_the_oracle_without_races(case, capfd):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        found = blocks(case)(mosaic_gpu.forward, mosaic_gpu.deterministic_backward, arrays(case))
    assert failures(case, {name: np.asarray(value) for name, value in found.items()}) == []
    assert "RACE DETECTED" not in capfd.readouterr().out


def _races(log: str) -> list[str]:
    """The races in the interpreter's log, without those in the plain addition that stands for the copy engine's."""
    races = [report.split("\n\n")[0] for report in log.split("RACE DETECTED")[1:]]
    return [race for race in races if race.count("(add_to_gmem.") != 2]
