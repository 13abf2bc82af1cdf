"""The benchmarks' own logic, on a CPU: a replayed rank equals the oracle, and a wrong kernel is never timed."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gate, memory, mesh, mfu, ring, timing, turns
from benchmarks import kernels as kernel_benchmarks
from benchmarks.cases import Case, make_inputs
from benchmarks.gate import Gate, row_statistics
from benchmarks.peers import PEERS, Passes
from benchmarks.replay import Replay, replay_backward, replay_forward
from ring_jax import kernels, layout_positions, ring_steps
from ring_jax.kernels.reference import reference_attention, visible_pairs
from ring_jax.kernels.registry import Target
from tests.budget import assert_within_budget

CPU = Target("cpu", "cpu")


@pytest.mark.parametrize(
    ("layout", "as_loop", "segments", "in_place", "takes_several"),
    [
        ("zigzag", False, "packed", False, False),
        ("zigzag", False, "none", True, False),
        ("zigzag", False, "none", True, True),
        ("striped", False, "none", False, False),
        ("striped", True, "packed", True, False),
    ],
)
def test_replayed_ranks_equal_the_oracle(layout, as_loop, segments, in_place, takes_several, monkeypatch):
    """Written out step by step, also with several blocks in some, and as the loop that more than 16 steps are."""
    if as_loop:
        monkeypatch.setattr(ring_steps, "MAX_UNROLLED_STEPS", 0)
    steps = ring_steps.RingSteps(((0,), (1, 2), (3,)), ((0,), (1,), (2, 3))) if takes_several else None
    shards, case = 4 if takes_several else 3, Case(1, 96, 4, 2, 8, dtype="float32", segments=segments)
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
        replay = Replay(shards, rank, layout, given_steps=steps)
        out, lse = replay_forward(kernel, replay, query[rank], keys, values, ids)
        rank_dq, shares = replay_backward(
            kernel, replay, query[rank], keys, values, out, lse, d_out[rank], segment_ids=ids, in_place=in_place
        )
        shares = [(s[:, 0], s[:, 1]) for s in shares] if in_place else shares
        output, dq = [*output, out], [*dq, rank_dq]
        dk, dv = dk + jnp.stack([s[0] for s in shares]), dv + jnp.stack([s[1] for s in shares])
    for name, got in (("output", jnp.stack(output)), ("dq", jnp.stack(dq)), ("dk", dk), ("dv", dv)):
        natural = np.concatenate(np.asarray(got), axis=1)[:, np.argsort(order)]
        assert_within_budget(natural, getattr(exact, name), getattr(baseline, name), "float32", name)


@pytest.mark.parametrize(("shards", "is_loop"), [(1, False), (2, False), (4, True)])
def test_a_right_kernel_is_timed(shards, is_loop, monkeypatch):
    if is_loop:
        monkeypatch.setattr(ring_steps, "MAX_UNROLLED_STEPS", 0)
    program = kernel_benchmarks.Program("xla", Case(1, 128, 4, 2, 16), Replay(shards, shards - 1))
    assert program.replay.is_loop == is_loop
    (row,) = kernel_benchmarks.measure([_candidate(program, lambda forward, backward: (forward, backward))])
    assert "failed" not in row
    assert row["forward_ms"] > 0
    assert row["backward_ms"] > 0
    json.dumps(row)


@pytest.mark.parametrize("rank", range(4))
def test_sums_stay_where_they_arrive(rank):
    """In a ring they do; where a replay gives one the place of another, copies of them are timed with its kernels."""
    program = kernel_benchmarks.Program("xla", Case(1, 128, 4, 2, 16), Replay(4, rank))
    arrays = kernel_benchmarks.draw(program)
    backward = kernel_benchmarks.ours(program, CPU, None)(program.case, *arrays).backward
    assert backward is not None

    def places() -> list[int]:
        _, shares = backward()
        arriving = program.arriving(lambda shape: shape)
        return [x.unsafe_buffer_pointer() for share, a in zip(shares, arriving, strict=True) if a for x in share]

    first, second = places(), places()
    assert len(first) == 6
    assert second == first


@pytest.mark.parametrize(("shards", "rank"), [(1, 0), (4, 0)])
def test_another_checkouts_kernels_take_turns_with_ours(shards, rank, tmp_path):
    """Theirs are called, and told from ours by their results; wrong ones are not timed."""
    kernels_folder = tmp_path / "kernels"
    shutil.copytree(Path(turns.__file__).parent.parent / "kernels", kernels_folder)
    program = kernel_benchmarks.Program("xla", Case(1, 128, 4, 2, 16), Replay(shards, rank))
    config = turns.Config(tmp_path, seconds=(0.001, 0.002), rounds=2)
    turns.import_kernels(tmp_path, turns.OTHER)
    rows = list(turns.compare(program, config, CPU))
    assert [(row["direction"], row["seconds"]) for row in rows] == [
        (direction, seconds) for direction in ("forward", "backward") for seconds in (0.001, 0.002)
    ]
    assert all(0 < row["lowest"] <= row["rate_over_before"] <= row["highest"] for row in rows)

    with (kernels_folder / "xla.py").open("a") as file:
        file.write("_right = forward\ndef forward(*args, scale, **options):\n")
        file.write("    return _right(*args, scale=2 * scale, **options)\n")
    turns.import_kernels(tmp_path, turns.OTHER)
    with pytest.raises(ValueError, match="before: error"):
        next(turns.compare(program, config, CPU))


@pytest.mark.parametrize(
    ("only", "has_kernels", "message"),
    [
        ("", False, "no checkout of this project"),
        ("K7", True, "there are\nmosaic_gpu-B2_T8K"),
        ("", True, "needs a GPU"),
    ],
)
def test_what_cannot_take_turns_is_said(only, has_kernels, message, tmp_path, capsys):
    folder = Path(turns.__file__).parent.parent if has_kernels else tmp_path
    assert turns.main([str(folder), "--only", only]) == 2
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["output", "dq", "dk", "dv"])
@pytest.mark.parametrize(("shards", "rank"), [(1, 0), (2, 1), (4, 0)])
def test_a_wrong_kernel_is_not_timed(shards, rank, wrong):
    program = kernel_benchmarks.Program("xla", Case(1, 128, 4, 2, 16), Replay(shards, rank))

    def spoil(forward: tuple, backward: tuple) -> tuple:
        (output, lse), (dq, shares) = forward, backward
        output, dq = (x * 1.1 if name == wrong else x for name, x in (("output", output), ("dq", dq)))
        dk, dv = (1.1 if name == wrong else 1 for name in ("dk", "dv"))
        return (output, lse), (dq, [(share[0] * dk, share[1] * dv) for share in shares])

    (row,) = kernel_benchmarks.measure([_candidate(program, spoil)])
    assert "wrong result" in row["failed"]
    assert row["error_of"] == wrong
    assert "forward_ms" not in row
    json.dumps(row)


def _candidate(program: kernel_benchmarks.Program, change: Callable) -> kernel_benchmarks.Candidate:
    """Of a program whose results, forward and backward, are changed."""
    arrays = kernel_benchmarks.draw(program)
    build = kernel_benchmarks.ours(program, CPU, None)

    def changed(*args):
        passes = build(*args)
        assert passes.backward is not None
        forward, backward = change(passes.forward(), passes.backward())
        return Passes(lambda: forward, lambda: backward)

    return kernel_benchmarks.Candidate(program, "xla", changed, arrays, Gate(program.case, program.replay, arrays))


@pytest.mark.parametrize("is_causal", [True, False])
def test_rows_statistics_are_those_of_the_oracle(is_causal, monkeypatch):
    """With several chunks of rows, the last of another size."""
    monkeypatch.setattr(gate, "_MAX_SCORES", 4 * 96 * 40)
    case = Case(1, 96, 4, 2, 8, dtype="float32")
    inputs, positions = make_inputs(case), np.arange(case.seq_len)
    visible = visible_pairs(positions, positions, is_causal=is_causal)
    exact = reference_attention(*inputs[:3], visible, d_out=inputs.d_out)
    lse, delta = row_statistics(*(x[0] for x in inputs[:4]), positions, positions, is_causal=is_causal)
    want = np.einsum("btnh,btnh->bnt", exact.output, inputs.d_out)
    np.testing.assert_allclose(lse[None], exact.lse, atol=1e-5)
    np.testing.assert_allclose(delta[None], want, atol=1e-5)
    some = slice(10, 20)
    part = reference_attention(
        inputs.query,
        inputs.key[:, some],
        inputs.value[:, some],
        visible[..., some],
        d_out=inputs.d_out,
        lse=exact.lse,
        delta=want,
    )
    np.testing.assert_allclose(part.dk, exact.dk[:, some])
    np.testing.assert_allclose(part.dv, exact.dv[:, some])


SMALL_RING = ["--tokens-per-gpu", "32", "--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--rest", "0"]


def test_a_ring_is_timed_beside_itself_without_hops(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "MIN_SECONDS", 0.0)
    ring.main([*SMALL_RING, "--out", str(tmp_path)])
    assert "virtual CPU devices" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    forward, backward = json.loads(path.read_text())["rows"]
    assert (forward["pass"], backward["pass"]) == ("forward", "backward")
    for row in (forward, backward):
        assert row["shards"] == 8
        assert row["of_without_hops"] == pytest.approx(row["without_hops_ms"] / row["ring_ms"])


def test_a_ring_without_hops_is_wrong_and_would_not_be_timed():
    (one,) = ring.rings(ring.Config(tokens_per_gpu=("32",), heads=2, kv_heads=2, head_dim=8))
    one.check(one.passes())
    with pytest.raises(ValueError, match="wrong result on rank 0"):
        one.check(one.passes(with_hops=False))


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_ring_with_wrong_gradients_of_a_shards_keys_or_values_would_not_be_timed(wrong):
    (one,) = ring.rings(ring.Config(tokens_per_gpu=("32",), heads=2, kv_heads=2, head_dim=8))
    passes = one.passes()
    assert passes.backward is not None
    gradients = [np.asarray(x).copy() for x in passes.backward()]
    gradients[wrong][:, 3 * 32 : 4 * 32] *= 1.1
    with pytest.raises(ValueError, match=f"wrong gradient: .*{('dq', 'dk', 'dv')[wrong]}"):
        one.check(passes._replace(backward=lambda: [jax.device_put(x, one.arrays[0].sharding) for x in gradients]))


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


MFU_OF_TINY = ["--model", "tiny", "--layers", "2", "--steps", "1", "--seq-len"]


def _mfu_rows(folder) -> list[dict]:
    return json.loads((folder / "mfu-cpu.json").read_text())["rows"]


def test_the_step_is_timed_at_every_length(tmp_path, capsys):
    """In processes of their own, as a user runs it; without a GPU there is no MFU, and the output says so."""
    assert mfu.main([*MFU_OF_TINY, "512", "1K", "--out", str(tmp_path)]) == 0
    assert "speeds mean nothing" in capsys.readouterr().out
    rows = _mfu_rows(tmp_path)
    assert [row["seq_len"] for row in rows] == [512, 1024]
    for row in rows:
        assert row["mfu"] is None
        assert row["measured_bytes"] is None
        assert row["planned_bytes"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["seq_len"] / row["step_seconds"])
        shares = [row[f"{part}_share"] for part in ("attention", "layers", "head")]
        assert all(0 < share < 1 for share in shares)
        assert sum(shares) == pytest.approx(1)
    assert rows[0]["attention_share"] < rows[1]["attention_share"]
    assert (tmp_path / "mfu-cpu.png").stat().st_size > 0


def test_model_flops_are_those_that_the_command_says():
    """Two layers of llama3-8b at 8K tokens, by hand; the head's share falls with the number of layers."""
    config = mfu.Config(layers=2, seq_len=("8K",))
    counted = mfu.count(mfu.workloads_of(config)["8K"])
    tokens, dim = 8192, 4096
    attention = 2 * 6 * tokens**2 * 32 * 128
    layers = 2 * 6 * tokens * (dim * dim * 2 + dim * 1024 * 2 + 3 * dim * 14_336)
    head = 6 * tokens * dim * 128_256
    total = attention + layers + head
    assert counted["model_flops"] == total
    assert counted["attention_share"] == pytest.approx(attention / total)
    assert counted["head_share"] == pytest.approx(head / total)
    assert counted["head_share_all_layers"] == pytest.approx(head / (16 * (attention + layers) + head))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            "out of memory: RES",
        ),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 2.0GiB"), "out of memory: RES"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded"), "JaxRuntimeError: RES"),
        (ValueError(), "ValueError: "),
    ],
)
def test_a_length_that_fails_is_a_row_and_what_was_measured_is_kept(error, reason, tmp_path, monkeypatch, capsys):
    measured = {"step_seconds": 1.0, "tokens_per_second": 512.0, "planned_bytes": 9, "measured_bytes": 9, "mfu": 0.5}
    written = []

    def alone(fn, *args):
        if fn is not mesh.measure:
            return fn(*args)
        if args[0].seq_len == "1K":
            written.extend(_mfu_rows(tmp_path))
            raise error
        return measured | {"layout": "contiguous"}

    monkeypatch.setattr(mfu, "alone", alone)
    assert mfu.main([*MFU_OF_TINY, "512", "1K", "2K", "--out", str(tmp_path)]) == 0
    short, failed, long = _mfu_rows(tmp_path)
    assert written == [short]
    assert "step_seconds" not in failed
    assert failed["failed"].startswith(reason)
    assert "more" not in failed["failed"]
    assert f"1,024 tokens: {reason}" in capsys.readouterr().out
    assert short["mfu"] == long["mfu"] == 0.5
    assert mfu.main([*MFU_OF_TINY, "1K"]) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "llama"], "choose one of tiny, small"),
        (["--remat", "some"], "choose one of none, attention, layer"),
        (["--layers", "-1"], "--layers must be at least 0, got -1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seq-len", "8G"], "not a number of tokens"),
        (["--seq-len", "0"], "at least 1 token"),
        (["--seq-len"], "at least one length"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_runs(args, message, capsys):
    assert mfu.main(args) == 2
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", None), ("cpu", None)],
)
def test_a_gpus_peak_rate_is_its_own_datasheets(device_kind, peak):
    assert mesh.peak_flops(device_kind) == peak


def _row_of_peer(name: str) -> dict:
    case = Case(1, 128, 2, 2, 16, dtype="float32")
    program = kernel_benchmarks.Program("xla", case, Replay(layout="contiguous"))
    arrays = kernel_benchmarks.draw(program)
    query, keys, values, d_out = arrays
    flat = (query, keys[0], values[0], d_out)
    peer = kernel_benchmarks.Candidate(program, name, PEERS[name], flat, Gate(case, program.replay, arrays))
    (row,) = kernel_benchmarks.measure([peer])
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
