"""One run from its options to its last checkpoint."""

import dataclasses
import json
import math
import shlex
import time
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from ..checkpoint import checkpoint_steps, restore_checkpoint, save_checkpoint
from ..data import Batch, Corpus, PackedText, read_corpus, standard_library
from ..mesh import format_mesh, make_mesh, parse_mesh
from ..modules import AttentionOptions
from ..presets import PRESETS
from .config import TrainConfig
from .interrupt import StopRequest
from .plots import plot_loss
from .progress import TrainProgress, format_count
from .run_folder import RunFolder
from .step import StepConfig, StepMetrics, TrainState, TrainStep


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: its folder, the steps made in all, and the signal that stopped it, if one did."""

    folder: Path
    step: int
    stopped_by: int | None


def train(config: TrainConfig, console: Console) -> TrainResult:
    """Trains as `config` says and leaves metrics, a loss curve and checkpoints in the run's folder.

    Everything that can be wrong with the options, the data, the checkpoint and the folder is found before any file is
    written. Deterministic: the same options on the same devices give the same bits, in one go or resumed.

    Raises:
        ValueError: an option, the data, the checkpoint or the folder is not usable; the message says what to do. In the
            middle of training: the loss is not finite, or a data file has gone; checkpoints stay as they are.
        NotImplementedError: the implementation asked for cannot run here.
    """
    config.check()
    mesh = make_mesh(None if config.mesh is None else parse_mesh(config.mesh))
    config = _resolve(config, mesh)
    corpus = read_corpus(config.data) if config.data else standard_library()
    text = PackedText(corpus, seq_len=config.seq_len, batch_size=config.batch, seed=config.seed)
    step = TrainStep(_step_config(config, mesh))
    folder = RunFolder.new(config.out, config.model) if config.resume is None else RunFolder(Path(config.resume))
    identity = config.identity() | {"data": corpus.fingerprint}
    state = None if config.resume is None else _restore(folder, step, identity, config.steps)
    run = _Run(config, console, folder, identity, text, step)
    run.describe(mesh, corpus, 0 if state is None else int(state.step))
    return run.train(state)


def _resolve(config: TrainConfig, mesh: Mesh) -> TrainConfig:
    """The config with what depends on the machine filled in."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return dataclasses.replace(
        config,
        mesh=format_mesh(mesh.shape),
        dtype=config.dtype or ("float32" if on_cpu else "bfloat16"),
    )


def _step_config(config: TrainConfig, mesh: Mesh) -> StepConfig:
    attention = AttentionOptions(layout=config.layout, strategy=config.strategy, implementation=config.implementation)
    model = dataclasses.replace(
        PRESETS[config.model], dtype=config.dtype, remat=config.remat, offload=config.offload, attention=attention
    )
    return StepConfig(model, config.optimizer, mesh, config.seq_len, config.batch, config.steps)


def _restore(folder: RunFolder, step: TrainStep, identity: dict[str, Any], steps: int) -> TrainState:
    done = checkpoint_steps(folder.checkpoints)
    if not done:
        raise ValueError(f"no finished checkpoint in {str(folder.checkpoints)!r}: start a new run")
    if done[-1] >= steps:
        raise ValueError(
            f"the run in {str(folder.path)!r} has already made {done[-1]} steps: give a larger --steps than {steps}"
        )
    return restore_checkpoint(folder.checkpoints, done[-1], step.abstract_state, identity)


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        console: Console,
        folder: RunFolder,
        identity: dict[str, Any],
        text: PackedText,
        step: TrainStep,
    ):
        self.config = config
        self.console = console
        self.folder = folder
        self.identity = identity
        self.text = text
        self.step = step

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def describe(self, mesh: Mesh, corpus: Corpus, done: int) -> None:
        """Says what is about to happen."""
        config, device = self.config, mesh.devices.flat[0]
        kind = "virtual CPU devices" if device.platform == "cpu" else device.device_kind
        shard = config.seq_len // self.step.config.num_shards
        files = f"{len(corpus.documents):,} files, {format_count(corpus.num_bytes)} bytes"
        what = ", ".join(str(path) for path in config.data) or "the source files of Python's standard library"
        self.say(f"devices     {mesh.size} of {len(jax.devices())} {kind}, mesh {format_mesh(mesh.shape)}")
        self.say(
            f"context     {config.seq_len:,} tokens, {shard:,} on each shard, layout {config.layout}, "
            f"strategy {config.strategy}"
        )
        self.say(f"model       {config.model}: {format_count(self.step.num_params)} weights, {config.dtype}")
        self.say(f"data        {what}: {files}, {len(self.text.rows):,} packed sequences")
        self.say(f"output      {self.folder.path}{f', resumed after step {done}' if done else ''}")

    def train(self, state: TrainState | None) -> TrainResult:
        """Compiles, trains from `state` (None: fresh weights), and leaves metrics, a plot and checkpoints."""
        began = time.monotonic()
        with self.console.status("compiling the training step ..."):
            execute = self.step.lower().compile()
        self.say(f"compiled    in {time.monotonic() - began:.0f} s\n")
        self.config.save(self.folder.config)
        state = self.step.init(self.config.seed) if state is None else state
        history = self.folder.read_metrics(up_to_step=int(state.step))
        self.folder.write_metrics(history)
        progress = TrainProgress(self.console, first=int(state.step), steps=self.config.steps)
        stop = StopRequest(lambda: progress.say("stopping after this step; Ctrl-C again stops at once, without saving"))
        with self.folder.metrics.open("a", encoding="utf-8") as file, progress, stop:
            done = self._make_steps(execute, state, stop, progress, history, file)
        self._conclude(history, done, stop.signum)
        return TrainResult(self.folder.path, done, stop.signum)

    def _make_steps(
        self,
        execute: jax.stages.Compiled,
        state: TrainState,
        stop: StopRequest,
        progress: TrainProgress,
        history: list[dict[str, Any]],
        file: TextIO,
    ) -> int:
        done = int(state.step)
        while done < self.config.steps and stop.signum is None:
            try:
                batch = self.text.batch(done)
            except ValueError:
                self._save(state, done)
                raise
            began = time.perf_counter()
            state, metrics = execute(state, self.step.place(batch))
            entry = self._measure(done + 1, metrics, batch, began)
            done += 1
            file.write(json.dumps(entry) + "\n")
            file.flush()
            history.append(entry)
            progress.step(entry)
            if done % self.config.checkpoint_every == 0 and done < self.config.steps:
                self._save(state, done)
                self._plot(history)
        self._save(state, done)
        return done

    def _measure(self, step: int, metrics: StepMetrics, batch: Batch, began: float) -> dict[str, Any]:
        """The step's line of metrics.jsonl; waits for the step to end. Padding does not count as tokens."""
        loss = float(metrics.loss)
        seconds = time.perf_counter() - began
        if not math.isfinite(loss):
            done = checkpoint_steps(self.folder.checkpoints)
            cure = f"resume from step {done[-1]}" if done else "start again"
            raise ValueError(
                f"the loss of step {step} is {loss}: {cure} with a --learning-rate lower than "
                f"{float(metrics.learning_rate):.2g}. Nothing of this step was saved in {str(self.folder.path)!r}"
            )
        tokens = int(np.count_nonzero(batch.segment_ids))
        return {
            "step": step,
            "loss": loss,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "tokens": tokens,
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": float(metrics.grad_norm),
        }

    def _save(self, state: TrainState, step: int) -> None:
        save_checkpoint(self.folder.checkpoints, step, state, self.identity, keep=self.config.keep)

    def _plot(self, history: list[dict[str, Any]]) -> None:
        config = self.config
        title = f"{config.model}, {config.seq_len:,} tokens of context, {config.layout} on {config.mesh}"
        plot_loss(self.folder.plot, [e["step"] for e in history], [e["loss"] for e in history], title)

    def _conclude(self, history: list[dict[str, Any]], done: int, signum: int | None) -> None:
        if history:
            self._plot(history)
            first, last = history[0]["loss"], history[-1]["loss"]
            self.say(f"\nloss {first:.3f} -> {last:.3f} nats per byte ({last / first - 1:+.0%}) in {done} steps")
        checkpoint = self.folder.checkpoints / str(done)
        self.say(f"wrote {self.folder.metrics}, {self.folder.plot} and the checkpoint {checkpoint}")
        if signum is not None:
            command = f"python -m ring_jax.train --resume {shlex.quote(str(self.folder.path))}"
            self.say(f"stopped after step {done} of {self.config.steps}; resume with\n\n    {command}\n")
