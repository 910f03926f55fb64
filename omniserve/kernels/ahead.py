"""Ahead-of-time compilation for a card that is not there, and what the machine code tells.

Registers, spills, shared memory, tensor-core instructions and the length of loops are read from what the compiler
emits. They rule mistakes out; they say nothing about speed. Needs no GPU and no driver, and not the interpreter's
process: there is no compiler in it.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import __file__ as _nvidia
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from omniserve.kernels.cuda import compiled
from omniserve.kernels.device import SHARED_BYTES

TOOLS = Path(_nvidia).parent / "bin"
"""Disassemblers that come with Triton."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One kernel as it is compiled for one card.

    types      Triton type of each argument at run time ("*fp16", "i32")
    constants  its constexpr arguments
    loose      arguments that are not multiples of 16; all other pointers and integers are
    matrix     pattern of the tensor-core instruction it must use, in PTX; None: it uses none
    most_registers  cap of a thread's registers, None without one
    longest    SASS instructions that its longest loop with a tensor-core instruction may have
    counting   barriers that count: where there are more, a number is held, and counted, more than once
    """

    name: str
    arch: int
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    loose: tuple[str, ...] = ()
    fusion: bool = True
    matrix: str | None = None
    longest: int = 0
    counting: int = 0
    most_registers: int | None = None
    first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaSpec:
    """One kernel in CUDA C++ as NVRTC compiles it.

    threads, programs  of a program, and how many of these a multiprocessor must hold
    dynamic            bytes of shared memory that a launch asks for beside the kernel's own
    longest            SASS instructions that its longest loop with a tensor-core instruction may have
    """

    name: str
    arch: int
    kernel: str
    source: str
    constants: dict[str, int]
    threads: int
    programs: int
    dynamic: int
    longest: int
    first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the compiler made of a spec.

    matrix  PTX tensor-core instructions with "A=registers" or "A=shared" for wgmma; loops: (instructions, those on
    tensor cores) of each innermost loop that has some
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    matrix: dict[str, int]
    loops: list[tuple[int, int]]
    problems: list[str] = field(default_factory=list)


def compile_spec(spec: Spec) -> Report:
    """Compile a spec and return what it became; `problems` has a sentence for each thing that must not be."""
    names = spec.kernel.arg_names
    assert set(names) == set(spec.types) | set(spec.constants), set(names) ^ (set(spec.types) | set(spec.constants))
    signature = {name: spec.types.get(name, "constexpr") for name in names}
    whole = [name for name, kind in spec.types.items() if kind[0] in "*i" and name not in spec.loose]
    source = (GluonASTSource if isinstance(spec.kernel, GluonJITFunction) else ASTSource)(
        fn=spec.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in spec.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in whole},
    )
    options = {
        "num_warps": spec.warps,
        "num_stages": spec.stages,
        "enable_fp_fusion": spec.fusion,
        "maxnreg": spec.most_registers,
    }
    made = triton.compile(source, target=GPUTarget("cuda", spec.arch, 32), options=options)
    usage, sass = _read(made.asm["cubin"])
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    report = Report(
        registers=used["REG"],
        stack_bytes=used["STACK"],
        local_bytes=used["LOCAL"],
        shared_bytes=made.metadata.shared,
        matrix=_matrix(made.asm["ptx"]),
        loops=_loops(sass),
    )
    report.problems.extend(_problems(spec, report))
    if (counting := made.asm["ptx"].count("bar.red.popc")) != spec.counting:
        report.problems.append(f"counts at {counting} barriers; expected {spec.counting}")
    if spec.counting and (other := _spread(made.asm["ttgir"])):
        report.problems.append(f"holds keys as {', '.join(other)}: which of two comes first is not known")
    if guarded := re.findall(r"@!?P\d+ +REDUX\S*", sass):
        report.problems.append(f"sums up a warp under a condition, which ptxas 12.8 gets wrong: {guarded[0]}")
    return report


REGISTERS = 65536
"""Registers of a multiprocessor."""


def compile_cuda(spec: CudaSpec) -> Report:
    """Compile a kernel in CUDA C++ and return what it became, like `compile_spec`."""
    code, said = compiled(spec.source, f"sm_{spec.arch}a", spec.constants)
    usage, sass = _read(code)
    shared = int(re.findall(r"SHARED:(\d+)", usage)[-1]) + spec.dynamic  # with the KiB that each program gives away
    products = re.findall(r"(IGMMA\S*) R\d+, (R|gdesc)", sass)
    report = Report(
        registers=int(re.findall(r"REG:(\d+)", usage)[-1]),
        stack_bytes=int(re.findall(r"STACK:(\d+)", usage)[-1]),
        local_bytes=int(re.findall(r"LOCAL:(\d+)", usage)[-1]),
        shared_bytes=shared,
        matrix=dict(Counter(f"{name} A={'registers' if a == 'R' else 'shared'}" for name, a in products)),
        loops=_loops(sass),
    )
    found = report.problems
    if report.stack_bytes or report.local_bytes:
        found.append(f"spills {report.stack_bytes + report.local_bytes} bytes of registers")
    found += re.findall(r"Potential Performance Loss: (.*)", said)
    if report.registers * spec.threads * spec.programs > REGISTERS:
        found.append(
            f"takes {report.registers} registers of {spec.threads} threads; {spec.programs} programs do not fit"
        )
    if shared * spec.programs > SHARED_BYTES[spec.arch] + 1024:
        found.append(f"takes {shared} bytes of shared memory; {spec.programs} programs do not fit")
    if not report.matrix or not all(name.endswith("A=registers") for name in report.matrix):
        found.append(f"uses {report.matrix or 'no tensor core'}; expected integer products with weights in registers")
    longest = max((length for length, _ in report.loops), default=0)
    if not 0 < longest <= spec.longest:
        found.append(f"has a loop of {longest} instructions; its budget is {spec.longest}")
    return report


def _read(code: bytes) -> tuple[str, str]:
    """Return what machine code uses, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", "-c", file.name)


def _problems(spec: Spec, report: Report) -> list[str]:
    found = []
    if report.stack_bytes or report.local_bytes:
        found.append(f"spills {report.stack_bytes + report.local_bytes} bytes of registers")
    if report.shared_bytes > SHARED_BYTES[spec.arch]:
        found.append(f"takes {report.shared_bytes} bytes of shared memory; the card has {SHARED_BYTES[spec.arch]}")
    used = " ".join(report.matrix)
    if spec.matrix is None:
        found += [f"uses tensor cores: {used}"] if used else []
        return found
    if not report.matrix or not all(re.search(spec.matrix, name) for name in report.matrix):
        found.append(f"uses {used or 'no tensor core'}; expected {spec.matrix}")
    longest = max((length for length, _ in report.loops), default=0)
    if not longest:
        found.append("has no loop with a tensor-core instruction")
    elif longest > spec.longest:
        found.append(f"has a loop of {longest} instructions; its budget is {spec.longest}")
    return found


def _spread(ttgir: str) -> list[str]:
    """Return the layouts of what inline PTX gets and returns, but for those that follow the threads."""
    layouts = dict(re.findall(r"(#\w+) = #ttg\.(\S+<.*>)", ttgir))
    used = {layouts[name] for name in re.findall(r"inline_asm.*tensor<\w+, (#\w+)>", ttgir)}
    plain = r"blocked<\{sizePerThread = \[\d\], threadsPerWarp = \[32\], warpsPerCTA = \[\d+\], order = \[0\]\}>"
    return sorted(layout for layout in used if not re.fullmatch(plain, layout))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _matrix(ptx: str) -> dict[str, int]:
    """Count tensor-core instructions; the first operand of wgmma is a list of registers or a descriptor."""
    found: Counter[str] = Counter()
    for line in ptx.splitlines():
        match = re.search(r"(wgmma\.mma_async\S+|mma\.sync\S+)\s+(.*)", line)
        if match is None:
            continue
        name, operands = match.groups()
        if name.startswith("wgmma"):
            behind = operands.split("}", 1)[-1].lstrip(" ,")
            name += " A=registers" if behind.startswith("{") else " A=shared"
        found[name] += 1
    return dict(found)


def _loops(sass: str) -> list[tuple[int, int]]:
    """Return the length of each innermost loop with a tensor-core instruction, and how many it has."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in sass.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line):
            labels[match.group(1)] = len(instructions)
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(match.group(1))
    found = []
    for at, instruction in enumerate(instructions):
        match = re.search(r"BRA\S* .*`\((\.L_x_\d+)\)", instruction)
        if match and labels.get(match.group(1), at) < at:
            found.append(range(labels[match.group(1)], at + 1))
    used = {loop: sum("MMA" in one for one in instructions[loop.start : loop.stop]) for loop in found}
    loops = [loop for loop in found if used[loop]]
    inner = [one for one in loops if not any(_outer(one, other) for other in loops)]
    return [(len(loop), used[loop]) for loop in inner]


def _outer(one: range, other: range) -> bool:
    """True if a loop holds another, or is the way back from a wait that the compiler moved out of another."""
    return (other != one and other[0] in one and other[-1] in one) or (other[0] < one[0] <= other[-1] < one[-1])
