"""Compile the Triton kernels for GPUs that are not here, and count what the machine code does.

    python -m bench.aot [--arch 90] [--output FILE]

Static counts: registers, spills, shared memory, and instructions per weight in the innermost loop
that matters (or, without a loop, in all of the kernel). They bound the speed from above and say
nothing else about it. Budgets are in bench/aot_budgets.json; the command fails where one is not
met. Nothing is launched: no GPU is needed. The tests run this, without Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.aot_attention import attention_cases
from bench.aot_choice import choice_cases
from bench.aot_linear import Case, linear_cases
from bench.aot_rows import row_cases

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
BUDGETS = Path(__file__).parent / "aot_budgets.json"
DEFAULT_SHARED_BYTES = 49152
MAX_SHARED_BYTES = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448}
"""What a thread block may have once it has asked for more than the default."""
ALU = {"LOP3", "PRMT", "SHF", "SEL", "ISETP", "IADD3", "LEA", "VIADD", "SGXT", "FSEL", "PLOP3"}
LOAD_STORE = ("SHFL", "LDS", "STS", "LDSM", "STSM")


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted."""

    kernel: str
    arch: int
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    dynamic_shared_bytes: int
    instructions: float
    alu: float
    load_store: float
    """Per weight, as are the two above: all instructions, ALU, and shared memory and shuffles."""
    wide_loads: int
    """128-bit loads from global memory, copies to shared memory included."""
    spills_in_loop: int
    is_launchable: bool
    operand: str
    """Layout of the bytes that the decoding assembly takes."""


def compile_case(case: Case, arch: int) -> Any:
    """Triton's compiled kernel, as the just-in-time compiler makes it for aligned tensors."""
    names = case.kernel.arg_names
    types = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    sizes = (
        "row_size", "row_words", "x_stride", "y_stride", "out_stride", "numel", "q_stride",
        "k_stride", "v_stride", "residual_stride", "size", "stride", "vocab_size",
    )  # fmt: skip
    aligned = [
        n for n in names
        if (types[n].startswith("*") and n not in case.unaligned) or n in sizes
    ]  # fmt: skip
    source = ASTSource(
        fn=case.kernel,
        signature=types,
        constexprs={(names.index(n),): value for n, value in case.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if not case.enable_fp_fusion:
        options["enable_fp_fusion"] = False
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def count(case: Case, arch: int) -> Counts:
    """Compile one case and count."""
    compiled = compile_case(case, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = _run("nvdisasm", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert match, usage
    registers, stack, static = (int(number) for number in match.groups())
    instructions, loops = _parse(listing)
    body = _main_loop(loops) if case.is_loop else _without_padding(instructions)
    operations = [_operation(line) for line in body]
    base = Counter(operation.split(".")[0] for operation in operations)
    everything = [_operation(line) for line in instructions]
    dynamic = compiled.metadata.shared
    fits_default = static + dynamic <= DEFAULT_SHARED_BYTES
    asks_for_more = dynamic > DEFAULT_SHARED_BYTES  # only then does Triton's launcher
    # The decoding assembly is the one that takes four bytes at a time.
    layout = re.search(
        r"packed_element = 4 : i32[^\n]*? : tensor<\w+, (#\S+?(?:<\{.*?\}>)?)> ->",
        compiled.asm["ttgir"],
    )
    return Counts(
        kernel=case.name,
        arch=arch,
        registers=registers,
        stack_bytes=stack,
        static_shared_bytes=static,
        dynamic_shared_bytes=dynamic,
        instructions=round(len(body) / case.weights, 2),
        alu=round(sum(base[name] for name in ALU) / case.weights, 2),
        load_store=round(sum(base[name] for name in LOAD_STORE) / case.weights, 2),
        wide_loads=sum(
            name.startswith(("LDG", "LDGSTS")) and ".128" in name for name in everything
        ),
        spills_in_loop=base["LDL"] + base["STL"],
        is_launchable=fits_default
        or (asks_for_more and static + dynamic <= MAX_SHARED_BYTES[arch]),
        operand=layout.group(1) if layout else "",
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _parse(listing: str) -> tuple[list[str], list[list[str]]]:
    """All instructions, and the bodies of the loops, shortest first."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction.group(1).strip())
    loops = []
    for end, line in enumerate(instructions):
        jump = re.search(r"BRA.*?(\.L_\w+)", line)
        if jump and labels.get(jump.group(1), end + 1) < end:
            loops.append(instructions[labels[jump.group(1)] : end + 1])
    return instructions, sorted(loops, key=len)


def _main_loop(loops: list[list[str]]) -> list[str]:
    """The innermost loop that multiplies."""
    for body in loops:
        names = Counter(_operation(line).split(".")[0] for line in body)
        if names["HMMA"] + names["HGMMA"] or names["FFMA"] > 16:
            return body
    raise ValueError("no loop multiplies")


def _without_padding(instructions: list[str]) -> list[str]:
    return [line for line in instructions if _operation(line) not in ("NOP", "BRA")]


def _operation(line: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]


def over_budget(counts: Counts, budgets: dict[str, dict[str, float]]) -> list[str]:
    """What the counts of one kernel break: its own budget, and what holds for all."""
    name = f"{counts.kernel} on sm_{counts.arch}"
    budget = budgets[counts.kernel]
    problems = [
        f"{name}: {field} is {getattr(counts, field)}, at most {budget[field]} is allowed"
        for field in ("instructions", "alu", "registers", "load_store")
        if field in budget and getattr(counts, field) > budget[field]
    ]
    if counts.spills_in_loop:
        problems.append(f"{name}: {counts.spills_in_loop} spills in the loop")
    if counts.stack_bytes > budget.get("stack_bytes", 0):
        problems.append(f"{name}: {counts.stack_bytes} bytes of spills")
    if counts.wide_loads < budget.get("wide_loads", 0):
        problems.append(f"{name}: {counts.wide_loads} 128-bit loads, {budget['wide_loads']} wanted")
    if not counts.is_launchable:
        shared = f"{counts.static_shared_bytes} + {counts.dynamic_shared_bytes} bytes"
        problems.append(f"{name}: shared memory of {shared} cannot be launched")
    return problems


def main() -> None:
    """Print the table, write it where asked, and fail where a budget is not met."""
    parser = argparse.ArgumentParser(description="Count what the compiled kernels do.")
    parser.add_argument("--arch", type=int, help="only this one, for example 90")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    budgets = json.loads(BUDGETS.read_text())
    results, problems = [], []
    print(f"Triton {triton.__version__}; instructions, ALU and LD/ST are per weight")
    print("| kernel | arch | registers | shared, KB | instructions | ALU | LD/ST | wide loads |")
    print("|---|---|---|---|---|---|---|---|")
    for case in linear_cases() + attention_cases() + row_cases() + choice_cases():
        for arch in case.arches:
            if arguments.arch in (None, arch):
                counts = count(case, arch)
                results.append(asdict(counts))
                problems += over_budget(counts, budgets)
                shared = f"{counts.static_shared_bytes / 1024:.0f} + "
                shared += f"{counts.dynamic_shared_bytes / 1024:.1f}"
                print(
                    f"| {counts.kernel} | sm_{arch} | {counts.registers} | {shared} | "
                    f"{counts.instructions:.2f} | {counts.alu:.2f} | {counts.load_store:.2f} | "
                    f"{counts.wide_loads} |", flush=True,
                )  # fmt: skip
    if arguments.output:
        report = {
            "command": "python -m bench.aot", "kind": "static counts, nothing was run",
            "triton": triton.__version__, "counts": results, "problems": problems,
        }  # fmt: skip
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
