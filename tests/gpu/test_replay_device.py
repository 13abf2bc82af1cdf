"""Whole rings replayed on one GPU: exact at every rank, and no drift with shards or with the number of keys.

Where the machine's Triton is too old for jax-triton, RING_JAX_ARTIFACTS names a folder that
`python -m benchmarks.kernels --export FOLDER` wrote elsewhere.
"""

import dataclasses
import functools
import os
from pathlib import Path

import jax
import pytest

from benchmarks.cases import PRECISION
from benchmarks.gate import Errors, Gate
from benchmarks.kernels import Program, draw, ours, precision_programs
from ring_jax.kernels.registry import Target
from tests.budget import assert_does_not_grow

pytestmark = pytest.mark.gpu

ROWS = 64
# Mosaic kernels take no float32; the others do.
IMPLEMENTATIONS = {"bfloat16": ("mosaic_gpu", "triton"), "float16": ("mosaic_gpu", "triton"), "float32": ("triton",)}
PROGRAMS = [
    program
    for case, shards in PRECISION
    for program in precision_programs(list(IMPLEMENTATIONS[case.dtype]))
    if (program.case, program.replay.num_shards) == (case, shards)
]


@functools.cache
def errors(program: Program) -> Errors:
    """Error on the last rows of the sequence, beside that of dense attention in one piece."""
    folder = os.environ.get("RING_JAX_ARTIFACTS")
    arrays = draw(program)
    build = ours(program, Target.of_device(jax.devices()[0]), Path(folder) if folder else None)
    last = arrays[0].shape[1]
    gate = Gate(program.case, program.replay, arrays, tuple(range(last - ROWS, last)))
    return gate.row_errors(build(program.case, *arrays))


def together(programs: list[Program]) -> list:
    """For `pytest -n 8 --dist loadgroup`: programs whose errors are compared share a process, which keeps them."""
    mark = pytest.mark.xdist_group
    return [pytest.param(p, marks=mark(f"{p.implementation} {p.case.dtype}"), id=p.name) for p in programs]


@pytest.mark.parametrize("program", together(PROGRAMS))
def test_replayed_ring_is_exact(program):
    assert errors(program).is_allowed


@pytest.mark.parametrize("program", together([p for p in PROGRAMS if p.replay.num_shards > 1]))
def test_error_does_not_grow_with_shards_or_keys(program):
    case = dataclasses.replace(program.case, seq_len=65536)
    (one,) = (
        p for p in PROGRAMS if (p.case, p.implementation, p.replay.num_shards) == (case, program.implementation, 1)
    )
    assert_does_not_grow(errors(program).error, errors(one).error, case.dtype, program.name)
