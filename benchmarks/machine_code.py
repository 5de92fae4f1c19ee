"""What compiled kernels consist of: SASS read with the `cuobjdump` that comes with Triton, its loops, and what they hold."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z]\w*(?:\.\w+)*)([^;]*);")
_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
# Bytes of a memory instruction by its modifier; 4 without one.
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# Warps that issue one HGMMA together.
WARP_GROUP = 4
# Of a Hopper's multiprocessor in one cycle: multiplications of 16 bits on its tensor cores, bytes out of its shared memory.
TENSOR_PRODUCTS, SHARED_BYTES = 2048, 128
# Multiplications of one HMMA, which one warp issues, by the shape in its name.
_HMMA_PRODUCTS = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address in bytes, the predicate it depends on or "", its opcode with modifiers, its operands."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for any other instruction."""
        match = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(match[1], 16) if match else None

    @property
    def matrix_cycles(self) -> float:
        """Cycles of a Hopper's tensor cores, for each warp that executes it; operands of 16 bits.

        A warp group's instruction takes as long as its multiplications, or as reading its operands from shared memory:
        those with less than 64 columns are bound by that. The left operand may lie in registers.
        """
        if shape := _SHAPE.match(self.opcode):
            rows, columns, depth = (int(number) for number in shape.groups())
            left = rows if self.operands.split(",")[1].strip().startswith("gdesc") else 0
            operands = (left + columns) * depth * 2
            return max(rows * columns * depth / TENSOR_PRODUCTS, operands / SHARED_BYTES) / WARP_GROUP
        return _HMMA_PRODUCTS[self.opcode.split(".")[1]] / TENSOR_PRODUCTS if self.opcode.startswith("HMMA.") else 0.0

    @property
    def global_bytes(self) -> int:
        """Bytes of device memory that one thread reads or writes; 0 if it is no access to it."""
        name, *modifiers = self.opcode.split(".")
        if name not in ("LDGSTS", "LDG", "STG"):
            return 0
        return next((_WIDTHS[one] for one in modifiers if one in _WIDTHS), 4)

    @property
    def spills(self) -> bool:
        """Whether it reads or writes local memory."""
        return self.opcode.split(".")[0] in ("LDL", "STL")


@dataclass(frozen=True)
class Mix:
    """What a stretch of code holds, for each warp that executes it.

    Attributes:
        instructions: all of them.
        matrix_cycles: of a Hopper's tensor cores.
        global_bytes: that one thread reads from and writes to device memory.
        mufu: instructions for the unit of exponentials, square roots and reciprocals.
        hgmma: instructions of warp groups on tensor cores, by shape.
        waits: for matrix instructions of a warp group.
    """

    instructions: int = 0
    matrix_cycles: float = 0.0
    global_bytes: int = 0
    mufu: int = 0
    hgmma: dict[str, int] = field(default_factory=dict)
    waits: int = 0


def serialised(hgmma: int, waits: int) -> bool:
    """Return whether the assembler put a wait behind every matrix instruction of a warp group.

    It does when it runs out of registers: nothing runs beside a product then, not even the next instruction of the same
    product. A healthy loop waits once for a whole product of several instructions.

    Args:
        hgmma: matrix instructions of the hot loop.
        waits: for them, in the same loop.
    """
    return waits > 1 and waits >= hgmma > 0


def disassemble(cubin: bytes) -> tuple[int, str]:
    """Return the registers of a thread and the SASS of a cubin that holds one kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return max(int(count) for count in re.findall(r"REG:(\d+)", usage)), sass


def parse_sass(sass: str) -> list[Instruction]:
    """Return the instructions of one kernel in the order of their addresses."""
    return [
        Instruction(int(address, 16), predicate, opcode, operands)
        for address, predicate, opcode, operands in _LINE.findall(sass)
    ]


def mix_of(instructions: Iterable[Instruction]) -> Mix:
    """Count what a stretch of code holds."""
    code = list(instructions)
    hgmma: dict[str, int] = {}
    for one in code:
        if shape := _SHAPE.match(one.opcode):
            name = shape[0].removeprefix("HGMMA.")
            hgmma[name] = hgmma.get(name, 0) + 1
    return Mix(
        instructions=len(code),
        matrix_cycles=sum(one.matrix_cycles for one in code),
        global_bytes=sum(one.global_bytes for one in code),
        mufu=sum(one.opcode.startswith("MUFU") for one in code),
        hgmma=hgmma,
        waits=sum(one.opcode.startswith("WARPGROUP.DEPBAR") for one in code),
    )


def innermost_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return the bodies of the loops that hold no other loop, in the order of their addresses."""
    spans = sorted({(one.target, one.address) for one in code if one.target is not None and one.target < one.address})
    inner = [
        (start, end)
        for start, end in spans
        if not any(start <= other[0] and other[1] <= end and other != (start, end) for other in spans)
    ]
    return [[one for one in code if start <= one.address <= end] for start, end in inner]


def hot_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """Return the innermost loop with the most work for tensor cores, the longest where none has any; empty without loops."""
    return max(innermost_loops(code), key=lambda body: (mix_of(body).matrix_cycles, len(body)), default=[])


def code_around(code: Sequence[Instruction], loop: Sequence[Instruction]) -> list[Instruction]:
    """Return the instructions that a program which enters `loop` can execute before and after it.

    Every one of them is in the list once, those of other loops too.
    """
    if not loop:
        return list(code)
    index = {one.address: position for position, one in enumerate(code)}
    forward: list[list[int]] = [_successors(code, index, position) for position in range(len(code))]
    backward: list[list[int]] = [[] for _ in code]
    for position, nexts in enumerate(forward):
        for following in nexts:
            backward[following].append(position)
    inside = {index[one.address] for one in loop}
    around = (_reachable(forward, inside) | _reachable(backward, inside)) - inside
    return [code[position] for position in sorted(around)]


def _successors(code: Sequence[Instruction], index: dict[int, int], position: int) -> list[int]:
    one = code[position]
    unconditional = one.predicate in ("", "PT", "UPT")
    found = []
    if one.target is not None and one.target in index:
        found.append(index[one.target])
    # A uniform branch names its predicate among the operands: its only one is the target if it is always taken.
    leaves = one.opcode == "EXIT" or (one.target is not None and "," not in one.operands)
    if not (leaves and unconditional) and position + 1 < len(code):
        found.append(position + 1)
    return found


def _reachable(edges: Sequence[Sequence[int]], starts: Iterable[int]) -> set[int]:
    seen, queue = set(starts), list(starts)
    while queue:
        for following in edges[queue.pop()]:
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return seen


def read_kernel(compiled: Any) -> tuple[int, list[Instruction]]:
    """Return the registers of a thread and the instructions of a kernel that `compile_triton` made."""
    registers, sass = disassemble(compiled.asm["cubin"])
    return registers, parse_sass(sass)
