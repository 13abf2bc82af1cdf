"""The options of a training run: what the command line shows, what config.json keeps."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ..attention import STRATEGIES
from ..checkpoint import write_atomically
from ..kernels import IMPLEMENTATIONS
from ..layouts import LAYOUTS
from ..mesh import parse_mesh
from ..model import REMAT_MODES
from ..presets import PRESETS
from .optimizer import OptimizerConfig

# No float16: its small gradients vanish without loss scaling.
DTYPES = ("float32", "bfloat16")

_SIZE_SUFFIXES = {"": 1, "K": 1024, "M": 1024**2}


def parse_seq_len(text: str) -> int:
    """A number of tokens: `16384`, `16K` (1024 each) or `1M` (1024 x 1024). Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]+)([KM]?)", text.strip().upper())
    if not match:
        raise ValueError(f"{text!r} is not a number of tokens: write it like 16384, 16K or 1M")
    return int(match[1]) * _SIZE_SUFFIXES[match[2]]


def _is_optional_str(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _one_of(names: Sequence[str], default: str | None = None) -> Any:
    # A name from this list; `check` judges it, so that a wrong one gets one line with the valid names.
    return _shown("{" + ",".join(names) + "}", default)


def _shown(metavar: str, default: str | None = None) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else None)


_Tokens = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="TOKENS",
        instance_from_str=lambda words: parse_seq_len(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
# `--resume` alone is the empty string: the run in --out.
_Run = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[RUN]",
        instance_from_str=lambda words: words[0] if words else "",
        is_instance=_is_optional_str,
        str_from_instance=lambda value: [] if value is None else [value],
    ),
]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a byte-level transformer on sequences sharded over devices with exact ring attention.

    Without any options: a small model on the source files of Python's standard library, 16,384 tokens of context, on
    all GPUs, or where there are none on 4 virtual CPU devices (a few minutes on a laptop).
    """

    data: Annotated[tuple[Path, ...], _shown("PATH [PATH ...]", "the source files of Python's standard library")] = ()
    """Files or folders of text to train on; each file is a document."""
    out: Annotated[Path | None, _shown("FOLDER", "runs/MODEL-DATE-TIME")] = None
    """New folder for metrics.jsonl, loss.png, config.json and checkpoints."""
    resume: Annotated[_Run, _shown("[FOLDER]", "start a new run")] = None
    """Go on with the run in this folder, or in --out, from its latest checkpoint. Its options apply again, except those
    given here."""
    model: Annotated[str, _one_of(tuple(PRESETS))] = "tiny"
    """Model preset."""
    seq_len: _Tokens = 16384
    """Context length in tokens (bytes); 16K is 16384 and 1M is 1048576. Must divide over the shards."""
    batch: int = 2
    """Sequences per step, over all devices."""
    steps: int = 80
    """Optimizer steps."""
    seed: int = 0
    """Of the initial weights and the order of the data."""
    mesh: Annotated[str | None, _shown("AXIS=SIZE,...", "all devices on seq")] = None
    """Device mesh of axes data (sequences), seq (shards of each sequence) and tensor (heads), such as data=2,seq=4."""
    layout: Annotated[str, _one_of(LAYOUTS)] = "zigzag"
    """How tokens are dealt to shards; zigzag and striped balance the causal mask."""
    strategy: Annotated[str, _one_of(STRATEGIES)] = "ring"
    """How shards exchange keys and values."""
    implementation: Annotated[str | None, _one_of(IMPLEMENTATIONS, "the best for the devices")] = None
    """Attention kernel."""
    dtype: Annotated[str | None, _one_of(DTYPES, "bfloat16 on GPUs, float32 on CPUs")] = None
    """Of activations and matrix products; weights and optimizer stay float32."""
    remat: Annotated[str, _one_of(REMAT_MODES)] = "attention"
    """What the backward pass computes again: nothing (none), all but the attention of each layer (attention), or whole
    layers (layer). Each keeps less in memory than the one before."""
    offload: bool = False
    """Keep what remat saves in the hosts' pinned memory until the backward pass needs it; for remat attention and
    layer."""
    cpu_devices: Annotated[int | None, _shown("INT", "what --mesh needs, up to 8; 4 without it")] = None
    """Virtual CPU devices to make where there is no GPU."""
    checkpoint_every: int = 100
    """Steps between checkpoints; there is always one at the end and after Ctrl-C."""
    keep: int = 2
    """Checkpoints to keep."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def check(self) -> None:
        """Raises ValueError for the first option that makes no sense on any machine."""
        for name, value, valid in (
            ("model", self.model, tuple(PRESETS)),
            ("layout", self.layout, LAYOUTS),
            ("strategy", self.strategy, STRATEGIES),
            ("implementation", self.implementation, (None, *IMPLEMENTATIONS)),
            ("dtype", self.dtype, (None, *DTYPES)),
            ("remat", self.remat, REMAT_MODES),
        ):
            if value not in valid:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(str(name) for name in valid)}")
        if self.offload and self.remat == "none":
            raise ValueError("--offload moves what remat keeps, but --remat none keeps all: use attention or layer")
        for name in ("seq_len", "batch", "steps", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} must be at least 0")
        if self.cpu_devices is not None and self.cpu_devices < 1:
            raise ValueError(f"--cpu-devices {self.cpu_devices} must be at least 1")
        if self.mesh is not None:
            parse_mesh(self.mesh)

    def identity(self) -> dict[str, Any]:
        """The options that a checkpoint's weights and data position depend on: they cannot change in a run."""
        return {name: getattr(self, name) for name in ("model", "seq_len", "batch", "seed", "dtype")}

    def save(self, path: Path) -> None:
        """Writes the options as JSON, all but where and whether to resume."""
        fields = dataclasses.asdict(self) | {"data": [str(path.absolute()) for path in self.data]}
        write_atomically(
            path, json.dumps({k: v for k, v in fields.items() if k not in ("out", "resume")}, indent=2) + "\n"
        )


def load_config(path: Path) -> TrainConfig:
    """The options that `TrainConfig.save` wrote. Raises ValueError if they cannot be read."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        optimizer = OptimizerConfig(**fields.pop("optimizer"))
        return TrainConfig(**fields | {"data": tuple(Path(name) for name in fields["data"]), "optimizer": optimizer})
    except OSError as error:
        raise ValueError(f"no run to resume: cannot read {str(path)!r} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is damaged or from another version of ring_jax: {error}") from error
