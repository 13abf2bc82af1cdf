"""Reads the schedule of a compiled ring: what runs between a permute's start and its done, what is copied.

The text of a compiled GPU program (`compiled.as_text()`) lists each computation's instructions in the order in which
they are issued, so a hop is hidden when a block kernel stands between its start and its done.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator

_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_DTYPE_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}

# Names under which the block kernels appear as custom calls; cuDNN's begin with __cudnn$fmha.
_KERNEL_TARGETS = ("mosaic_gpu", "triton_kernel_call", "__gpu$xla.gpu.triton", "__cudnn$fmha")
_COPYING = (
    "copy",
    "convert",
    "copy-start",
    "transpose",
    "concatenate",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "pad",
)
_FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "reshape", "partition-id", "replica-id")
_COLLECTIVES = ("collective-", "all-", "reduce-scatter", "ragged-all-to-all", "async-")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode, the bytes of each of its results, its operands and the computations it calls."""

    name: str
    opcode: str
    results: tuple[int, ...]
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    text: str

    @property
    def largest_result(self) -> int:
        return max(self.results, default=0)


@dataclasses.dataclass(frozen=True)
class Hop:
    """One permute: bytes sent, and how many block kernels run while it is under way (0: exposed).

    XLA may send several arrays in one permute.
    """

    name: str
    num_bytes: int
    is_async: bool
    kernels_under_way: int
    times: int

    @property
    def is_exposed(self) -> bool:
        return not self.is_async or self.kernels_under_way == 0


@dataclasses.dataclass(frozen=True)
class Move:
    """An instruction or fusion that reads and writes an array, with the opcodes that do it and the array's bytes."""

    name: str
    opcodes: frozenset[str]
    num_bytes: int
    times: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a compiled ring does. `times` of its parts counts the iterations of the loop that they stand in.

    `others` is all that is launched but block kernels and collectives, moves and additions among it.
    """

    hops: tuple[Hop, ...]
    num_kernels: int
    moves: tuple[Move, ...]
    additions: tuple[Move, ...]
    others: tuple[Move, ...]
    block_bytes: int

    @property
    def num_permutes(self) -> int:
        return sum(hop.times for hop in self.hops)

    @property
    def num_others(self) -> int:
        return sum(move.times for move in self.others)

    @property
    def num_exposed(self) -> int:
        return sum(hop.times for hop in self.hops if hop.is_exposed)

    @property
    def block_copies(self) -> tuple[Move, ...]:
        """The moves of one block's keys, values or their float32 gradients: none in a ring as it should be."""
        sizes = {self.block_bytes, 2 * self.block_bytes}
        return tuple(move for move in self.moves if move.num_bytes in sizes)

    @property
    def bytes_sent(self) -> int:
        return sum(hop.times * hop.num_bytes for hop in self.hops)


def read_schedule(hlo: str, *, block_bytes: int) -> Schedule:
    """The schedule in the text of a compiled program.

    Args:
        hlo: `compiled.as_text()` of a program for GPUs.
        block_bytes: bytes of one device's keys. Instructions inside a ring that only move at least as many bytes are
            its moves; those that also add (dK and dV, on arrival) are listed apart.
    """
    program = _parse(hlo)
    hops, moves, additions, others, num_kernels = [], [], [], [], 0
    for computation, times in _reachable(program):
        body = program[computation]
        num_kernels += times * sum(_is_kernel(i, program) for i in body)
        others += [_move(i, program, times) for i in body if _is_other_launch(i, program)]
        permutes = [n for n, i in enumerate(body) if i.opcode.startswith("collective-permute")]
        if not permutes:
            continue
        hops += [_hop(body, n, program, times) for n in permutes if not body[n].opcode.endswith("-done")]
        for instruction in _inside_rings(body, permutes, program):
            if instruction.largest_result < block_bytes or _is_kernel(instruction, program):
                continue
            move = _move(instruction, program, times)
            if "add" in move.opcodes:
                additions.append(move)
            elif move.opcodes & {*_COPYING} and not move.opcodes & {"while", "call"}:
                moves.append(move)
    return Schedule(tuple(hops), num_kernels, tuple(moves), tuple(additions), tuple(others), block_bytes)


def _inside_rings(
    body: list[Instruction], permutes: list[int], program: dict[str, list[Instruction]]
) -> Iterator[Instruction]:
    """What is issued while a permute is under way, or between two hops without a kernel between them.

    Between the forward and the backward ring stands the last step's kernel; what follows it belongs to neither.
    """
    under_way = 0
    for here, following in itertools.pairwise(permutes):
        opcode = body[here].opcode
        under_way += opcode.endswith("-start") - opcode.endswith("-done")
        between = body[here + 1 : following]
        if under_way or not any(_is_kernel(i, program) for i in between):
            yield from between


def _hop(body: list[Instruction], start: int, program: dict[str, list[Instruction]], times: int) -> Hop:
    instruction = body[start]
    if instruction.opcode == "collective-permute":
        return Hop(instruction.name, sum(instruction.results), False, 0, times)
    done = next(n for n, i in enumerate(body) if i.opcode.endswith("-done") and instruction.name in i.operands)
    under_way = sum(_is_kernel(i, program) for i in body[start:done])
    # The results of a start are what is sent and, as large, what is received.
    return Hop(instruction.name, sum(instruction.results) // 2, True, under_way, times)


def _is_kernel(instruction: Instruction, program: dict[str, list[Instruction]]) -> bool:
    """Whether this is a block kernel: a custom call of ours, or a fusion around one whose operands are sliced."""
    if instruction.opcode == "custom-call":
        return any(f'custom_call_target="{target}' in instruction.text for target in _KERNEL_TARGETS)
    if instruction.opcode == "fusion":
        return any(_is_kernel(i, program) for name in instruction.calls for i in program.get(name, ()))
    if instruction.opcode == "while":
        # The portable kernel: loops without collectives.
        return not any(
            i.opcode.startswith("collective") for name in _below(instruction, program) for i in program[name]
        )
    return False


def _is_other_launch(instruction: Instruction, program: dict[str, list[Instruction]]) -> bool:
    """Whether this is work of its own but neither a block kernel, a collective nor a ring's loop, whose body counts."""
    if instruction.opcode in (*_FREE, "while") or instruction.opcode.startswith(_COLLECTIVES):
        return False
    return not _is_kernel(instruction, program)


def _move(instruction: Instruction, program: dict[str, list[Instruction]], times: int) -> Move:
    return Move(instruction.name, frozenset(_opcodes(instruction, program)), instruction.largest_result, times)


def _opcodes(instruction: Instruction, program: dict[str, list[Instruction]]) -> set[str]:
    if instruction.opcode != "fusion":
        return {instruction.opcode} - {*_FREE}
    return {i.opcode for name in instruction.calls for i in program.get(name, ())} - {*_FREE}


def _reachable(program: dict[str, list[Instruction]]) -> Iterator[tuple[str, int]]:
    """The computations that issue work themselves, the entry and bodies of ring loops, and how often each runs."""
    todo = [("ENTRY", 1)]
    while todo:
        name, times = todo.pop()
        yield name, times
        for instruction in program[name]:
            if instruction.opcode == "while" and not _is_kernel(instruction, program):
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.text)
                body = re.search(r"body=%?([\w.\-]+)", instruction.text)
                assert body is not None
                assert trips is not None, f"a loop with collectives and no known trip count: {instruction.text[:200]}"
                todo.append((body[1], times * int(trips[1])))


def _below(instruction: Instruction, program: dict[str, list[Instruction]]) -> set[str]:
    found: set[str] = set()
    todo = [name for name in instruction.calls if name in program]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [c for i in program[name] for c in i.calls if c in program]
    return found


def _parse(hlo: str) -> dict[str, list[Instruction]]:
    """Computations by name; the entry computation is named ENTRY."""
    program: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = program.setdefault("ENTRY" if header[1] else header[2], [])
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            current.append(_instruction(match[1], match[2]))
    return program


def _instruction(name: str, text: str) -> Instruction:
    shape_end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, rest = text[:shape_end], text[shape_end:].lstrip()
    opcode, _, arguments = rest.partition("(")
    operands = re.findall(r"%([\w.\-]+)", arguments[: _closing("(" + arguments, 0)])
    calls = re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", rest)
    return Instruction(name, opcode, tuple(_sizes(shape)), tuple(operands), tuple(calls), rest)


def _closing(text: str, start: int) -> int:
    depth = 0
    for n in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[n], 0)
        if depth == 0:
            return n
    return len(text) - 1


def _sizes(shape: str) -> Iterator[int]:
    for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape):
        size = _DTYPE_BYTES.get(dtype, 0)
        for dim in filter(None, dims.split(",")):
            size *= int(dim)
        yield size
