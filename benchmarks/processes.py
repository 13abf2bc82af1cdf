"""Processes of their own for what must not share one: a GPU's peak memory counts from the start of a process."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax

from ring_jax.mesh import quiet_cuda_plugin
from ring_jax.planning import leave_gpus_alone

CPU_DEVICES = 8


def alone[R](fn: Callable[..., R], *args: Any) -> R:
    """`fn(*args)` in a new process, with GPUs if there are any and else with `CPU_DEVICES` virtual CPU devices."""
    with fresh_processes(1) as pool:
        return pool.submit(fn, *args).result()


def fresh_processes(count: int, *, for_plans: bool = False) -> ProcessPoolExecutor:
    """Workers that have not used jax yet. Those for plans do not take the machine's GPUs."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=leave_gpus_alone if for_plans else _set_up)


def _set_up() -> None:
    # Memory taken bit by bit leaves gaps too small to split, which jax's allocator counts as used: up to 2 % of a step.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"
    quiet_cuda_plugin()
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
