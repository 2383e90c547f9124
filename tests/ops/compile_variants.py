"""Compiles registered kernel variants for chips that are not here; run as a process of its own, uninterpreted.

    python tests/ops/compile_variants.py [--all] [MODULE ...]

Every variant is compiled for the oldest chip that takes its dtype, and the representative ones for every other chip;
with ``--all``, all for every chip (some minutes). Prints one JSON object: how many forms were compiled for each chip,
every failure, and of each form the most shared memory and, on NVIDIA chips, the most loads of single bytes.
"""

from __future__ import annotations

import collections
import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pantheraml.kernels import _variants

KIB = 1024
MAX_THREADS = 1024
# Shared memory that one program may take: CUDA C++ Programming Guide, table "Technical Specifications per Compute
# Capability" (a block's maximum), and AMD's local data share.
CUDA_SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
AMD_SHARED = {"gfx90a": 64, "gfx942": 64}


def targets(variant: _variants.Variant, everything: bool) -> list[tuple[str, GPUTarget, int]]:
    """Chips to compile a variant for: name, target and limit of shared memory in bytes."""
    chosen = []
    widely = everything or variant.representative
    if variant.minimum is not None:
        oldest = min(chip for chip in CUDA_SHARED if chip >= variant.minimum)
        for chip, shared in CUDA_SHARED.items():
            if chip == oldest or (chip > oldest and widely):
                chosen.append((f"sm_{chip}", GPUTarget("cuda", chip, 32), shared * KIB))
    for chip in variant.amd:
        if widely or variant.minimum is None:
            chosen.append((chip, GPUTarget("hip", chip, 64), AMD_SHARED[chip] * KIB))
    return chosen


def source_of(variant: _variants.Variant) -> ASTSource:
    """The variant as Triton's compiler takes it, pointers and sizes being multiples of 16, as of real models.

    That is the form with wide loads and asynchronous copies, which takes the most shared memory.
    """
    names = variant.kernel.arg_names
    given = {**variant.arguments, **dict.fromkeys(variant.constants, "constexpr")}
    if set(given) != set(names):
        raise ValueError(f"{variant.name}: arguments differ from the kernel's: {sorted(set(given) ^ set(names))}")
    signature = {name: given[name] for name in names}
    plain = {p.name for p in variant.kernel.params if p.do_not_specialize}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in plain and (signature[name].startswith("*") or signature[name] in ("i32", "i64"))
    }
    return ASTSource(variant.kernel, signature, dict(variant.constants), aligned)


def main(arguments: list[str]) -> int:
    """Compile, print the summary, and return the number of failures."""
    everything = "--all" in arguments
    modules = [argument for argument in arguments if argument != "--all"] or _variants.MODULES
    compiled: collections.Counter[str] = collections.Counter()
    failures = []
    memory: collections.Counter[str] = collections.Counter()
    single_bytes: collections.Counter[str] = collections.Counter()
    for variant in _variants.collect(modules):
        for chip, target, limit in targets(variant, everything):
            options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
            try:
                form = triton.compile(source_of(variant), target=target, options=options)
            except Exception as error:  # noqa: BLE001 - every failure is reported by name
                failures.append(f"{variant.name} on {chip}: {type(error).__name__}: {str(error)[-400:]}")
                continue
            compiled[chip] += 1
            shared = form.metadata.shared
            memory[variant.name] = max(memory[variant.name], shared)
            loads = len(re.findall(r"\bld\.global\S*\.[bus]8\b", form.asm.get("ptx", "")))
            single_bytes[variant.name] = max(single_bytes[variant.name], loads)
            if variant.num_warps * target.warp_size > MAX_THREADS:
                failures.append(f"{variant.name} on {chip}: {variant.num_warps} warps are too many threads")
            if shared > limit:
                failures.append(f"{variant.name} on {chip}: {shared} bytes of shared memory, the chip has {limit}")
    report = {"compiled": compiled, "failures": failures, "shared": memory, "single_bytes": single_bytes}
    print(json.dumps(report))
    return len(failures)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
