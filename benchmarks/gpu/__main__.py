"""Command line of the GPU suite; the package's docstring says what it does."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.stages import ROOT, STAGES, Outcome, Settings, run_all

RESULTS = ROOT / "benchmarks" / "results"
MOST_LINES = 12  # of one stage in the summary


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Builds, tests and measures everything that needs a GPU, from a source tree, installing nothing.",
        epilog="stages: " + "; ".join(f"{stage.name}: {stage.about}" for stage in STAGES),
    )
    parser.add_argument("--stages", default=",".join(names), help=f"of {','.join(names)} (default: all)")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all stages together (default: 570)")
    parser.add_argument("--out", type=Path, help="where records and plot go (default: benchmarks/results)")
    parser.add_argument("--wheels", type=Path, help="folder with pure-Python wheels of peers, liger_kernel for one")
    parser.add_argument("--only", default="", help="regular expression on the benchmark's cases, '8142 ce$' for one")
    parser.add_argument("--quick", action="store_true", help="a few cases and tests; writes into build/gpu by default")
    parser.add_argument("--dry-run", action="store_true", help="all Python on the CPU, tiny; measures nothing")
    parser.add_argument("--load", type=Path, metavar="FILE", help="run nothing, show these records")
    parser.add_argument("--winners", type=Path, metavar="FILE", help="run nothing, print the faster backends as Python")
    parser.add_argument("--plot", type=Path, metavar="IMAGE", help="with --load: draw them")
    parser.add_argument("--no-tables", action="store_true", help="with --load: no tables")
    args = parser.parse_args(argv)
    args.stages = [name.strip() for name in args.stages.split(",")]
    if unknown := set(args.stages) - set(names):
        parser.error(f"--stages: expected some of {','.join(names)}, found {','.join(sorted(unknown))}")
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"--wheels: expected a folder, found {args.wheels}")
    if args.out is None:  # only a whole run may replace results
        part = "gpu-dry-run" if args.dry_run else "gpu" if args.quick or args.only else None
        args.out = RESULTS if part is None else ROOT / "build" / part
    if args.dry_run and args.out.resolve().is_relative_to(RESULTS):
        parser.error("--dry-run: its records are no results; choose another --out")
    return args


def gpu_name() -> str | None:
    """The GPU's name, asked without torch: the stages load that, each in its own process."""
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = found.stdout.strip().splitlines() if found.returncode == 0 else []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return names[int(visible) % len(names) if visible.isdigit() else 0] if names else None


def slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def show(outcomes: Sequence[Outcome]) -> None:
    print("\n=== summary")
    for outcome in outcomes:
        how = f"FAILED: {outcome.reason}" if outcome.failed else "well"
        print(f"{outcome.stage:<9} {how:<40} {outcome.seconds:.0f} s")
    for outcome in outcomes:
        for line in outcome.lines[:MOST_LINES]:
            print(f"  {outcome.stage}: {line[:300]}")
        if len(outcome.lines) > MOST_LINES:
            print(f"  {outcome.stage}: and {len(outcome.lines) - MOST_LINES} lines more above")


def show_records(path: Path, tables: bool, image: Path | None) -> int:
    """Tables and plot of a result file; 1 if it cannot be read."""
    from benchmarks.gpu import summary
    from ltkernels.bench import report

    try:
        records = report.read_records(path)
    except (OSError, ValueError) as error:
        print(f"FAILED: {error}")
        return 1
    if not records:
        print(f"NOTE: {path} holds no records")
        return 0
    if tables:
        print(summary.everything(records))
    if image is not None:
        try:
            summary.plot(records, image)
        except ImportError:
            print("NOTE: matplotlib is not here: no plot")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; 1 if one of them failed, or the tables of a file that cannot be read were asked for."""
    args = parse(argv)
    if args.winners is not None:
        from benchmarks.gpu import summary
        from ltkernels.bench import report

        print(summary.winners(report.read_records(args.winners)), end="")
        return 0
    if args.load is not None:
        return show_records(args.load, not args.no_tables, args.plot)
    name = "dry-run" if args.dry_run else gpu_name()
    if name is None:
        print("no GPU here (nvidia-smi finds none); --dry-run shows that the suite itself runs", file=sys.stderr)
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    records = args.out.resolve() / f"{slug(name)}.jsonl"
    settings = Settings(args.out.resolve(), records, args.wheels, args.only, args.quick, args.dry_run)
    outcomes = run_all([stage for stage in STAGES if stage.name in args.stages], settings, args.budget)
    if "bench" in args.stages and records.exists():
        print()
        show_records(records, tables=True, image=None)
    show(outcomes)
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
