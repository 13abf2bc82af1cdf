"""The planner: its split sums to what XLA says, its times rest on named sources, mistakes are named with their cure."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest

from benchmarks.cases import KERNEL_BENCHMARKS, REPLAYS
from benchmarks.rates import measured_rates, measured_replays, merge
from ring_jax import plan as command
from ring_jax.cluster import Schedule
from ring_jax.planning import AttentionShape, Cluster, Workload, find_model, longest, make_plan, meshes, to_json
from ring_jax.planning import planner as planner_module
from ring_jax.planning.memory import PARTS, MemorySplit, peak_bytes
from ring_jax.planning.planner import Plan
from ring_jax.planning.rates import Measurement, attention_rate, check_rates
from ring_jax.planning.timing import hop_bytes, predict
from ring_jax.planning.workload import lower, read_hf_config
from ring_jax.presets import find_preset

CLUSTER = Cluster.of("h100", "seq=4")
SEQ_LEN = 64 * 1024
HOST_MEMORY = int(2e12)
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def _workload(*, offload: bool = False, seq_len: int = SEQ_LEN, layout: str = "zigzag") -> Workload:
    model = find_model("small", heads="", head_dim=0, remat="layer", offload=offload)
    return Workload(name="small", model=model, seq_len=seq_len, implementation="triton", layout=layout)


def _silent(text: str) -> None:
    del text


@pytest.fixture(scope="module")
def small() -> Plan:
    return make_plan(_workload(), CLUSTER, host_memory=HOST_MEMORY, progress=_silent)


@pytest.fixture(scope="module")
def offloaded() -> Plan:
    return make_plan(_workload(offload=True), CLUSTER, host_memory=HOST_MEMORY, progress=_silent)


def test_the_split_sums_to_the_whole(small, offloaded):
    for plan in (small, offloaded):
        assert tuple(plan.memory.parts) == PARTS
        assert sum(plan.memory.parts.values()) == plan.peak_memory_bytes
        assert all(size >= 0 for size in plan.memory.parts.values())


def test_the_peak_is_that_of_a_program_compiled_without_a_look_inside():
    workload = Workload(name="attention", model=AttentionShape.of("2", 64), seq_len=4096, implementation="triton")
    cluster = Cluster.of("h100", "seq=2")
    plan = make_plan(workload, cluster, host_memory=HOST_MEMORY, progress=_silent)
    assert sum(plan.memory.parts.values()) == plan.peak_memory_bytes
    lowered, _ = lower(workload, cluster)
    assert plan.peak_memory_bytes == peak_bytes(lowered.compile().memory_analysis())


def test_products_of_a_step_are_not_chosen_by_timing_them():
    """Where XLA may choose between its own kernels and cuBLAS on the GPU, the memory planned here is of the former."""
    model = dataclasses.replace(find_preset("tiny"), dtype="bfloat16", num_layers=1)
    workload = Workload(name="tiny", model=model, seq_len=512, implementation="xla")
    compiled = lower(workload, Cluster.of("h200", "seq=1"))[0].compile().as_text()
    assert compiled is not None
    assert "__cublas" in compiled
    assert "gemm_fusion" not in compiled


def test_the_parts_are_what_they_are_called(small):
    model = small.workload.model
    parts = small.memory.parts
    tokens = SEQ_LEN // 4
    norms = (2 * model.num_layers + 1) * model.model_dim
    heads = (model.num_heads + model.num_kv_heads) * model.head_dim
    layer = 2 * model.model_dim * heads + 3 * model.model_dim * model.mlp_dim
    matrices = 2 * model.vocab_size * model.model_dim + model.num_layers * layer
    assert parts["parameters"] == pytest.approx((matrices + norms) * 4 / 4, rel=1e-3)
    assert parts["optimizer"] == pytest.approx(2 * parts["parameters"], rel=1e-3)
    assert parts["saved activations"] == model.num_layers * tokens * model.model_dim * 2
    assert parts["other"] < 0.01 * small.peak_memory_bytes


def test_offload_moves_the_layer_inputs_to_the_host_and_is_not_device_memory(small, offloaded):
    saved = small.memory.parts["saved activations"]
    assert small.memory.host_bytes == 0
    assert offloaded.memory.host_bytes == saved
    assert offloaded.host_bytes == 4 * saved
    assert offloaded.memory.parts["saved activations"] == 0
    assert offloaded.peak_memory_bytes < small.peak_memory_bytes - 0.5 * saved


def test_the_host_is_judged_too(offloaded):
    assert offloaded.fits
    assert not dataclasses.replace(offloaded, host_memory=offloaded.host_bytes - 1).fits


def test_a_plan_that_does_not_fit_says_what_to_change(small):
    memory = MemorySplit(CLUSTER.device_memory, 0, small.memory.parts)
    full = dataclasses.replace(small, memory=memory)
    assert full.headroom == -(CLUSTER.device_memory - CLUSTER.usable_memory)
    assert not full.fits
    assert any("--offload" in line for line in to_json(full)["advice"])


def test_usable_memory_leaves_6_percent():
    assert CLUSTER.usable_memory == pytest.approx(0.94 * CLUSTER.device_memory, abs=1)


def test_hops_carry_keys_values_and_float32_gradients(small):
    heads = 2 * 64  # key-value heads x head dim of the preset
    tokens = SEQ_LEN // 4
    assert hop_bytes(small.workload, CLUSTER) == (2 * 2 * tokens * heads + 4 * tokens, 12 * tokens * heads + 4 * tokens)
    forward, again, backward = small.timing.hops
    assert forward.count == again.count == backward.count == 3 * small.workload.num_layers
    assert small.timing.total_permutes > small.timing.exposed_permutes


def test_times_add_up_and_name_their_sources(small):
    timing = small.timing
    assert timing.seconds == pytest.approx(sum(timing.parts.values()))
    assert timing.tokens_per_second == pytest.approx(SEQ_LEN / timing.seconds)
    assert 0 < timing.mfu < 1
    assert {"attention forward", "attention backward", "matrix products", "link"} <= set(timing.sources)
    assert all(source for source in timing.sources.values())


def test_an_unbalanced_layout_takes_nearly_twice_as_long():
    schedule = Schedule(hops=(), num_kernels=0, moves=(), additions=(), others=(), block_bytes=1)
    kernels = {
        layout: predict(_workload(layout=layout), CLUSTER, "triton", schedule, 0).parts["attention kernels"]
        for layout in ("zigzag", "striped", "contiguous")
    }
    assert kernels["striped"] == kernels["zigzag"]
    # All pairs with the other three shards, half of those within its own: 3.5 of 2 half blocks.
    assert kernels["contiguous"] / kernels["zigzag"] == pytest.approx(3.5 / 2)


def test_a_slower_link_exposes_hops():
    slow = dataclasses.replace(CLUSTER, link="ib-100")
    assert slow.link_along("seq").seconds(1e9) > CLUSTER.link_along("seq").seconds(1e9)
    assert Cluster.of("h100", "seq=16").link_along("seq").name == "ib-400"
    inner = Cluster.of("h100", "data=2,seq=8")
    assert inner.link_along("seq").name == "nvlink"
    assert inner.link_along("data").name == "ib-400"


def test_a_rate_of_another_gpu_says_so():
    sheet = Cluster.of("a100-80gb", "seq=1").datasheet
    rate = attention_rate("triton", "a100-80gb", sheet, "forward", 8192, 128)
    assert "not measured on a100-80gb" in rate.source


def test_the_model_is_checked_against_every_measurement():
    results = json.loads((RESULTS / "kernels-nvidia-h200-unrested.json").read_text())
    rates, replays = measured_rates(results, "h200"), measured_replays(results, "h200")
    assert len(rates) >= 20
    assert len(replays) >= 4
    checks = check_rates()
    assert all(math.isfinite(check.error) for check in checks)
    checked = {(check.what.split()[0], check.what.split()[1], check.measured) for check in checks}
    assert {(row["implementation"], row["direction"], row["tflops"]) for row in rates + replays} <= checked


def _linear(plan: Plan, length: int) -> Plan:
    fixed, per_token = 10_000_000_000, 17_000
    parts = dict.fromkeys(PARTS, 0) | {"parameters": fixed, "saved activations": per_token * length}
    memory = MemorySplit(sum(parts.values()), 0, parts)
    return dataclasses.replace(plan, memory=memory, workload=dataclasses.replace(plan.workload, seq_len=length))


@pytest.mark.parametrize("start", [8192, 4_194_304, 100_000_000])
def test_the_longest_sequence_fills_the_memory(small, start):
    found = longest(lambda length: _linear(small, length), 8192, start, _silent)
    assert found.fits
    assert found.headroom < 0.03 * CLUSTER.usable_memory
    assert found.workload.seq_len % 8192 == 0


def test_no_length_fits(small):
    def plan_at(length: int) -> Plan:
        memory = MemorySplit(10**12, 0, dict.fromkeys(PARTS, 0) | {"parameters": 10**11, "other": 9 * 10**11})
        return dataclasses.replace(small, memory=memory, workload=dataclasses.replace(small.workload, seq_len=length))

    with pytest.raises(ValueError, match="not even 8,192 tokens fit"):
        longest(plan_at, 8192, 8192, _silent)


def test_every_mesh_of_a_number_of_gpus():
    found = meshes(8, batch=2, num_kv_heads=2)
    assert {tuple(mesh.items()) for mesh in found} == {
        (("seq", 8),),
        (("data", 2), ("seq", 4)),
        (("seq", 4), ("tensor", 2)),
        (("data", 2), ("seq", 2), ("tensor", 2)),
    }


def test_json_of_the_bare_operation(capsys):
    options = "--model attention --heads 4/2 --head-dim 64 --mesh seq=2 --seq-len 8K --implementation triton --json"
    assert command.main(options.split()) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["peak_memory_bytes"] == sum(found["memory_bytes"].values())
    assert found["fits"]
    assert found["predicted"]["step_seconds"] > 0
    assert "compiling attention" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--gpu v100", "unknown GPU 'v100': choose one of a100-80gb, h100, h200, b200"),
        ("--model llama9", "unknown model 'llama9': choose one of attention, tiny"),
        ("--mesh seq=6 --hosts 2 --gpus-per-host 4", "needs 6 GPUs, but 2 hosts x 4 GPUs are 8"),
        ("--mesh seq=6,pipe=2", "unknown axis 'pipe'"),
        ("--link wifi", "unknown link 'wifi': choose one of nvlink"),
        ("--remat all", "unknown remat 'all': choose one of none, attention, layer"),
        ("--remat none --offload", "offload moves what remat keeps"),
        ("--seq-len 1001 --mesh seq=2 --model tiny", "sequence length 1001 does not divide"),
        ("--model attention --heads 3/2", "--heads '3/2'"),
        ("--max-seq-len --best-mesh", "ask one at a time"),
    ],
)
def test_mistakes_are_named(options, message, capsys):
    assert command.main(options.split()) == 2
    assert message in capsys.readouterr().err


def test_a_missing_plugin_names_the_extra(monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("ring_jax.cluster.gpus.topologies.get_topology_desc", missing)
    assert command.main(["--model", "tiny", "--seq-len", "4K", "--mesh", "seq=2"]) == 1
    assert "ring-jax[cuda13]" in capsys.readouterr().err


def test_a_failing_compile_names_the_step_and_the_reason(monkeypatch, capsys):
    def fails(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: ptxas exited with 255\nmore")

    monkeypatch.setattr(planner_module, "lower", lambda *args: (None, None))
    monkeypatch.setattr(planner_module, "compile_with_memory", fails)
    options = ["--model", "tiny", "--seq-len", "4K", "--mesh", "seq=2", "--implementation", "triton"]
    assert command.main(options) == 1
    assert "compiling the training step of tiny" in (err := capsys.readouterr().err)
    assert "ptxas exited with 255" in err


def test_a_hugging_face_config_makes_the_preset(tmp_path):
    path = tmp_path / "config.json"
    fields = dict(
        model_type="llama", vocab_size=128_256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, intermediate_size=14_336, rope_theta=500_000.0, rms_norm_eps=1e-5,
    )  # fmt: skip
    path.write_text(json.dumps(fields))
    assert read_hf_config(path) == find_preset("llama3-8b")
    path.write_text(json.dumps(fields | {"model_type": "mamba"}))
    with pytest.raises(NotImplementedError, match="mamba"):
        read_hf_config(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"not the config\.json"):
        read_hf_config(path)


def test_measured_rates_replace_older_ones_of_the_same_kernel():
    case, (ring, shards) = KERNEL_BENCHMARKS[0], REPLAYS[0]
    one = {"implementation": "triton", "case": case.label, "shards": 1, "rank": 0}
    results = {
        "environment": {"date": "2026-12-01", "jax": "0.11.2"},
        "rows": [
            one | {"forward_tflops": 400.04},
            one | {"implementation": "jax cuDNN", "forward_tflops": 578.0},
            one | {"implementation": "xla", "failed": "out of memory"},
            one | {"case": ring.label, "shards": shards, "rank": 7, "backward_tflops": 390.0},
        ],
    }
    (rate,) = measured_rates(results, "h200")
    assert (rate["tflops"], rate["tokens"], rate["implementation"]) == (400.0, case.seq_len, "triton")
    assert Measurement(**rate).tflops == 400.0
    (replay,) = measured_replays(results, "h200")
    assert (replay["direction"], replay["rank"], replay["tokens_per_gpu"]) == ("backward", 7, ring.seq_len // shards)
    older = {
        "rates": [rate | {"tflops": 1.0}, rate | {"gpu": "h100"}],
        "replays": [replay | {"tflops": 1.0}, replay | {"rank": 0}],
    }
    merged = merge(older, [rate], [replay])
    assert [row["tflops"] for row in merged["rates"]] == [400.0, 400.0]
    assert [(row["rank"], row["tflops"]) for row in merged["replays"]] == [(0, 390.0), (7, 390.0)]
