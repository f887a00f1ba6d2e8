"""Checks and times one case after the other and writes a record a form and mode. ``bench`` runs this in a process.

The rules of ltkernels/bench/runner.py hold: forms take turns, ratios are within a round, nothing is timed that was not
held against float64. In addition here:

* **kernel** times are device times of graph replays over rotating copies of the inputs, so that no call finds its data
  in the L2 cache (where a record says ``cold``; batches of a megabyte are in the cache in any use). What a graph
  computed is compared with the truth as well: its results are overwritten with NaN, then it is replayed.
* **kernel_hot** repeats one copy, **kernel_fwd** the forward alone.
* **host** is one ordinary call until its results exist, **host_scaled** the same with another upstream gradient than 1.
* What no graph can hold, because it waits for the device, has as kernel time the sum of its kernels' times in the
  profiler: without gaps, so in its favour.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.gpu.ops import OPS
from benchmarks.gpu.table import CALL, COPY, FORWARD, SCALED, STEP, Case, Form, Work
from benchmarks.gpu.timing import Asked, DryTimer, GpuTimer, HostTimer, Rotation, Timer
from ltkernels.bench import peers, runner

MODES = {
    "kernel": "device time, forward and backward, inputs not in the cache",
    "kernel_hot": "the same with inputs in the cache",
    "kernel_fwd": "device time, forward alone, inputs not in the cache",
    "host": "an ordinary call, forward and backward, until its results exist",
    "host_scaled": "the same with an upstream gradient of 1/1024",
}
ROUNDS = {"kernel": (0.08, 100), "kernel_hot": (0.05, 60), "kernel_fwd": (0.05, 60), "host": (0.15, 150)}
BASES = (peers.EAGER, peers.COMPILE, "liger", COPY)
PROFILED_CALLS = 8


class LostDeviceError(Exception):
    """The process cannot use the GPU any more."""


def relative_errors(results: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    return [runner.relative_l2(result, exact) for result, exact in zip(results, truth, strict=True)]


def spoil(results: Sequence[Tensor]) -> None:
    for result in results:
        result.fill_(torch.nan if result.is_floating_point() else torch.iinfo(result.dtype).min)


def verdict(errors: Sequence[float], tolerance: float) -> str | None:
    if all(error <= tolerance for error in errors):  # not so for NaN
        return None
    return f"differs from float64 by {', '.join(f'{error:.1e}' for error in errors)}, allowed {tolerance:.0e}"


class Measurement:
    """One case: which forms take part, and their records."""

    launches: ClassVar[dict[tuple[Any, ...], int | None]] = {}

    def __init__(self, work: Work, timer: Timer, where: dict[str, Any]) -> None:
        self.work, self.timer, self.where = work, timer, where
        self.refused: dict[str, str] = dict(work.absent)
        self.failed: dict[str, str] = {}
        self.errors: dict[str, list[float]] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    @property
    def forms(self) -> list[Form]:
        return [f for f in self.work.forms if f.name not in self.refused and f.name not in self.failed]

    def attempt(self, form: Form, what: str, run: Callable[[], Any]) -> Any:
        """``run()``, or None when it raised and the form is out."""
        try:
            with form.asking():
                return run()
        except Exception as error:  # whatever a peer raises is a reason to go on without it
            try:
                self.timer.synchronise()
            except Exception:  # the process cannot use the GPU any more
                raise LostDeviceError(f"{form.name}: {what}: {error}") from error
            first = (str(error).strip() or "no message").splitlines()[0]
            self.drop(form, f"{what}: {type(error).__name__}: {first}")
            return None

    def drop(self, form: Form, reason: str) -> None:
        (self.failed if form.ours else self.refused)[form.name] = reason

    # --- Equality ---

    def check(self) -> None:
        """Runs every form twice, the second time most likely into the spoilt memory of the first."""
        for form in self.forms:
            if form.name == COPY or form.random:
                continue

            def twice(form: Form = form) -> list[float]:
                spoil(form.steps[STEP](self.work.copy(self.work.inputs)))
                return relative_errors(form.steps[STEP](self.work.copy(self.work.inputs)), self.work.truth)

            errors = self.attempt(form, "does not run", twice)
            if errors is None:
                continue
            self.errors[form.name] = errors
            if wrong := verdict(errors, self.work.tolerance):
                self.drop(form, wrong)

    # --- Kernel time ---

    def _calls(self, form: Form, step: str, rotation: Rotation, copies: list[Any]) -> tuple[list[Any], list[Any]]:
        """The calls of a graph, and where their results are kept, so that those rotate through memory too."""
        if form.overwrites:
            copies = [self.work.copy(self.work.inputs) for _ in copies]
        kept: list[Any] = [None] * rotation.copies

        def call(place: int) -> None:
            kept[place] = None
            kept[place] = form.steps[step](copies[place])

        return [partial(call, number % rotation.copies) for number in range(rotation.calls)], kept

    def kernel(self, mode: str, step: str, rotation: Rotation) -> Iterator[dict[str, Any]]:
        copies = [self.work.copy(self.work.inputs) for _ in range(rotation.copies)]
        replays: dict[str, Any] = {}
        times: dict[str, list[float]] = {}
        for form in [form for form in self.forms if step in form.steps]:
            calls, kept = self._calls(form, step, rotation, copies)
            if not form.captured:
                if step == STEP and (seconds := self._profiled(form, calls)) is not None:
                    times[form.name] = [seconds]
                continue
            replay = self.attempt(form, "no graph holds it", partial(self.timer.repeat, calls, form))
            if replay is None:
                continue
            if step == STEP and form.name != COPY and not form.overwrites and not form.random:
                spoil([result for results in kept for result in results])
                replay()
                self.timer.synchronise()
                found = (verdict(relative_errors(results, self.work.truth), self.work.tolerance) for results in kept)
                if wrong := next(filter(None, found), None):
                    self.drop(form, f"in a graph: {wrong}")
                    continue
            replays[form.name] = replay
        seconds, most = ROUNDS[mode]
        samples = runner.interleave(replays, self.timer, runner.Plan(seconds=seconds, max_rounds=most))
        times |= {name: [s.seconds / rotation.calls for s in taken] for name, taken in samples.items()}
        yield from self._records(mode, step, times, {"cold": rotation.cold and mode != "kernel_hot"})

    def _profiled(self, form: Form, calls: list[Any]) -> float | None:
        calls = calls[:PROFILED_CALLS]

        def run() -> None:
            for call in calls:
                call()

        self.attempt(form, "does not run", run)
        found = self.attempt(form, "the profiler stops it", partial(self.timer.kernels, run))
        return None if not found else sum(seconds for _, seconds in found) / len(calls)

    # --- Host time ---

    def host(self, mode: str, step: str) -> Iterator[dict[str, Any]]:
        calls: dict[str, Asked] = {}
        for form in [form for form in self.forms if step in form.steps]:
            inputs = self.work.copy(self.work.inputs) if form.overwrites else self.work.inputs
            calls[form.name] = Asked(partial(form.steps[step], inputs), form)
        seconds, most = ROUNDS["host"]
        timer = HostTimer(self.timer.device)
        samples = runner.interleave(calls, timer, runner.Plan(seconds=seconds, max_rounds=most))
        yield from self._records(mode, step, {name: [s.seconds for s in taken] for name, taken in samples.items()}, {})

    def describe(self, rotation: Rotation) -> None:
        """Launches, waits and peak memory of an ordinary call."""
        for form in self.forms:
            inputs = self.work.copy(self.work.inputs)
            run = partial(form.steps[STEP], inputs)
            kind = (self.work.case.op, self.work.case.variant, self.work.case.dtype, form.name, rotation.copies > 2)
            if kind not in self.launches:  # a session of the profiler takes long
                found = self.attempt(form, "the profiler stops it", partial(self.timer.kernels, run))
                self.launches[kind] = None if found is None else len(found)
            waits = self.attempt(form, "the debug mode stops it", partial(self.timer.synchronisations, run))
            peak = self.attempt(form, "memory", partial(self.timer.device.peak_bytes, run))
            self.facts[form.name] = {
                "launches": self.launches[kind],
                "syncs": waits,
                "peak_bytes": peak,
                "peak_mb": None if peak is None else round(peak / 2**20, 4),
            }

    # --- Records ---

    def _records(
        self, mode: str, step: str, times: dict[str, list[float]], more: dict[str, Any]
    ) -> Iterator[dict[str, Any]]:
        work, case = self.work, self.work.case
        bytes_moved = work.model_bytes.get(step, work.model_bytes[STEP])
        for form in [form for form in self.forms if form.name in times]:
            taken = times[form.name]
            p25, p50, p75 = runner.quartiles(taken) if len(taken) > 1 else taken * 3
            ratios = {name: round(_ratio(taken, times[name]), 4) for name in (*BASES, *self._ours()) if name in times}
            ratios.pop(form.name, None)
            fraction = None
            if mode.startswith("kernel") and COPY in times and not form.less_work:
                fraction = round(_ratio(times[COPY], taken) * bytes_moved / work.copied_bytes, 4)
            errors = self.errors.get(form.name, [None])
            yield {
                "op": case.op,
                "variant": case.variant,
                "scenario": case.shape.name,
                "source": case.shape.source,
                "N": case.shape.n,
                "C": case.shape.c,
                "dtype": case.dtype,
                "mode": mode,
                "memory": "default",
                "threads": torch.get_num_threads(),
                "peer": form.name,
                "less_work": form.less_work,
                "note": form.note,
                "backend": form.backend,
                "timed_by": "clock" if mode.startswith("host") else "graph" if form.captured else "profiler",
                "rounds": len(taken),
                "p25_us": round(p25 * 1e6, 3),
                "p50_us": round(p50 * 1e6, 3),
                "p75_us": round(p75 * 1e6, 3),
                "ratio": ratios,
                "model_bytes": None if form.less_work else bytes_moved,
                "ideal_us": round(bytes_moved / self.where["copy_gbs"] * 1e-3, 3),
                "frac_copy": fraction,
                "page_faults": None,
                "rel_err_loss": errors[0],
                "rel_err_grad": errors[-1],
                "rounding_grad": work.rounding,
                **self.facts[form.name],
                **more,
                **self.where,
            }

    def _ours(self) -> list[str]:
        return [form.name for form in self.work.forms if form.ours]

    def run(self) -> Iterator[dict[str, Any]]:
        rotation = self.timer.rotation(self.work.footprint)
        self.check()
        self.describe(rotation)
        steps = {step for form in self.forms for step in form.steps}
        yield from self.kernel("kernel", STEP, rotation)
        yield from self.host("host", CALL if CALL in steps else STEP)
        if self.work.case.brief:
            return
        if rotation.copies > 2:  # what a few copies fill never was in the cache
            yield from self.kernel("kernel_hot", STEP, Rotation(min(rotation.calls, 32), 1, False))
        if FORWARD in steps:
            yield from self.kernel("kernel_fwd", FORWARD, rotation._replace(calls=min(rotation.calls, 64)))
        if SCALED in steps:
            yield from self.host("host_scaled", SCALED)


def _ratio(times: Sequence[float], base: Sequence[float]) -> float:
    if len(times) == len(base):
        return runner.round_ratio(times, base)
    return statistics.median(times) / statistics.median(base)


def copy_bandwidth(timer: Timer, device: str, megabytes: int) -> float:
    """GB/s that a large copy moves, read and written: the ceiling beside the copies of each case's own size."""
    source = torch.ones(megabytes << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = [timer.time(lambda: target.copy_(source)).seconds for _ in range(15)]
    return max(0.1, round(2 * source.nbytes / statistics.median(times) * 1e-9, 1))


def selected(quick: bool, dry: bool, only: str) -> list[Case]:
    """The ops' cases in turn, so that none of them waits for the last ones of another."""
    turns = zip_longest(*(op.cases(quick, dry) for op in OPS.values()))
    cases = [case for turn in turns for case in turn if case is not None]
    return [case for case in cases if re.search(only, case.name)]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=Path, required=True, help="JSON Lines, appended to")
    parser.add_argument("--seconds", type=float, default=240.0, help="no case is begun after that")
    parser.add_argument("--skip", type=int, default=0, help="cases that an earlier process dealt with")
    parser.add_argument("--only", default="", help="regular expression on the name of a case")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--compile-share", metavar="I/N", help="run each form of every N-th case once, time nothing")
    return parser.parse_args(argv)


def warm(cases: Sequence[Case], device: str, timer: Timer, deadline: float) -> None:
    """Lets Triton and Inductor fill their caches on disk. What fails will fail again where it is reported."""
    for case in cases:
        if time.monotonic() > deadline:
            return
        try:
            work = OPS[case.op].prepare(case, device)
        except Exception as error:
            print(f"{case.name}: {type(error).__name__}", flush=True)
            continue
        measurement = Measurement(work, timer, {})
        for form in measurement.forms:
            for step in form.steps.values():
                measurement.attempt(form, "does not run", partial(step, work.copy(work.inputs)))
        del work, measurement
        timer.forget()


def main(argv: Sequence[str] | None = None) -> int:
    """Measures; 1 when a form of ours is wrong, 3 when the process cannot use the GPU any more."""
    args = parse(argv)
    deadline = time.monotonic() + args.seconds
    device = "cpu" if args.dry_run else "cuda"
    timer: Timer = DryTimer() if args.dry_run else GpuTimer()
    cases = selected(args.quick, args.dry_run, args.only)
    if args.compile_share:
        share, count = map(int, args.compile_share.split("/"))
        warm(cases[share::count], device, timer, deadline)
        return 0
    where = runner.environment(timer.device)
    where |= {"dry_run": args.dry_run, "copy_gbs": copy_bandwidth(timer, device, 1 if args.dry_run else 512)}
    print(f"copy: {where['copy_gbs']:.0f} GB/s, read and written", flush=True)
    progress, failed, told = args.records.with_suffix(".progress"), False, set()
    for number, case in enumerate(cases[args.skip :], start=args.skip):
        if time.monotonic() > deadline:
            print(f"NOTE: no time for {len(cases) - number} cases, from {case.name} on", flush=True)
            break
        progress.write_text(str(number))
        try:
            measurement = Measurement(OPS[case.op].prepare(case, device), timer, where)
            with args.records.open("a", encoding="utf-8") as file:
                records = []
                for record in measurement.run():
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    records.append(record)
        except LostDeviceError as failure:
            print(f"FAILED {case.name}: {failure}", flush=True)
            return 3
        except Exception as error:
            print(f"FAILED {case.name}: {type(error).__name__}: {error}", flush=True)
            failed = True
            timer.forget()
            continue
        print(f"[{number + 1}/{len(cases)}] {case.name}: {_line(records)}", flush=True)
        for name, reason in measurement.failed.items():
            print(f"FAILED {case.name}: {name} {reason}", flush=True)
            failed = True
        for name, reason in measurement.refused.items():
            if (name, reason) not in told:
                told.add((name, reason))
                print(f"NOTE: {case.name}: without {name}: {reason}", flush=True)
        del measurement
        timer.forget()
    progress.write_text(str(len(cases)))
    return int(failed)


def _line(records: Sequence[dict[str, Any]]) -> str:
    """What a reader of a run that is cut off wants to have seen."""
    return ", ".join(
        f"{record['peer'].removeprefix('ltkernels ')} {record['p50_us']:.4g} µs"
        + (f" ({record['frac_copy']:.0%} of copy)" if record["frac_copy"] is not None else "")
        for record in records
        if record["mode"] == "kernel"
    )


if __name__ == "__main__":
    sys.exit(main())
