"""The benchmark's stage: compiles ahead in parallel, then measures in one process, and in another after a crash.

Triton and Inductor take longer to compile than all kernels take to run, and keep what they compiled on disk. So several
processes run every form once, side by side and untimed; the one that measures, alone, finds everything compiled.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MOST_PROCESSES = 8  # of a GPU's memory, a case takes a few gigabytes
MOST_RESTARTS = 5


def command(args: argparse.Namespace, seconds: float, *more: str) -> list[str]:
    passed = [*(["--quick"] if args.quick else []), *(["--dry-run"] if args.dry_run else []), "--only", args.only]
    base = [sys.executable, "-m", "benchmarks.gpu.measure", "--records", str(args.records)]
    return [*base, "--seconds", f"{seconds:.0f}", *passed, *more]


def compile_ahead(args: argparse.Namespace, seconds: float) -> None:
    count = min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) // 2))
    shares = [command(args, seconds, "--compile-share", f"{share}/{count}") for share in range(count)]
    running = [subprocess.Popen(share) for share in shares]
    deadline = time.monotonic() + seconds + 20  # a case that was begun may end
    for process in running:
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; 1 when a form of ours failed or a process crashed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=Path, required=True, help="JSON Lines, replaced")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--only", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    begun, failed, skip = time.monotonic(), False, 0
    args.records.parent.mkdir(parents=True, exist_ok=True)
    args.records.unlink(missing_ok=True)
    progress = args.records.with_suffix(".progress")
    progress.write_text("0")
    if not args.dry_run:
        compile_ahead(args, args.seconds * 0.3)
        print(f"compiled ahead in {time.monotonic() - begun:.0f} s", flush=True)
    for _ in range(MOST_RESTARTS):
        left = args.seconds - (time.monotonic() - begun)
        if left < 5:
            print(f"NOTE: no time for the cases from number {skip + 1} on", flush=True)
            break
        status = subprocess.run(command(args, left - 5, "--skip", str(skip))).returncode
        failed |= status != 0
        if status in (0, 1):
            break
        skip = int(progress.read_text()) + 1
        print(f"FAILED: the process ended with status {status} in case {skip}; going on after it", flush=True)
    progress.unlink(missing_ok=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
