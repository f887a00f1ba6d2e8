"""``python -m benchmarks.codecheck``: what the package says, as a command."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.codecheck import budget, kernels, roofline
from benchmarks.codecheck.machine_code import WIDE, Kernel, occupancy

ROOT = Path(__file__).resolve().parents[2]


def _of_archs(group: Sequence[Kernel], value: Callable[[Kernel], str]) -> str:
    """A value for each architecture, or the one that all have."""
    values = [value(kernel) for kernel in group]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _accesses(widths: dict[int, int]) -> str:
    """``4x128 + 33``: the wide ones by width, and how many others."""
    wide = [f"{count}x{bits}" for bits, count in widths.items() if bits >= WIDE]
    narrow = sum(count for bits, count in widths.items() if bits < WIDE)
    return " + ".join([*wide, *([str(narrow)] if narrow else [])]) or "-"


def kernel_table(found: Sequence[Kernel]) -> Table:
    groups: dict[tuple[str, str, str], list[Kernel]] = {}
    for kernel in found:
        groups.setdefault(kernel.key[:3], []).append(kernel)
    table = Table(
        "kernel",
        *("registers", "spills", "shared", "occupancy %", "in flight %", "loads", "stores", "B/logit"),
        title="machine code; three values: sm_80 / sm_90a / sm_100; accesses: wide instructions x bits + narrow ones",
        caption="occupancy: by registers, block and static shared memory. in flight: bytes a multiprocessor can wait"
        " for, of those that the copy bandwidth of A100 / H100 / B200 takes. B/logit: by design (by wide accesses)",
    )
    gpus = {gpu.arch: gpu for gpu in roofline.GPUS}
    section = None
    for (backend, source, name), group in groups.items():
        if section != (section := (backend, source)):
            table.add_section()
            table.add_row(f"[bold]{backend} {source}")
        moved, wide = roofline.bytes_per_logit(group[0]), roofline.wide_bytes_per_logit(group[0])
        table.add_row(
            name,
            _of_archs(group, lambda k: str(k.registers)),
            _of_archs(group, lambda k: f"{k.stack} B" if k.stack else str(k.local_accesses)),
            _of_archs(group, lambda k: str(k.shared)),
            _of_archs(group, lambda k: f"{100 * occupancy(k):.0f}"),
            _of_archs(group, lambda k: f"{100 * roofline.in_flight(k, gpus[k.arch]):.0f}"),
            _of_archs(group, lambda k: _accesses(k.loads)),
            _of_archs(group, lambda k: _accesses(k.stores)),
            "-" if moved is None else f"{moved:g}" if wide is None else f"{moved:g} ({wide:.3g})",
        )
    return table


def roofline_table(rows: Sequence[roofline.Row]) -> Table:
    table = Table(
        *("logits", "MB"),
        *(f"{gpu.name} {what}" for gpu in roofline.GPUS for what in ("µs", "fwd %", "bwd %")),
        title="upper bounds for the CUDA kernels of cross_entropy, plain: bytes of forward and backward, their time at"
        " the copy bandwidth,\nand the most of it that each way can reach",
        caption=", ".join(f"{gpu.name} {gpu.copy / 1e12:.2f} TB/s" for gpu in roofline.GPUS) + " assumed",
    )
    of_shape: dict[tuple[int, int, str], list[roofline.Row]] = {}
    for row in rows:
        of_shape.setdefault((row.rows, row.classes, row.dtype), []).append(row)
    for (count, classes, dtype), of_gpus in of_shape.items():
        cells = []
        for row in of_gpus:
            cells.append(f"{row.seconds * 1e6:.1f}")
            cells += ["-" if share is None else f"{100 * share:.0f}" for share in (row.forward, row.backward)]
        table.add_row(f"{count}x{classes} {dtype}", f"{of_gpus[0].bytes / 1e6:.1f}", *cells)
    return table


def draws_table(rows: Sequence[roofline.Draws]) -> Table:
    table = Table(
        "kernel", "B/draw", "instructions", *(f"{gpu.name} G/s" for gpu in roofline.GPUS),
        title="upper bounds for sampling: bytes and instructions of a draw, draws a second, by memory and by the issue"
        " of instructions",
        caption="members come from memory, a sector each; tables of classes from the cache. Loops are not counted: to"
        " deal takes more instructions than can be read here",
    )  # fmt: skip
    groups: dict[tuple[str, str], list[roofline.Draws]] = {}
    for row in rows:
        groups.setdefault((row.backend, row.kernel), []).append(row)
    for (backend, name), group in groups.items():
        counts = ["-" if row.instructions is None else f"{row.instructions:.0f}" for row in group]
        count = counts[0] if len(set(counts)) == 1 else " / ".join(counts)
        rates = {row.gpu: f"{row.rate / 1e9:.0f}" for row in group}
        table.add_row(
            f"{backend} {name}", str(group[0].bytes), count, *(rates.get(gpu.name, "-") for gpu in roofline.GPUS)
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecheck", description=kernels.__doc__)
    parser.add_argument("--update", action="store_true", help="rewrite the budget to what was found")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--allow-missing", action="store_true", help="no failure where a compiler is missing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree to check (default: this one)")
    parser.add_argument("--archs", default=",".join(kernels.ARCHS), help="default: %(default)s")
    parser.add_argument("--only", help="of the architectures: the one whose machine code is looked at")
    args = parser.parse_args(argv)
    if args.update and args.only:
        parser.error("--update: expected no --only, the budget is of all architectures")
    started = time.monotonic()
    archs = args.archs.split(",")
    if args.only not in (None, *archs):
        parser.error(f"--only: expected one of {', '.join(archs)}, found {args.only}")
    looked_at = [args.only] if args.only else archs
    root = args.root.resolve()
    path = root / "benchmarks/codecheck_budget.json"
    halves = {"cuda": kernels.cuda(root, archs, looked_at), "triton": kernels.triton(root, looked_at)}
    found = [kernel for half in halves.values() for kernel in half.kernels]
    missing = {name: half.missing for name, half in halves.items() if half.missing is not None}
    compilers = {name: half.compiler for name, half in halves.items() if name not in missing}
    before = budget.load(path)
    if args.update:
        budget.save(path, found, compilers, before)
        before = budget.load(path)
    wrong = budget.check(found, compilers, before, looked_at)
    notes = [
        f"the budget of {name} was made with {before['compilers'][name]}, this is {compiler}: compared loosely"
        for name, compiler in compilers.items()
        if compiler and before["compilers"].get(name, compiler) != compiler
    ]
    rows, draws = roofline.table(found), roofline.draws(found)
    if args.json:
        report = {
            "kernels": [
                asdict(k) | {"occupancy": occupancy(k), "model_bytes_per_logit": roofline.bytes_per_logit(k)}
                for k in found
            ],
            "roofline": [asdict(row) for row in rows],
            "draws": [asdict(row) for row in draws],
            "compilers": compilers,
            "missing": missing,
            "wrong": wrong,
        }
        print(json.dumps(report, indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        console.print(kernel_table(found), roofline_table(rows), *([draws_table(draws)] if draws else []))
    for line in notes:
        print(f"codecheck: {line}", file=sys.stderr)
    for name, reason in missing.items():
        print(f"codecheck: {name.upper()} KERNELS WERE NOT CHECKED: {reason}", file=sys.stderr)
    for line in wrong:
        print(f"codecheck: {line}", file=sys.stderr)
    seconds = time.monotonic() - started
    print(f"codecheck: {len(found)} kernels, {len(wrong)} wrong, in {seconds:.0f} s", file=sys.stderr)
    return 1 if wrong or (missing and not args.allow_missing) else 0


if __name__ == "__main__":
    sys.exit(main())
