"""What the machine code may be: the checked-in budget, and what a kernel breaks of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.codecheck.machine_code import WIDE, Kernel

SLACK = 4
"""Registers that a kernel may use beyond its budget."""

OTHER_COMPILER_SLACK = 24
"""The same where another version compiled than the one that the budget was made with. Counts of accesses are then not
compared either, as it may unroll otherwise: only that there still are wide ones."""

Entry = dict[str, int]
Budget = dict[str, Any]


def entry(kernel: Kernel) -> Entry:
    return {
        "registers": kernel.registers,
        "wide_loads": kernel.wide_loads,
        "wide_stores": kernel.wide_stores,
    }


OTHER_COMPILER_STACK = 16
"""Bytes of stack that such another version may need, with as many accesses: Triton 3.7 keeps a scalar there now and
then, outside of loops."""


def faults(kernel: Kernel, same_compiler: bool = True) -> list[str]:
    """What is wrong with a kernel whatever the budget says: no update of the budget makes it right."""
    found = []
    allowed = 0 if same_compiler else OTHER_COMPILER_STACK
    if kernel.stack > allowed or kernel.local_accesses > allowed:
        found.append(f"spills: {kernel.stack} bytes of stack, {kernel.local_accesses} accesses of local memory")
    if kernel.float_atomics:
        found.append(f"{kernel.float_atomics} atomics on floating-point numbers: sums depend on the order of blocks")
    for what, declared, there in (
        ("loads", kernel.least_wide_loads, kernel.wide_loads),
        ("stores", kernel.least_wide_stores, kernel.wide_stores),
    ):
        if there < declared:
            found.append(f"{there} {what} of {WIDE} bits or more, its module declares {declared}")
    return found


def excesses(kernel: Kernel, budget: Entry, same_compiler: bool) -> list[str]:
    """What a kernel breaks of its entry in the budget."""
    found = []
    slack = SLACK if same_compiler else OTHER_COMPILER_SLACK
    if kernel.registers > budget["registers"] + slack:
        found.append(f"{kernel.registers} registers, budget {budget['registers']} and {slack} of slack")
    for what, there, wanted in (
        ("loads", kernel.wide_loads, budget["wide_loads"]),
        ("stores", kernel.wide_stores, budget["wide_stores"]),
    ):
        if there < (wanted if same_compiler else min(wanted, 1)):
            found.append(f"{there} {what} of {WIDE} bits or more, budget {wanted}")
    return found


def check(
    kernels: Iterable[Kernel],
    compilers: Mapping[str, str],
    budget: Budget,
    archs: Sequence[str] | None = None,
) -> list[str]:
    """All that is wrong, a line each.

    Args:
        kernels: what was found, of the backends in `compilers` only.
        compilers: for each backend that was looked at, the compiler with its version.
        budget: as :func:`load` gives it.
        archs: the architectures that were looked at; None: all.
    """
    wrong = []
    entries = {
        (backend, source, name, arch): of_arch
        for backend in compilers
        for source, names in budget.get(backend, {}).items()
        for name, of_name in names.items()
        for arch, of_arch in of_name.items()
        if archs is None or arch.removeprefix("sm_") in archs
    }
    for kernel in kernels:
        allowed = entries.pop(kernel.key, None)
        where = f"{kernel.backend} {kernel.source} {kernel.name} {kernel.arch}"
        same_compiler = budget["compilers"].get(kernel.backend) == compilers[kernel.backend]
        reasons = faults(kernel, same_compiler)
        if allowed is None:
            reasons.append("not in the budget: look at it, then --update")
        else:
            reasons += excesses(kernel, allowed, same_compiler)
        wrong += [f"{where}: {reason}" for reason in reasons]
    gone = "in the budget and not in the tree: --update takes it out"
    return wrong + [f"{' '.join(key)}: {gone}" for key in entries]


def load(path: Path) -> Budget:
    budget: Budget = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    budget.setdefault("compilers", {})
    return budget


def save(path: Path, kernels: Iterable[Kernel], compilers: Mapping[str, str], before: Budget) -> None:
    """Writes the budget that these kernels keep exactly, a line for each kernel; other backends' stay as they were."""
    backends: Budget = {name: before[name] for name in ("cuda", "triton") if name in before and name not in compilers}
    for kernel in kernels:
        of_source = backends.setdefault(kernel.backend, {}).setdefault(kernel.source, {})
        of_source.setdefault(kernel.name, {})[kernel.arch] = entry(kernel)
    used = {name: compiler for name, compiler in compilers.items() if compiler}
    lines = [f' "compilers": {json.dumps(dict(sorted((before["compilers"] | used).items())))}']
    for backend in sorted(backends):
        sources = [
            f"  {json.dumps(source)}: {{\n"
            + ",\n".join(f"   {json.dumps(name)}: {json.dumps(archs)}" for name, archs in names.items())
            + "\n  }"
            for source, names in backends[backend].items()
        ]
        lines.append(f' "{backend}": {{\n' + ",\n".join(sources) + "\n }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
