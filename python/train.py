"""Trains small classifiers on real long-tailed data with ltkernels: what each method gains, what it costs in accuracy
elsewhere, and what its loss takes of a training step.

All methods and seeds train side by side, each in a process of one thread. Two tables and one sentence are printed, and
for methods of several experts a table of each expert alone; a plot (accuracy.png), everything as JSON (results.json)
and the checkpoints go to --out. A call that was stopped or killed goes on with --resume, and ends with the same result.

  python python/train.py                                seven methods on airport names, two seeds
  python python/train.py --method ce la --seeds 1       two methods, once
  python python/train.py --method ride sade ace         several experts, and what each is good at
  python python/train.py --data tokens                  needs no package with data
  python python/train.py --resume                       the first call again, from its checkpoints
  python python/train.py --sampler square_root          samples drawn by the square root of their class's size
  python python/train.py --method vs --vs-gamma 0.2 --validate
                                                        try a setting without looking at the test part

The exit code is 0, or 1 for a failure, 2 for a wrong option, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # during the imports below Ctrl-C just ends, without a traceback

if importlib.util.find_spec("ltkernels") is None:  # a checkout that nobody has installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if missing := [name for name in ("numpy", "torch", "rich", "matplotlib") if importlib.util.find_spec(name) is None]:
    sys.exit(f"train.py needs {', '.join(missing)}; run: pip install 'ltkernels[demo]' (or make setup)")

import longtail_data
import longtail_plan
import longtail_report as report
from longtail_arguments import at_least_one
from longtail_plan import DEFAULT, SAMPLERS, TITLES, Task, work
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from workers import WorkerFailed, run_all

BACKENDS = ("cpu", "reference")
INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code (argparse itself exits with 2)."""
    args = parse(argv)
    tasks = [
        Task(
            settings=settings,
            checkpoint=args.out / "checkpoints" / f"{settings.method}-seed{settings.seed}.pt",
            resume=args.resume,
            seconds_between_checkpoints=args.checkpoint_every,
        )
        for settings in longtail_plan.runs(
            args.data,
            args.method,
            args.seeds,
            epochs=args.epochs,
            vs_gamma=args.vs_gamma,
            backend=args.backend,
            validate=args.validate,
            sampler=args.sampler,
        )
    ]
    errors = Console(stderr=True, soft_wrap=True)
    kept = f"Checkpoints are kept in {args.out / 'checkpoints'}: the same call with --resume goes on from them."
    try:
        train_and_report(args, tasks)
    except KeyboardInterrupt:
        errors.print(f"Stopped. {kept}", highlight=False)
        return INTERRUPTED
    except (OSError, longtail_data.MissingPackageError) as error:
        errors.print(f"train.py: {error}", highlight=False, markup=False)
        return 1
    except WorkerFailed as failure:
        if failure.details:
            errors.print(failure.details, highlight=False, markup=False, end="")
        errors.print(f"train.py: {tasks[failure.task].title} failed: {failure}", highlight=False, markup=False)
        errors.print(f"The other runs were stopped. {kept}", highlight=False)
        return 1
    return 0


def train_and_report(args: argparse.Namespace, tasks: list[Task]) -> None:
    """Trains what is not trained yet, and prints and writes what came of it."""
    began = time.monotonic()
    console = Console() if sys.stdout.isatty() else Console(width=120)
    args.out.mkdir(parents=True, exist_ok=True)  # a folder that can not be written should fail now, not after training
    data = longtail_data.load(args.data)
    part = longtail_data.split(data, 0, validate=args.validate)
    console.print(
        f"{data.name}: {data.task}; {len(part.train)} samples to train, {len(part.test)} to "
        f"{'validate, all from the training part' if args.validate else 'test'}; "
        f"{data.num_classes} classes of {part.class_counts.min()} to {part.class_counts.max()} training samples",
        highlight=False,
        soft_wrap=True,
    )
    if not args.resume:
        for task in tasks:
            task.checkpoint.unlink(missing_ok=True)
    display = Display(console)
    with display:
        results = run_all(
            tasks, work, args.workers, lambda kind, index, payload: display.show(kind, index, tasks, payload)
        )
    summary = report.collect(data, results, args.method)
    summary["arguments"] = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    summary["seconds"] = time.monotonic() - began
    report.write_json(args.out / "results.json", summary)
    report.draw_plot(args.out / "accuracy.png", summary)
    report.print_tables(console, summary)
    console.print(
        f"{len(tasks)} {'run' if len(tasks) == 1 else 'runs'} in {summary['seconds']:.0f} s; "
        f"{args.out / 'accuracy.png'}, {args.out / 'results.json'}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(report.conclusion(summary), highlight=False, soft_wrap=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data", choices=list(longtail_data.LOADERS), default="airports", help="data set (default: %(default)s)"
    )
    parser.add_argument(
        "--method",
        choices=list(TITLES),
        nargs="+",
        action="extend",
        metavar="METHOD",
        help=f"one or more of {', '.join(TITLES)}; may be given several times (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default=SAMPLERS[0],
        metavar="STRATEGY",
        help=f"the samples of an epoch: one of {', '.join(SAMPLERS)} (default: %(default)s, every sample once)",
    )
    parser.add_argument(
        "--epochs", type=at_least_one, help="epochs a run, LFME a stage (default: the data set's recipe)"
    )
    parser.add_argument("--seeds", type=at_least_one, default=2, help="runs of each method (default: %(default)s)")
    parser.add_argument(
        "--vs-gamma",
        type=_not_negative,
        default=longtail_plan.VS_GAMMA,
        metavar="GAMMA",
        help="exponent of VS (default: %(default)s)",
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="put the test part aside, and evaluate on a share of the training part: to choose settings",
    )
    parser.add_argument("--backend", choices=BACKENDS, help="backend of ltkernels (default: the fastest there is)")
    parser.add_argument(
        "--workers", type=at_least_one, default=_cores(), help="processes (default: the cores, %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of results and checkpoints (default: runs/demo/DATA; runs/validate/DATA with --validate)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    parser.add_argument(
        "--checkpoint-every",
        type=_not_negative,
        default=10.0,
        metavar="SECONDS",
        help="time between checkpoints of a run; 0 is every step (default: %(default)g)",
    )
    args = parser.parse_args(argv)
    args.method = [method for method in TITLES if method in (args.method or DEFAULT)]
    args.out = args.out or Path("runs") / ("validate" if args.validate else "demo") / args.data
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: expected a folder, found the file {args.out}")
    return args


def _not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number >= 0, found {text!r}")
    return number


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Display:
    """Progress of the runs: bars on a terminal, a line at each start and end anywhere else."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar_of: dict[int, Any] = {}
        self.began: dict[int, float] = {}

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def show(self, kind: str, index: int, tasks: list[Task], payload: Any) -> None:
        """Takes the events of ``workers.run_all``."""
        if kind == "stopping":
            self._line("Stopping: the runs under way write their checkpoints (Ctrl-C again ends them at once).")
            return
        task = tasks[index]
        if kind == "started":
            self.began[index] = time.monotonic()
            self.bar_of[index] = self.bars.add_task(task.title, total=None, note="")
            if self.bars.disable:
                self._line(f"{task.title}: run {index + 1} of {len(tasks)} starts")
        elif kind == "progress":
            note = f"loss {payload['loss']:.3f}"
            self.bars.update(self.bar_of[index], completed=payload["step"], total=payload["total"], note=note)
        else:
            note = f"balanced {100 * payload['outcomes'][task.settings.method]['balanced']:.1f} %"
            self.bars.update(self.bar_of[index], completed=1, total=1, note=note)
            if self.bars.disable:
                self._line(f"{task.title}: {note}, {time.monotonic() - self.began[index]:.1f} s")

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    sys.exit(main())
