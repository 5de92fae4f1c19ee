"""What compiled kernels consist of: SASS read with the `cuobjdump` that comes with Triton, its hot loop, what is in it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z]\w*(?:\.\w+)*)([^;]*);")
_SHAPE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
# Bytes of a memory instruction by its modifier; 4 without one.
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
# Multiplications of one HMMA by the shape in its name. A warp executes it, and a warp group of four an HGMMA.
_HMMA_PRODUCTS = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}
_WARP_GROUP = 4


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address in bytes, its opcode with modifiers, its operands."""

    address: int
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for any other instruction."""
        match = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(match[1], 16) if match else None

    @property
    def products(self) -> int:
        """Multiplications on tensor cores, for each warp that executes it."""
        if shape := _SHAPE.match(self.opcode):
            rows, columns, depth = (int(number) for number in shape.groups())
            return rows * columns * depth // _WARP_GROUP
        return _HMMA_PRODUCTS[self.opcode.split(".")[1]] if self.opcode.startswith("HMMA.") else 0

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
class Code:
    """What the compiled code of a kernel holds.

    Attributes:
        registers: of a thread.
        shared: memory of a program, bytes.
        spills: instructions on local memory.
        accesses: instructions on device memory, by their width in bytes.
        wgmma: matrix instructions of warp groups.
        loop_wgmma: of them, those in the hot loop.
        loop_waits: waits for those.
    """

    registers: int
    shared: int
    spills: int
    accesses: dict[int, int]
    wgmma: int
    loop_wgmma: int = 0
    loop_waits: int = 0

    @property
    def serialised(self) -> bool:
        """Whether the assembler put a wait behind every matrix instruction of a warp group.

        It does when it runs out of registers: nothing runs beside a product then, not even the next instruction of the
        same product. A healthy loop waits once for a whole product of several instructions.
        """
        return self.loop_waits > 1 and self.loop_waits >= self.loop_wgmma > 0


def inspect_code(compiled: Any) -> Code:
    """Read the machine code of a kernel that `compile_triton` made."""
    registers, sass = disassemble(compiled.asm["cubin"])
    code = parse_sass(sass)
    accesses = Counter(one.global_bytes for one in code if one.global_bytes)
    loop = hot_loop(code)
    return Code(
        registers=registers,
        shared=compiled.metadata.shared,
        spills=sum(one.spills for one in code),
        accesses=dict(accesses),
        wgmma=count(code, "HGMMA."),
        loop_wgmma=count(loop, "HGMMA."),
        loop_waits=count(loop, "WARPGROUP.DEPBAR"),
    )


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
    """Return the instructions in a listing, in its order."""
    return [Instruction(int(address, 16), opcode, operands) for address, opcode, operands in _LINE.findall(sass)]


def count(code: Iterable[Instruction], start: str) -> int:
    """Return how many opcodes start with a word."""
    return sum(one.opcode.startswith(start) for one in code)


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
    return max(innermost_loops(code), key=lambda body: (sum(one.products for one in body), len(body)), default=[])
