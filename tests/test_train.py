"""Training is the same on any mesh, goes on bit for bit where it stopped, and leaves what it promises."""

import dataclasses
import functools
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from ring_jax import LAYOUTS
from ring_jax.checkpoint import checkpoint_steps, read_info, restore_checkpoint
from ring_jax.data import PackedText, read_corpus
from ring_jax.mesh import make_mesh, parse_mesh
from ring_jax.model import REMAT_MODES, TransformerConfig
from ring_jax.modules import AttentionOptions
from ring_jax.presets import PRESETS
from ring_jax.train import main
from ring_jax.training import OptimizerConfig, StepConfig, TrainState, TrainStep
from ring_jax.training.interrupt import StopRequest
from ring_jax.training.progress import TrainProgress

SEQ_LEN, BATCH, STEPS = 160, 2, 20
RELATIVE_TOLERANCE = 1e-4

MODEL = TransformerConfig(vocab_size=256, model_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents shorter and longer than the context, so that rows hold borders, cuts and padding."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for number, length in enumerate(rng.integers(20, 700, 60)):
        words = rng.choice(["ring", "attention", "shard", "hop", "layout", "zigzag", "(x)", "\n"], length)
        (folder / f"{number:02}.txt").write_text(" ".join(words)[:length])
    return folder


def _step(mesh: str, layout: str = "zigzag", **model) -> TrainStep:
    config = dataclasses.replace(MODEL, attention=AttentionOptions(layout=layout), **model)
    return TrainStep(StepConfig(config, OptimizerConfig(), make_mesh(parse_mesh(mesh)), SEQ_LEN, BATCH, STEPS))


@functools.cache
def _compiled(mesh: str, layout: str) -> tuple[TrainStep, jax.stages.Compiled]:
    step = _step(mesh, layout)
    return step, step.lower().compile()


@pytest.fixture(scope="module")
def first_state():
    return jax.device_get(_step("seq=1").init(0))


def _losses(folder: Path, step: TrainStep, execute: jax.stages.Compiled, first_state: TrainState) -> np.ndarray:
    text = PackedText(read_corpus([folder]), seq_len=SEQ_LEN, batch_size=BATCH, seed=0)
    state = jax.device_put(first_state, jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state))
    losses = []
    for number in range(STEPS):
        state, metrics = execute(state, step.place(text.batch(number)))
        losses.append(float(metrics.loss))
    assert int(state.step) == STEPS
    return np.asarray(losses)


@pytest.fixture(scope="module")
def losses_on_one_device(folder, first_state):
    losses = _losses(folder, *_compiled("seq=1", "contiguous"), first_state)
    assert losses[-1] < 0.9 * losses[0]
    return losses


MESHES = [(f"seq={size}", layout) for size in (1, 2, 4, 8) for layout in LAYOUTS if (size, layout) != (1, "contiguous")]

# With a sequence that is not cut too: the partitioner of jax 0.11 refuses sums over an axis of one device there.
TENSOR_MESHES = [
    ("seq=2,tensor=2", "striped"),
    ("seq=1,tensor=2", "contiguous"),
    ("data=2,seq=1,tensor=2", "contiguous"),
]


@pytest.mark.parametrize(("mesh", "layout"), [*MESHES, ("data=2,seq=4", "zigzag"), *TENSOR_MESHES])
def test_losses_are_the_same_on_any_mesh_in_every_layout(folder, first_state, losses_on_one_device, mesh, layout):
    losses = _losses(folder, *_compiled(mesh, layout), first_state)
    np.testing.assert_allclose(losses, losses_on_one_device, rtol=RELATIVE_TOLERANCE)


def test_tokens_in_another_order_give_other_losses(folder, first_state, losses_on_one_device):
    # So the comparison above can fail: rows dealt to shards as striped, attended to as zigzag.
    _, execute = _compiled("seq=4", "zigzag")
    difference = _losses(folder, _step("seq=4", "striped"), execute, first_state) / losses_on_one_device - 1
    assert np.abs(difference).max() > 10 * RELATIVE_TOLERANCE


def test_fresh_weights_are_the_same_on_any_mesh(first_state):
    # The same random bits; the last of a float's may differ where the compiler fuses differently.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, jax.device_get(_step("data=2,seq=4").init(0)), first_state)
    other = jax.device_get(_step("seq=1").init(1))
    assert (other.params["head"] != first_state.params["head"]).all()


def test_remat_chooses_whether_the_forward_ring_runs_again():
    permutes = {}
    for remat in REMAT_MODES:
        text = _step("seq=4", remat=remat).lower().as_text()
        permutes[remat] = text.count("stablehlo.collective_permute")
    assert permutes["attention"] == permutes["none"] < permutes["layer"]


def test_a_step_donates_its_state_and_gathers_weights_only(folder, first_state):
    step, compiled = _compiled("seq=4", "zigzag")
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", compiled.as_text() or "")
    assert gathered
    assert not [shape for shape in gathered if {str(SEQ_LEN), str(SEQ_LEN // 4)} & set(shape.split(","))]
    state = jax.device_put(first_state, jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state))
    text = PackedText(read_corpus([folder]), seq_len=SEQ_LEN, batch_size=BATCH, seed=0)
    compiled(state, step.place(text.batch(0)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("mesh", ["seq=8", "data=2,seq=4", "data=2,seq=2,tensor=2"])
def test_no_device_holds_all_weights_or_optimizer_state(mesh):
    step = TrainStep(
        StepConfig(PRESETS["llama3-8b"], OptimizerConfig(), make_mesh(parse_mesh(mesh)), SEQ_LEN, BATCH, STEPS)
    )
    assert step.num_params == 8_030_261_248
    leaves = jax.tree.leaves(step.abstract_state)
    total = sum(leaf.size for leaf in leaves)
    assert total == pytest.approx(3 * step.num_params, rel=1e-6)
    local = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in leaves)
    assert local <= 1.15 * total / 8  # the embedding is not cut over tensor
    stacked = jax.tree.leaves(step.abstract_state.params["layers"])
    assert all(leaf.sharding.shard_shape(leaf.shape)[0] == 32 for leaf in stacked)  # a step gathers one layer at a time


def test_heads_that_tensor_cannot_cut_are_refused():
    with pytest.raises(ValueError, match=r"mesh axis 'tensor' of size 4 does not divide the 2 heads of params\.layers"):
        _step("tensor=4,seq=2")


SHAPE = ("--model", "tiny", "--seq-len", "512", "--batch", "2", "--steps", "40")
COMMAND = (*SHAPE, "--mesh", "seq=2", "--layout", "striped")
COMMAND_ON_ONE_DEVICE = (*SHAPE, "--mesh", "seq=1")


def _run(*args: str) -> int:
    return main([*COMMAND, *args])


@pytest.fixture(scope="module")
def whole_run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert _run("--data", str(folder), "--out", str(out), "--checkpoint-every", "15") == 0
    return out


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_metrics_a_plot_a_config_and_checkpoints(whole_run):
    metrics = _metrics(whole_run)
    assert [entry["step"] for entry in metrics] == list(range(1, 41))
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    for entry in metrics:
        assert entry["tokens_per_second"] == pytest.approx(entry["tokens"] / entry["step_seconds"])
        assert 0 < entry["tokens"] <= 2 * 512
    assert checkpoint_steps(whole_run / "checkpoints") == [30, 40]
    assert json.loads((whole_run / "config.json").read_text())["mesh"] == "seq=2"
    picture = matplotlib.image.imread(whole_run / "loss.png")
    assert picture.shape[0] > 400
    assert picture.std() > 0.01


def _start(folder: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ring_jax.train", *COMMAND, "--data", str(folder), "--out", str(out)]
    # The same machine code as here, but the command makes its own virtual devices.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _final_state(run: Path):
    folder = run / "checkpoints"
    model = dataclasses.replace(PRESETS["tiny"], attention=AttentionOptions(layout="striped"))
    step = TrainStep(StepConfig(model, OptimizerConfig(), make_mesh({"seq": 2}), seq_len=512, batch=2, steps=40))
    return restore_checkpoint(folder, 40, step.abstract_state, read_info(folder, 40))


def test_ctrl_c_writes_a_checkpoint_and_the_command_it_prints_goes_on_bit_for_bit(folder, whole_run, tmp_path, capsys):
    out = tmp_path / "stopped run"
    process = _start(folder, out)
    metrics = out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "2 of 2 virtual CPU devices, mesh seq=2" in output
    done = len(_metrics(out))
    assert 3 <= done < 40
    assert checkpoint_steps(out / "checkpoints") == [done]
    assert f"stopped after step {done} of 40; resume with" in output

    # A machine that fails after the checkpoint leaves lines that the resumed run makes again, the last one cut short.
    with metrics.open("a") as file:
        file.write(json.dumps({"step": done + 1, "loss": 0.0}) + '\n{"step": ' + str(done + 2))
    printed = next(line.strip() for line in output.splitlines() if line.startswith("    python"))
    prefix = "python -m ring_jax.train "
    assert printed.startswith(prefix)
    assert main(shlex.split(printed.removeprefix(prefix))) == 0
    assert f"resumed after step {done}" in capsys.readouterr().out
    assert [entry["step"] for entry in _metrics(out)] == list(range(1, 41))
    assert [entry["loss"] for entry in _metrics(out)] == [entry["loss"] for entry in _metrics(whole_run)]
    jax.tree.map(np.testing.assert_array_equal, _final_state(out), _final_state(whole_run))


def test_offload_keeps_activations_in_host_memory_and_changes_no_bit(folder, whole_run, tmp_path, monkeypatch):
    lowered = []
    lower = TrainStep.lower

    def spy(self):
        lowered.append(lower(self))
        return lowered[-1]

    monkeypatch.setattr(TrainStep, "lower", spy)
    out = tmp_path / "run"
    assert _run("--data", str(folder), "--out", str(out), "--offload") == 0
    assert "annotate_device_placement" in lowered[0].as_text()
    assert "annotate_device_placement" not in lower(_step("seq=2", remat="attention")).as_text()
    assert [entry["loss"] for entry in _metrics(out)] == [entry["loss"] for entry in _metrics(whole_run)]
    assert json.loads((out / "config.json").read_text())["offload"] is True


def test_a_longer_run_resumes_without_repeating_its_options(whole_run, tmp_path, capsys):
    out = shutil.copytree(whole_run, tmp_path / "run")
    assert main(["--resume", str(out), "--steps", "41", "--mesh", "seq=1", "--layout", "zigzag"]) == 0
    assert _metrics(out)[:40] == _metrics(whole_run)
    assert [entry["step"] for entry in _metrics(out)[40:]] == [41]
    assert "512 tokens, 512 on each shard, layout zigzag" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["steps"] == 41


def _assert_refused(capsys, *args: str, message: str) -> None:
    """The command ends with status 2 and one line on stderr."""
    assert main(args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "huge"], "unknown model 'huge': choose one of tiny, small, medium, large, llama3-8b"),
        (["--layout", "zig"], "unknown layout 'zig': choose one of contiguous, zigzag, striped"),
        (["--strategy", "tree"], "unknown strategy 'tree': choose one of ring"),
        (["--implementation", "magic"], "unknown implementation 'magic': choose one of .*xla"),
        (["--implementation", "triton"], "implementation 'triton' cannot run on cpu"),
        (["--dtype", "float16"], "unknown dtype 'float16': choose one of .*float32, bfloat16"),
        (["--remat", "none", "--offload"], "--offload moves what remat keeps, .*: use attention or layer"),
        (["--remat", "all"], "unknown remat 'all': choose one of none, attention, layer"),
        (["--mesh", "seq=16"], r"mesh 'seq=16' needs 16 devices, but there are 8 .*--cpu-devices 16"),
        (["--mesh", "data=2"], "mesh 'data=2' has no axis 'seq' .*; add seq=1"),
        (["--mesh", "seq=2,rows=2"], "unknown axis 'rows'; choose from data, seq, tensor"),
        (["--mesh", "seq=2,seq=2"], "names axis 'seq' twice"),
        (["--mesh", "4"], "'4' is not axis=size; write it like data=2,seq=4"),
        (["--mesh", "seq=0"], "'seq=0' is not axis=size"),
        (["--mesh", "data=2,seq=4", "--batch", "3"], "batch 3 does not divide over the 2 devices of mesh axis 'data'"),
        (["--seq-len", "1000", "--mesh", "seq=3"], "--seq-len 1000 does not suit --mesh and --layout: .* 1002"),
        (["--seq-len", "0"], "--seq-len 0 must be at least 1"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--seed", "-1"], "--seed -1 must be"),
        (["--keep", "0"], "--keep 0 must be at least 1"),
        (["--data", "nowhere"], "data path 'nowhere' does not exist"),
        (["--data", os.devnull], "no text to train on in"),
        (["--resume"], "--resume needs the folder of the run"),
        (["--resume", "nowhere"], "no run to resume: cannot read 'nowhere/config.json'"),
    ],
)
def test_wrong_options_are_refused_in_one_line_and_nothing_is_written(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _assert_refused(capsys, "--seq-len", "256", *args, message=message)
    assert not _files(tmp_path)


def test_a_used_or_impossible_out_is_refused(whole_run, tmp_path, capsys):
    before = _files(whole_run)
    _assert_refused(
        capsys, "--out", str(whole_run), message=f"already used: give a new folder, or .* --resume {whole_run}"
    )
    assert _files(whole_run) == before
    file = tmp_path / "file"
    file.write_text("mine")
    _assert_refused(capsys, "--out", str(file), message="is a file: give a new folder")
    _assert_refused(capsys, "--out", str(file / "run"), message="cannot be made: Not a directory")
    assert file.read_text() == "mine"


def test_an_out_without_write_permission_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the permission bits do not stop root
    _assert_refused(capsys, "--out", str(tmp_path / "run"), message="cannot be written: give another folder")


def test_a_checkpoint_of_other_options_or_data_is_refused_and_kept(whole_run, tmp_path, capsys):
    before = _files(whole_run)
    resume = ("--resume", str(whole_run), "--steps", "50")
    message = "batch is 2 in the checkpoint and 4 here; model is 'tiny' in the checkpoint and 'small' here"
    _assert_refused(capsys, *resume, "--model", "small", "--batch", "4", message=message)
    other = tmp_path / "other.txt"
    other.write_text("other text")
    _assert_refused(capsys, *resume, "--data", str(other), message="data is '[0-9a-f]+' in the checkpoint")
    _assert_refused(
        capsys, "--resume", str(whole_run), message="has already made 40 steps: give a larger --steps than 40"
    )
    assert _files(whole_run) == before


def test_a_damaged_checkpoint_or_config_is_refused_and_kept(whole_run, tmp_path, capsys):
    out = shutil.copytree(whole_run, tmp_path / "run")
    largest = max((path for path in (out / "checkpoints" / "40").rglob("*")), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    before = _files(out)
    _assert_refused(capsys, "--resume", str(out), "--steps", "50", message=r"40 is damaged: .*; to go on from step 30")
    assert _files(out) == before
    (out / "config.json").write_text("{")
    _assert_refused(capsys, "--resume", str(out), message="config.json' is damaged or from another version")


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(folder, tmp_path, capsys):
    out = tmp_path / "run"
    options = ("--data", str(folder), "--out", str(out), "--learning-rate", "1e30", "--warmup", "0")
    _assert_refused(
        capsys,
        *COMMAND_ON_ONE_DEVICE,
        *options,
        message=r"the loss of step \d+ is nan: start again with a --learning-rate lower than \d",
    )
    assert all(np.isfinite(entry["loss"]) for entry in _metrics(out))
    assert checkpoint_steps(out / "checkpoints") == []


def test_data_that_goes_during_training_leaves_a_checkpoint(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("some words " * 100)
    batch = PackedText.batch

    def gone(self, step: int):
        if step == 3:
            text.unlink()
        return batch(self, step)

    monkeypatch.setattr(PackedText, "batch", gone)
    out = tmp_path / "run"
    options = ("--data", str(text), "--out", str(out))
    _assert_refused(capsys, *COMMAND_ON_ONE_DEVICE, *options, message="cannot read .*text.txt")
    assert checkpoint_steps(out / "checkpoints") == [3]


def test_the_first_signal_is_a_request_and_the_second_interrupts():
    seen = []
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(lambda: seen.append("asked")) as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM
        assert seen == ["asked"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminal_shows_a_bar_with_loss_speed_and_time_left():
    entry = {"step": 3, "loss": 2.5, "tokens_per_second": 16_384.0, "step_seconds": 1.0}
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with TrainProgress(console, first=0, steps=10) as progress:
        progress.step(entry)
    shown = screen.getvalue()
    assert "3/10" in shown
    assert "loss 2.500  16.4K tokens/s  1.00 s/step" in shown
    assert "ETA" in shown


def test_a_pipe_gets_plain_lines():
    entry = {"step": 1, "loss": 2.5, "tokens_per_second": 999_900.0, "step_seconds": 7.0}
    pipe = io.StringIO()
    console = Console(file=pipe, force_terminal=False, width=40)
    with TrainProgress(console, first=0, steps=11) as progress:
        progress.step(entry)
        progress.step(entry | {"step": 2})
    assert pipe.getvalue() == "step 1/11  loss 2.500  1M tokens/s  7.00 s/step  ETA 1:10\n"
