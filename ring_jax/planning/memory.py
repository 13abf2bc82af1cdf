"""Where a compiled step's memory goes: XLA's own buffer assignment, read back at the moment of the peak.

XLA writes, for every buffer, its place and the instructions between which it is live. The buffers live at the moment
when most of the step's temporary memory is in use, with the step's arguments, are the peak; each is named by the line
of the model that made it.
"""

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

PARTS: tuple[str, ...] = (
    "parameters",
    "optimizer",
    "gradients",
    "gathered weights",
    "saved activations",
    "attention",
    "feed-forward",
    "loss",
    "inputs and outputs",
    "other",
    "between buffers",
)
"""What device memory is split into.

"parameters" are the float32 weights and "optimizer" what it keeps of them; "gradients" are this device's share,
"gathered weights" whole matrices and their gradients before they are shared out; "saved activations" what remat keeps
for the backward pass; "attention", "feed-forward" and "loss" the working memory of each; "between buffers" is memory
that no buffer uses at the peak."""

_HOST_COLOR = 5
_OF_OPERAND = "operand of "
_SCOPES = (
    ("loss", ("loss",)),
    ("attention", ("attention", "_attend_by_layout")),
    ("feed-forward", ("mlp",)),
)


@dataclasses.dataclass(frozen=True)
class MemorySplit:
    """Bytes of one GPU at the peak of the step, and of its host's pinned memory.

    `parts` has a value for each of `PARTS`, and they sum to `device_bytes` exactly: arguments, outputs that are not
    donated arguments, and temporary memory.
    """

    device_bytes: int
    host_bytes: int
    parts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class StepShapes:
    """What tells saved activations and gradients from other buffers.

    `tokens` of one device; `shards` and `matrices` are the shapes of one device's weights and of whole ones, as
    `sorted_dims` writes them. With `num_layers` None nothing is stacked by layers.
    """

    num_layers: int | None
    tokens: int
    shards: frozenset[tuple[int, ...]] = frozenset()
    matrices: frozenset[tuple[int, ...]] = frozenset()


def sorted_dims(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the order of its dims and those of size 1, which XLA changes as it likes."""
    return tuple(sorted(dim for dim in shape if dim > 1))


@dataclasses.dataclass(frozen=True)
class _Buffer:
    name: str
    size: int
    offset: int
    dims: tuple[int, ...]
    live: tuple[int, int]

    @property
    def place(self) -> tuple[int, int]:
        return self.offset, self.size


@dataclasses.dataclass(frozen=True)
class _Allocation:
    size: int
    kind: str
    buffers: tuple[_Buffer, ...]


def compile_with_memory(lowered: jax.stages.Lowered, shapes: StepShapes) -> tuple[jax.stages.Compiled, MemorySplit]:
    """Compiles, and reads where the memory goes."""
    with tempfile.TemporaryDirectory(prefix="ring_jax_plan_") as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        texts = {
            kind: next(Path(folder).glob(f"*{kind}.txt")).read_text()
            for kind in ("after_optimizations-buffer-assignment", "live-range", "after_optimizations")
        }
    split = read_split(
        texts["after_optimizations-buffer-assignment"],
        texts["live-range"],
        texts["after_optimizations"],
        shapes,
        device_bytes=peak_bytes(compiled.memory_analysis()),
    )
    return compiled, split


def peak_bytes(analysis: Any) -> int:
    """Device memory of a compiled program, from `compiled.memory_analysis()`."""
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )


def read_split(assignment: str, live_ranges: str, hlo: str, shapes: StepShapes, *, device_bytes: int) -> MemorySplit:
    """The split of `device_bytes`, from XLA's buffer assignment, live ranges and optimized program as text."""
    op_names = _op_names(hlo)
    arguments = _argument_names(hlo)
    parts = dict.fromkeys(PARTS, 0)
    host_bytes = 0
    for allocation in _allocations(assignment, live_ranges):
        if f"color {_HOST_COLOR}" in allocation.kind:
            host_bytes += allocation.size
        elif number := re.search(r"parameter (\d+)", allocation.kind):
            parts[_argument_part(arguments.get(int(number[1]), ""))] += allocation.size
        elif "preallocated-temp" in allocation.kind:
            for part, size in _parts_at_peak(allocation, op_names, shapes).items():
                parts[part] += size
    # Constants, the tuple of results and the alignment of small buffers.
    parts["other"] += device_bytes - sum(parts.values())
    return MemorySplit(device_bytes, host_bytes, parts)


def _parts_at_peak(allocation: _Allocation, op_names: Mapping[str, str], shapes: StepShapes) -> dict[str, int]:
    """The bytes of an allocation by part, at the moment when most of them are in use."""
    moment = max({b.live[0] for b in allocation.buffers}, key=lambda t: _covered(allocation.buffers, t))
    parts: dict[str, int] = {}
    end = 0
    for buffer in sorted(_live(allocation.buffers, moment), key=lambda b: (b.offset, -b.size)):
        size = max(0, buffer.offset + buffer.size - max(end, buffer.offset))
        end = max(end, buffer.offset + buffer.size)
        if size:
            part = _buffer_part(buffer, allocation.buffers, op_names, shapes)
            parts[part] = parts.get(part, 0) + size
    parts["between buffers"] = allocation.size - sum(parts.values())
    return parts


def _live(buffers: tuple[_Buffer, ...], moment: int) -> list[_Buffer]:
    return [b for b in buffers if b.live[0] <= moment <= b.live[1]]


def _covered(buffers: tuple[_Buffer, ...], moment: int) -> int:
    covered = end = 0
    for buffer in sorted(_live(buffers, moment), key=lambda b: b.offset):
        covered += max(0, buffer.offset + buffer.size - max(end, buffer.offset))
        end = max(end, buffer.offset + buffer.size)
    return covered


def _buffer_part(buffer: _Buffer, others: tuple[_Buffer, ...], op_names: Mapping[str, str], shapes: StepShapes) -> str:
    dims = sorted_dims(buffer.dims)
    if dims in shapes.shards:
        return "gradients"
    if buffer.dims[:1] == (shapes.num_layers,) and shapes.tokens in buffer.dims[1:]:
        return "saved activations"
    if dims in shapes.matrices:
        return "gathered weights"
    # What a loop carries has no name of its own: that of the nearest instruction that fills the same place. Nor has
    # what XLA puts in itself, such as two products made one: that of what it reads.
    same_place = [b for b in others if b.place == buffer.place and op_names.get(b.name)]
    same_place.sort(key=lambda b: abs(b.live[0] - buffer.live[0]))
    for name in (buffer.name, *(b.name for b in same_place), _OF_OPERAND + buffer.name):
        op_name = op_names.get(name, "")
        for part, scopes in _SCOPES:
            if any(re.search(rf"(?<![\w']){scope}(?![\w'])", op_name) for scope in scopes):
                return part
    return "other"


def _argument_part(name: str) -> str:
    if ".params" in name:
        return "parameters"
    return "optimizer" if ".optimizer" in name else "inputs and outputs"


def _argument_names(hlo: str) -> dict[int, str]:
    entry = hlo[hlo.rindex("\nENTRY ") :]
    found = re.findall(r" parameter\((\d+)\).*?op_name=\"([^\"]*)\"", entry)
    return {int(number): name for number, name in found}


def _op_names(hlo: str) -> dict[str, str]:
    """The names of instructions, and for those without one, under `_OF_OPERAND` and theirs, that of what they read."""
    names: dict[str, str] = {}
    for instruction, rest in re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = ([^\n]*)", hlo, re.MULTILINE):
        if found := re.search(r'op_name="([^"]*)"', rest):
            names[instruction] = found[1]
            continue
        operands = re.findall(r"%([\w.\-]+)", rest)
        read = (names.get(operand) or names.get(_OF_OPERAND + operand) for operand in operands)
        names[_OF_OPERAND + instruction] = next(filter(None, read), "")
    return names


def _allocations(assignment: str, live_ranges: str) -> list[_Allocation]:
    ranges = {
        name: (int(first), int(last))
        for name, first, last in re.findall(r"^    (\S+\{[\d,]*\}):(\d+)-(\d+)$", live_ranges, re.MULTILINE)
    }
    allocations: list[tuple[int, str, list[_Buffer]]] = []
    for line in assignment.splitlines():
        if match := re.match(r"allocation \d+: size (\d+),(.*)", line):
            allocations.append((int(match[1]), match[2], []))
        elif match := re.match(
            r" value: <\d+ ([^\s{]+)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)", line
        ):
            if live := ranges.get(match[1] + (match[2] or "{}")):
                dims = re.search(r"\[([\d,]*)\]", match[5])
                sizes = tuple(int(d) for d in dims[1].split(",") if d) if dims else ()
                allocations[-1][2].append(_Buffer(match[1], int(match[3]), int(match[4]), sizes, live))
        elif allocations and not line.strip():
            break
    return [_Allocation(size, kind, tuple(buffers)) for size, kind, buffers in allocations]
