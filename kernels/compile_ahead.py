"""Ahead-of-time compilation of every kernel as the launchers start it, without a GPU, and the resources it takes.

    python -m titan_yulan.kernels.compile_ahead --target sm_90            print the table
    python -m titan_yulan.kernels.compile_ahead --target sm_90 --write    and rewrite the golden file of this Triton
                                                                          (for 3.7.1 also the table in docs/kernels.md)

What comes out depends on the version of Triton and of the assembler it brings, so a golden file belongs to one version.
The numbers are read from the machine code with the disassembler that Triton's wheel bundles.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titan_yulan.kernels.variant import Variant

# A file of this folder each, with a function `variants(hidden, intermediate, vocab)`.
OPERATIONS = ("packed_linear", "rms_norm", "add_rms_norm", "swiglu", "cross_entropy", "linear_cross_entropy")

# Hidden size, intermediate size and vocabulary of the model presets.
SIZES = {
    "debug": (192, 512, 8192),
    "yulan_mini_2b": (1920, 4800, 99000),
    "llama3_8b": (4096, 14336, 128256),
}

# Bytes of shared memory that one block may use.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}

# In Triton's intermediate language, after pipelining.
_SCALAR_ACCESS = re.compile(r"\b(?:tt\.load|tt\.store|ttg\.async_copy_global_to_local) .*: (?:tensor<1x)?!tt\.ptr<")

_ROOT = Path(__file__).resolve().parent.parent
GOLDEN_FOLDER = _ROOT / "tests/kernels/resources"
PAGE = _ROOT / "docs/kernels.md"


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. `loads` and `stores` count the accesses to global memory by bytes a thread."""

    registers: int
    spills: int  # loads and stores of local memory
    stack_bytes: int
    float64: int  # instructions
    atomics: int  # instructions
    loads: dict[str, int]
    stores: dict[str, int]
    scalar_accesses: int  # in the program, of single elements: these cannot be wide
    shared_bytes: int
    warps: int

    @property
    def narrow_accesses(self) -> int:
        """Global accesses of fewer than 16 bytes beyond those of single elements."""
        narrow = sum(n for counts in (self.loads, self.stores) for width, n in counts.items() if int(width) < 16)
        return max(0, narrow - self.scalar_accesses)


def compile_variant(variant: Variant, target: str) -> Resources:
    """Compile one variant for `target` ("sm_80", "sm_90", ...) and read its machine code.

    Raises:
        RuntimeError: in a process that runs kernels in Triton's interpreter, which replaces the compiler.
        ValueError: an argument of the kernel has neither a type nor a value, or one of another name has.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled while TRITON_INTERPRET=1 is set; unset it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    given = [*variant.types, *variant.constants]
    if sorted(names) != sorted(given):
        raise ValueError(f"variant {variant.name!r}: the kernel's arguments are {names}, the variant gives {given}")
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    attributes: dict[Any, Any] = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible_by_16}
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, dict(variant.constants), attributes),
        target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
    return _read(compiled)


def _read(compiled: Any) -> Resources:
    usage, code = _disassemble(compiled.asm["cubin"])
    number = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, flags=re.MULTILINE))
    return Resources(
        registers=number["REG"],
        spills=sum(n for opcode, n in opcodes.items() if re.match(r"(LDL|STL)\b", opcode)),
        stack_bytes=number["STACK"],
        float64=sum(n for opcode, n in opcodes.items() if re.match(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b", opcode)),
        atomics=sum(n for opcode, n in opcodes.items() if re.match(r"(ATOM|ATOMG|RED|REDG)\b", opcode)),
        loads=_widths(opcodes, r"(LDG|LDGSTS)\b"),
        stores=_widths(opcodes, r"STG\b"),
        scalar_accesses=len(re.findall(_SCALAR_ACCESS, compiled.asm["ttgir"])),
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """The assembler's note of resources and the machine code as text."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        # Their warnings (about the format of newer files) would bury the table.
        usage, code = (
            subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
            for command in (
                [tools / "cuobjdump", "--dump-resource-usage", path],
                [tools / "nvdisasm", "-c", "--no-dataflow", path],
            )
        )
    return usage.split("Function", 1)[1], code


def _widths(opcodes: Counter[str], pattern: str) -> dict[str, int]:
    """Bytes a thread moves per instruction -> how many such instructions, the widest first."""
    widths: Counter[int] = Counter()
    for opcode, n in opcodes.items():
        if re.match(pattern, opcode):
            size = re.search(r"\.(?:[US](8|16)|(64|128))(?=\.|$)", opcode)
            widths[int(size[1] or size[2]) // 8 if size else 4] += n
    return {str(width): widths[width] for width in sorted(widths, reverse=True)}


def variants_of(operation: str, size: str) -> list[Variant]:
    """What `operation` launches on a GPU for the model size `size`, a key of `SIZES`."""
    return importlib.import_module(f"titan_yulan.kernels.{operation}").variants(*SIZES[size])


def table(
    target: str, sizes: Sequence[str] = tuple(SIZES), operations: Sequence[str] = OPERATIONS
) -> dict[str, dict[str, Any]]:
    """Size -> "operation.variant" -> the fields of `Resources`, and whether the kernel is `bulk`."""
    return {
        size: {f"{operation}.{variant.name}": row for operation, variant, row in _rows(target, size, operations)}
        for size in sizes
    }


def _rows(target: str, size: str, operations: Sequence[str]) -> Iterator[tuple[str, Variant, dict[str, Any]]]:
    for operation in operations:
        for variant in variants_of(operation, size):
            resources = compile_variant(variant, target)
            row = asdict(resources) | {"narrow_accesses": resources.narrow_accesses, "bulk": variant.bulk}
            yield operation, variant, row


def golden_file(target: str) -> Path:
    """Where the table for `target` and the installed Triton is kept (in a checkout; not in an installed package)."""
    import triton

    return GOLDEN_FOLDER / f"triton-{triton.__version__}.{target}.json"


def page_with_table(page: str, result: dict[str, dict[str, Any]], target: str, version: str) -> str:
    """`page` with the table that its markers ask for, if that is of this target and version of Triton."""
    pattern = re.compile(rf"(<!-- resources: (\w+) {target} {re.escape(version)} -->\n).*?(?=<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}\n{markdown(result[match[2]])}\n\n", page)


def _one_kernel_a_line(result: dict[str, dict[str, Any]]) -> str:
    """JSON that a reviewer can compare line by line."""
    sizes = []
    for size, rows in result.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        sizes.append(f" {json.dumps(size)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(sizes) + "\n}\n"


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The rows of one size as a table."""

    def widths(counts: dict[str, int]) -> str:
        return ", ".join(f"{n} × {width} B" for width, n in counts.items()) or "none"

    lines = [
        "| kernel | warps | registers | spills | loads | stores | shared memory |",
        "|---|---:|---:|---:|---|---|---:|",
    ]
    for name, row in rows.items():
        cells = [f"`{name}`", row["warps"], row["registers"], row["spills"], widths(row["loads"])]
        cells += [widths(row["stores"]), f"{row['shared_bytes']:,} B"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m titan_yulan.kernels.compile_ahead", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", choices=sorted(SHARED_LIMIT), required=True)
    parser.add_argument("--size", choices=list(SIZES), action="append", help="only this size (can be repeated)")
    parser.add_argument("--operation", choices=OPERATIONS, action="append", help="only this one (can be repeated)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--write", action="store_true", help="rewrite the golden file (of all sizes and operations)")
    options = parser.parse_args(arguments)
    if options.write and (options.size or options.operation):
        parser.error("--write writes the whole table: leave out --size and --operation")
    result = table(options.target, options.size or tuple(SIZES), options.operation or OPERATIONS)
    if options.write:
        import triton

        path = golden_file(options.target)
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page_with_table(page, result, options.target, triton.__version__), encoding="utf-8")
        path.write_text(_one_kernel_a_line(result), encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
    if options.json:
        print(json.dumps(result))
        return
    import triton

    for size, rows in result.items():
        print(f"{size} {SIZES[size]}, {options.target}, Triton {triton.__version__}\n\n{markdown(rows)}\n")


if __name__ == "__main__":
    main()
