"""The benchmarks' own logic, on a CPU: a replayed rank equals the oracle, and a wrong kernel is never timed."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels as kernel_benchmarks
from benchmarks import memory
from benchmarks import replay as replay_module
from benchmarks.cases import Case, make_inputs
from benchmarks.peers import PEERS, Passes
from benchmarks.replay import Replay, replay_backward, replay_forward
from ring_jax import kernels, layout_positions
from ring_jax.kernels.reference import reference_attention, visible_pairs
from ring_jax.kernels.registry import Target
from tests.budget import assert_within_budget

CPU = Target("cpu", "cpu")


@pytest.mark.parametrize(
    ("layout", "as_loop", "segments"),
    [("zigzag", False, "packed"), ("zigzag", False, "none"), ("striped", False, "none"), ("striped", True, "packed")],
)
def test_replayed_ranks_equal_the_oracle(layout, as_loop, segments, monkeypatch):
    """Written out step by step, and as the loop that more than 16 steps are."""
    if as_loop:
        monkeypatch.setattr(replay_module, "MAX_UNROLLED_STEPS", 0)
    shards, case = 3, Case(1, 96, 4, 2, 8, dtype="float32", segments=segments)
    inputs = make_inputs(case)
    order = np.asarray(layout_positions(layout, case.seq_len, shards))

    def by_shard(x: np.ndarray) -> jax.Array:
        return jnp.asarray(np.stack(np.split(x[:, order], shards, axis=1)))

    query, keys, values, d_out = (by_shard(x) for x in inputs[:4])
    ids = None if inputs.segment_ids is None else by_shard(inputs.segment_ids)
    visible = visible_pairs(*(np.arange(case.seq_len),) * 2, *(inputs.segment_ids,) * 2, is_causal=True)
    exact, baseline = (
        reference_attention(*inputs[:3], visible, d_out=inputs.d_out, low_precision=p)
        for p in (None, np.dtype(np.float32))
    )
    kernel = kernels.load("xla", CPU)
    output, dq, dk, dv = [], [], 0, 0
    for rank in range(shards):
        replay = Replay(shards, rank, layout)
        out, lse = replay_forward(kernel, replay, query[rank], keys, values, ids)
        rank_dq, shares = replay_backward(
            kernel, replay, query[rank], keys, values, out, lse, d_out[rank], segment_ids=ids
        )
        output, dq = [*output, out], [*dq, rank_dq]
        dk, dv = dk + jnp.stack([s[0] for s in shares]), dv + jnp.stack([s[1] for s in shares])
    for name, got in (("output", jnp.stack(output)), ("dq", jnp.stack(dq)), ("dk", dk), ("dv", dv)):
        natural = np.concatenate(np.asarray(got), axis=1)[:, np.argsort(order)]
        assert_within_budget(natural, getattr(exact, name), getattr(baseline, name), "float32", name)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_wrong_kernel_is_not_timed(shards):
    program = kernel_benchmarks.Program("xla", Case(1, 128, 4, 2, 16), Replay(shards, shards - 1))
    arrays = kernel_benchmarks.draw(program)
    build = kernel_benchmarks.ours(program, CPU, None)
    (right,) = kernel_benchmarks.measure([kernel_benchmarks.Candidate(program, "right", build, arrays)])
    assert "failed" not in right
    assert right["forward_ms"] > 0
    assert right["backward_ms"] > 0

    def wrong(*args):
        passes = build(*args)
        return Passes(lambda: (passes.forward()[0] * 1.1, None), passes.backward)

    (row,) = kernel_benchmarks.measure([kernel_benchmarks.Candidate(program, "wrong", wrong, arrays)])
    assert "wrong result" in row["failed"]
    assert "forward_ms" not in row
    json.dumps([right, row])


def test_a_rank_counts_the_pairs_it_computes():
    case = Case(1, 64, 1, 1, 8)
    ranks = [kernel_benchmarks.Program("xla", case, Replay(4, rank)).rank_flops for rank in range(4)]
    assert sum(ranks) == 4 * (64 * 65 / 2) * 8
    assert max(ranks) - min(ranks) <= 4 * 64 * 8


def test_memory_is_measured_on_gpus_only_and_planned_for_the_gpu_that_is_there():
    with pytest.raises(ValueError, match="needs a GPU, but jax sees only cpu"):
        memory.look_at_gpu([128])
    assert memory.gpu_of("NVIDIA H200") == "h200"
    with pytest.raises(ValueError, match="no description of 'NVIDIA T4'"):
        memory.gpu_of("NVIDIA T4")


def test_a_steps_peak_must_be_its_own():
    compiled, stepped = {"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7}
    assert memory.step_peak(compiled, stepped) == 7
    with pytest.raises(ValueError, match="use a longer sequence"):
        memory.step_peak(compiled, dict(compiled))


@pytest.mark.parametrize(("pair", "message"), [("small", "write MODEL/TOKENS"), ("small/1G", "not a number of tokens")])
def test_a_wrong_pair_is_refused(pair, message, capsys):
    assert memory.main(["--pairs", pair]) == 2
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(("planned", "status"), [(1005, 0), (995, 0), (1011, 1), (989, 1)])
def test_a_plan_that_is_off_fails_the_command(planned, status, tmp_path, monkeypatch, capsys):
    measured = {"measured_bytes": 1000, "compiled_there_bytes": 1000, "measured_seconds": 1.0}
    row = {"pair": "tiny/1K", "implementation": "xla", "planned_bytes": planned, "predicted_seconds": 1.0}
    row |= measured | {"error": planned / 1000 - 1}
    monkeypatch.setattr(memory, "_compare", lambda *args: ({"device": "NVIDIA H200"}, [row]))
    assert memory.main(["--pairs", "tiny/1K", "--out", str(tmp_path)]) == status
    assert ("NOT within" in capsys.readouterr().out) == bool(status)
    assert json.loads((tmp_path / "memory-nvidia-h200.json").read_text())["rows"] == [row]


def _row_of_peer(name: str) -> dict:
    case = Case(1, 128, 2, 2, 16, dtype="float32")
    program = kernel_benchmarks.Program("xla", case, Replay(layout="contiguous"))
    query, keys, values, d_out = kernel_benchmarks.draw(program)
    (row,) = kernel_benchmarks.measure(
        [kernel_benchmarks.Candidate(program, name, PEERS[name], (query, keys[0], values[0], d_out))]
    )
    return row


@pytest.mark.parametrize("name", ["ringattention", "kvax", "tokamax mosaic"])
def test_a_peer_that_does_not_import_is_a_row_that_says_why(name, monkeypatch):
    module = name.split()[0]
    monkeypatch.setitem(sys.modules, module, None)
    row = _row_of_peer(name)
    assert "ModuleNotFoundError" in row["failed"]
    assert module in row["failed"]


def test_a_peer_that_imports_is_compared_and_timed(monkeypatch):
    asked = []

    def attend(*args, is_causal, implementation):
        asked.append(implementation)
        with jax.numpy_rank_promotion("allow"):  # jax's own attention needs it
            return jax.nn.dot_product_attention(*args, is_causal=is_causal)

    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(dot_product_attention=attend))
    row = _row_of_peer("tokamax mosaic")
    assert "failed" not in row
    assert row["backward_ms"] > 0
    assert set(asked) == {"mosaic"}
