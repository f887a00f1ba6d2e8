"""Command line of the benchmark."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ltkernels.bench import (
    peers,
    peers_accuracy_counts,
    peers_crt,
    peers_expert_linear,
    peers_linear,
    plot,
    report,
    runner,
    sampling,
)
from ltkernels.bench.device import Cpu, Cuda
from ltkernels.bench.peers_binary import BINARY_VARIANTS
from ltkernels.bench.peers_distillation import DISTILLATION_VARIANTS
from ltkernels.bench.peers_expert_linear import EXPERT_LINEAR_VARIANTS
from ltkernels.bench.peers_experts import EXPERT_VARIANTS
from ltkernels.bench.peers_lade import LADE_VARIANTS
from ltkernels.bench.peers_linear import LINEAR_SCENARIOS, LINEAR_VARIANTS
from ltkernels.bench.peers_rows import ROW_VARIANTS
from ltkernels.bench.scenarios import SCENARIOS, Scenario, scenario
from ltkernels.bench.targets import judge

EXPERT_SCENARIOS = (scenario("256x1000"), Scenario(128, 8142, "iNaturalist 2018"))
ROW_SCENARIOS = tuple(shape for shape in SCENARIOS if shape.name in ("128x100", "256x1000", "512x8142"))


class _Op(NamedTuple):
    """What can be measured of an op."""

    scenarios: tuple[Scenario, ...]
    variants: dict[str, Any]
    measure: Callable[..., runner.Measurement]


OPS = {
    "cross_entropy": _Op(SCENARIOS, {variant.name: variant for variant in peers.VARIANTS}, runner.measure),
    "row_cross_entropy": _Op(ROW_SCENARIOS, {variant.name: variant for variant in ROW_VARIANTS}, runner.measure),
    "lade": _Op(ROW_SCENARIOS, {variant.name: variant for variant in LADE_VARIANTS}, runner.measure),
    "distillation": _Op(ROW_SCENARIOS, {variant.name: variant for variant in DISTILLATION_VARIANTS}, runner.measure),
    "experts": _Op(EXPERT_SCENARIOS, {variant.name: variant for variant in EXPERT_VARIANTS}, runner.measure),
    "expert_linear": _Op(
        ROW_SCENARIOS, {variant.name: variant for variant in EXPERT_LINEAR_VARIANTS}, peers_expert_linear.measure
    ),
    "linear_cross_entropy": _Op(
        LINEAR_SCENARIOS, {variant.name: variant for variant in LINEAR_VARIANTS}, peers_linear.measure
    ),
    "binary_cross_entropy": _Op(ROW_SCENARIOS, {variant.name: variant for variant in BINARY_VARIANTS}, runner.measure),
    "crt": _Op(
        peers_crt.CRT_SCENARIOS, {variant.name: variant for variant in peers_crt.CRT_VARIANTS}, peers_crt.measure
    ),
    "accuracy_counts": _Op(
        peers_accuracy_counts.ACCURACY_SCENARIOS,
        {variant.name: variant for variant in peers_accuracy_counts.ACCURACY_VARIANTS},
        peers_accuracy_counts.measure,
    ),
    "sampling": _Op(sampling.SCENARIOS, {variant.name: variant for variant in sampling.VARIANTS}, sampling.measure),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ltkernels bench",
        description="Time ltkernels against what it replaces. Forms take turns call by call; ratios are "
        "medians over rounds; results are checked to be equal first. The exit status never depends on a time.",
    )
    parser.add_argument(
        "--op", choices=list(OPS), default="cross_entropy", help="what to measure (default: cross_entropy)"
    )
    parser.add_argument(
        "--scenario",
        type=_list_of(_scenario),
        metavar="NxC,...|NxDxC,...",
        help="default: " + "; ".join(f"{name}: {_shapes(op.scenarios)}" for name, op in OPS.items()),
    )
    parser.add_argument(
        "--variant",
        type=_list_of(str.strip),
        metavar="NAME,...",
        help="default: " + "; ".join(f"{name}: {', '.join(op.variants)}" for name, op in OPS.items()),
    )
    parser.add_argument(
        "--threads",
        type=_list_of(_positive),
        default=(1,),
        metavar="N,...",
        help="thread counts; several run in a process each, because torch.compile builds the count into its code "
        "(default: 1)",
    )
    parser.add_argument("--dtype", choices=list(runner.DTYPES), default="float32", help="logits (default: float32)")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where to run (default: cpu); from a source tree, python -m benchmarks.gpu measures a GPU more closely",
    )
    parser.add_argument(
        "--mode",
        choices=list(runner.MODES),
        default="fwd_bwd",
        help="; ".join(f"{name}: {text}" for name, text in runner.MODES.items()),
    )
    parser.add_argument(
        "--memory",
        choices=list(runner.MEMORY),
        default="default",
        help="; ".join(f"{name}: {text}" for name, (text, _) in runner.MEMORY.items()),
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=4.0,
        help=f"time for the rounds of one loss on one batch, at least {runner.MIN_ROUNDS} rounds (default: 4)",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile (10 to 30 s each)")
    parser.add_argument("--targets", action="store_true", help="say which of the project's targets are reached")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write the records, one JSON object a line")
    parser.add_argument(
        "--plot",
        type=_image,
        metavar="FILE",
        help=f"draw time and ratios into a {', '.join(plot.SUFFIXES)} file (needs matplotlib); with --load, of a run "
        "that was kept",
    )
    parser.add_argument("--load", type=Path, metavar="FILE.jsonl", help="measure nothing, show these records instead")
    parser.add_argument("--records-only", action="store_true", help=argparse.SUPPRESS)
    return parser


def _list_of(one: Any) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(one(part.strip()) for part in text.split(","))

    return parse


def _scenario(text: str) -> Scenario:
    try:
        return scenario(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _image(text: str) -> Path:
    if Path(text).suffix not in plot.SUFFIXES:  # now, not after minutes of measuring
        raise argparse.ArgumentTypeError(f"expected a name that ends in {', '.join(plot.SUFFIXES)}, found {text!r}")
    return Path(text)


def _shapes(shapes: Sequence[Scenario]) -> str:
    return ", ".join(f"{s.name} ({s.source})" for s in shapes)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, found {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds >= 0, found {text!r}")
    return value


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _progress(
    variant: peers.Variant
    | sampling.Variant
    | peers_expert_linear.Variant
    | peers_linear.Variant
    | peers_crt.Variant
    | peers_accuracy_counts.Variant,
    shape: Scenario,
    measurement: runner.Measurement,
) -> None:
    ours = next(record for record in measurement.records if record["peer"] == peers.OURS)
    ratios = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in ours["ratio"].items())
    _say(f"[{ours['threads']}t] {shape.name} {variant.name}: {report.duration(ours['p50_us'])}; {ratios}")
    for name, reason in measurement.refused.items():
        _say(f"[{ours['threads']}t] {shape.name} {variant.name}: REFUSED {name}: {reason}")


def _measure_here(args: argparse.Namespace) -> list[dict[str, Any]]:
    plan = runner.Plan(args.mode, args.dtype, args.seconds, not args.no_compile, memory=args.memory)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a GPU that torch can use, found none")
    with _threads(args.threads[0]):
        op, device = OPS[args.op], Cuda() if args.device == "cuda" else Cpu()
        variants = [op.variants[name] for name in args.variant]
        return runner.run(variants, args.scenario, device, plan, _progress, op.measure)


def _measure_in_children(args: argparse.Namespace) -> list[dict[str, Any]]:
    tunables = runner.MEMORY[args.memory][1]
    environment = os.environ | ({} if tunables is None else {"GLIBC_TUNABLES": tunables})
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for count in args.threads:
            part = Path(folder) / f"{count}.jsonl"
            command = [
                *(sys.executable, "-m", "ltkernels.bench", "--records-only"),
                *(
                    "--op",
                    args.op,
                    "--threads",
                    str(count),
                    "--out",
                    str(part),
                    "--mode",
                    args.mode,
                    "--dtype",
                    args.dtype,
                ),
                *("--memory", args.memory, "--device", args.device),
                *("--seconds", str(args.seconds), "--scenario", ",".join(shape.name for shape in args.scenario)),
                *("--variant", ",".join(args.variant)),
                *(["--no-compile"] if args.no_compile else []),
            ]
            subprocess.run(command, check=True, env=environment | {"OMP_NUM_THREADS": str(count)})
            records += report.read_records(part)
    return records


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Args:
        argv: command line without the program's name; ``None`` takes the process's own.

    Returns:
        0 when everything ran, however fast; 1 when a result of ltkernels is wrong, a file cannot be read or a
        library is missing.

    Raises:
        SystemExit: status 2 for a wrong command line.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    op = OPS[args.op]
    known = {shape.name: shape for shape in op.scenarios}
    args.scenario = tuple(known.get(shape.name, shape) for shape in args.scenario or op.scenarios)
    for shape in args.scenario:
        if bool(shape.d) != bool(op.scenarios[0].d):
            parser.error(f"argument --scenario: expected a shape like {op.scenarios[0].name}, found {shape.name}")
    args.variant = args.variant or tuple(op.variants)
    if unknown := [name for name in args.variant if name not in op.variants]:
        parser.error(f"argument --variant: expected one of {', '.join(op.variants)}, found {unknown[0]!r}")
    if args.op == "sampling" and args.device != "cpu":
        parser.error("--op sampling: measured on the CPU")
    try:
        if args.load is not None:
            records = report.read_records(args.load)
            if not records:
                raise ValueError(f"{args.load}: expected benchmark records, found an empty file")
        elif args.records_only or (len(args.threads) == 1 and args.memory == "default"):
            records = _measure_here(args)
        else:
            records = _measure_in_children(args)
        if args.out is not None:
            report.write_records(records, args.out)
        if not args.records_only:
            _show(records, args.targets)
        if args.plot is not None:
            plot.draw(records, args.plot)
    except subprocess.CalledProcessError as error:
        _say(f"ltkernels bench: the run with {' '.join(error.cmd[6:8])} failed with status {error.returncode}")
        return 1
    except (OSError, ValueError, ImportError, runner.WrongResultError) as error:
        _say(f"ltkernels bench: {error}")
        return 1
    return 0


def _show(records: Sequence[report.Record], with_targets: bool) -> None:
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError("rich is not installed; pip install 'ltkernels[bench]'") from error
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(report.results_table(records))
    if with_targets:
        lines = judge([record for record in records if record["device"] == "cpu"])
        console.print(report.targets_table(lines) if lines else "targets: none is set for these losses and this mode")
