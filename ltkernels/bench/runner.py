"""Runs all forms of a loss against each other in one process and turns the times into records.

The rules, and why:

* Forms take turns call by call, in an order drawn anew each round: a slow second of the machine, the state of the
  caches and the allocator hit all of them alike.
* A ratio is computed in each round, between two calls that ran within that round, and the median of these is
  reported. A ratio of medians would mix calls that ran seconds apart.
* Before anything is timed, every form's loss and gradient are compared with ours on the same input, and ours with
  float64. What differs is refused, so that different work is never compared.
* A call is the forward and the backward as a training step has them: module call with its argument checks, then
  ``torch.autograd.grad`` to non-leaf logits. The gradient is handed over, dropped and its memory given back within
  the call, for everybody.
"""

from __future__ import annotations

import gc
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ltkernels
from ltkernels.backends import explain
from ltkernels.bench import peers
from ltkernels.bench.device import Call, Device, Sample
from ltkernels.bench.peers import LossFn, Variant
from ltkernels.bench.scenarios import Problem, Scenario, make_problem

MODES = {
    "fwd_bwd": "loss and gradient, upstream gradient 1",
    "fwd_bwd_scaled": "loss and gradient, upstream gradient 1/1024 as a loss scaler sets it",
    "fwd": "loss alone under no_grad",
}
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}

# What the allocator does with the memory of a call's results, set for a process by its environment. A page that the
# system has to map costs far more than writing it, so it decides times of batches of megabytes.
MEMORY = {
    "default": ("glibc as it comes: mostly reuses pages up to 32 MB a tensor", None),
    "fresh": ("every tensor above 64 KB gets newly mapped pages", "glibc.malloc.mmap_threshold=65536"),
    "recycled": (
        "pages are never given back, so after the warm-up none is new",
        "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776",
    ),
}

# Largest relative difference from ours that still counts as the same loss. LDAM multiplies by 30, so that float32
# forms differ by some 30 roundings; half gradients differ by their own rounding; with float64 logits the loss modules'
# tables are still float32.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

MIN_ROUNDS = 15
MAX_ROUNDS = 2_000
WARM_UP_ROUNDS = 3


class WrongResultError(RuntimeError):
    """ltkernels' own loss or gradient is not the float64 one: timing it would be pointless."""


@dataclass(frozen=True)
class Plan:
    """How one loss on one batch shape is measured."""

    mode: str = "fwd_bwd"
    dtype: str = "float32"
    seconds: float = 4.0
    compile: bool = True
    min_rounds: int = MIN_ROUNDS
    max_rounds: int = MAX_ROUNDS
    warm_up_rounds: int = WARM_UP_ROUNDS
    seed: int = 0
    memory: str = "default"


@dataclass
class Measurement:
    """Records of one loss on one batch shape, and why forms are missing from it."""

    records: list[dict[str, Any]]
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Error:
    """Relative difference of the loss, relative L2 difference of the gradient."""

    loss: float
    grad: float

    def within(self, tolerance: float) -> bool:
        return self.loss <= tolerance and self.grad <= tolerance  # false for NaN

    def __str__(self) -> str:
        return f"loss {self.loss:.1e}, gradient {self.grad:.1e}"


def relative_l2(value: Tensor, truth: Tensor) -> float:
    """``|value - truth| / |truth|`` in float64; 0 where both are 0."""
    distance, norm = (value.double() - truth.double()).norm(), truth.double().norm()
    return 0.0 if distance == 0 else float(distance / norm)


def _variables(form: LossFn, logits: Tensor) -> tuple[Tensor, ...]:
    """What the gradient is of."""
    return form.learned if isinstance(form, peers.Learning) else (logits,)


@lru_cache(maxsize=4)
def _waves(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(shape.numel(), dtype=torch.float64, device=device).cos().reshape(shape).to(dtype)


def upstream_of(result: Tensor) -> Tensor | None:
    """The upstream gradient of a result that is no loss: the same numbers in every form."""
    return None if result.dim() == 0 else _waves(result.shape, result.dtype, result.device)


def loss_and_grad(form: LossFn, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss = form(logits, target)
    grads = torch.autograd.grad(loss, _variables(form, logits), upstream_of(loss))
    return loss.detach(), grads[0] if len(grads) == 1 else torch.cat([grad.flatten() for grad in grads])


def difference(result: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> Error:
    return Error(relative_l2(result[0], truth[0]), relative_l2(result[1], truth[1]))


def check_forms(forms: Mapping[str, LossFn], problem: Problem, truth: tuple[Tensor, Tensor]) -> dict[str, Error | str]:
    """Errors of all forms against the truth, or a sentence for each that is refused; as :func:`check_results`.

    Args:
        forms: by name; ``ltkernels`` must be among them.
        problem: the input.
        truth: loss and gradient in float64.
    """
    results = {name: partial(loss_and_grad, form, problem.logits, problem.target) for name, form in forms.items()}
    return check_results(results, problem.logits.dtype, truth)


def check_results(
    results: Mapping[str, Callable[[], tuple[Tensor, Tensor]]], dtype: torch.dtype, truth: tuple[Tensor, Tensor]
) -> dict[str, Error | str]:
    """Errors of what forms give against the truth, or a sentence for each that is refused.

    Args:
        results: for each form a call that gives loss and gradient; ``ltkernels`` must be among them.
        dtype: in which they are computed.
        truth: loss and gradient in float64.

    Returns:
        For each form its :class:`Error` against the truth, or the reason why it may not be compared.

    Raises:
        WrongResultError: ours differs from the truth by more than the tolerance.
    """
    tolerance = TOLERANCE[dtype]
    ours = results[peers.OURS]()
    answers: dict[str, Error | str] = {}
    for name, call in results.items():
        try:
            result = ours if name == peers.OURS else call()
        except Exception as error:  # a peer's own failure, a missing C++ compiler for torch.compile for one
            answers[name] = f"does not run: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        apart = difference(result, ours)
        if apart.within(tolerance):
            answers[name] = difference(result, truth)
        else:
            answers[name] = f"computes another loss: differs from ltkernels by {apart}, allowed {tolerance:.0e}"
    own = answers[peers.OURS]
    assert isinstance(own, Error)  # its distance from itself is 0
    if not own.within(tolerance):
        raise WrongResultError(f"ltkernels differs from float64 by {own}, allowed {tolerance:.0e}")
    return answers


def make_call(form: LossFn, problem: Problem, mode: str) -> Call:
    """The unit that is timed."""
    logits, target = problem.logits, problem.target
    if mode == "fwd":

        def forward() -> None:
            with torch.no_grad():
                form(logits, target)

        return forward
    scale = None if mode == "fwd_bwd" else torch.tensor(1 / 1024, device=logits.device)
    variables = _variables(form, logits)

    def forward_backward() -> None:
        loss = form(logits, target)
        upstream = upstream_of(loss)
        if scale is not None:
            upstream = scale.to(loss.dtype) if upstream is None else upstream * scale.to(loss.dtype)
        torch.autograd.grad(loss, variables, upstream)

    return forward_backward


def interleave(calls: Mapping[str, Call], device: Device, plan: Plan) -> dict[str, list[Sample]]:
    """Times every call once a round, in random order, until the time is used up.

    Args:
        calls: what to time, by name.
        device: whose clock.
        plan: budget in seconds and the bounds on the number of rounds.

    Returns:
        A sample of each call in each round; all lists have the same length.
    """
    order = list(calls)
    shuffle = random.Random(plan.seed).shuffle
    for name in order * plan.warm_up_rounds:
        calls[name]()
    samples: dict[str, list[Sample]] = {name: [] for name in order}
    gc.collect()
    gc.freeze()  # leaves the collector only what the calls themselves make
    gc.disable()
    try:
        deadline = time.perf_counter() + plan.seconds
        for done in range(plan.max_rounds):
            if done >= plan.min_rounds and time.perf_counter() >= deadline:
                break
            shuffle(order)
            for name in order:
                samples[name].append(device.time(calls[name]))
            if done % 32 == 31:  # each round, it would leave the caches 8 % slower for calls of 100 µs
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return samples


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def round_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of ``times / base`` of the same round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def time_fields(name: str, samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    """What a record says about the time of the form ``name``, of samples as :func:`interleave` takes them."""
    times = {form: [sample.seconds for sample in taken] for form, taken in samples.items()}
    p25, p50, p75 = quartiles(times[name])
    return {
        "rounds": len(times[name]),
        "p25_us": round(p25 * 1e6, 2),
        "p50_us": round(p50 * 1e6, 2),
        "p75_us": round(p75 * 1e6, 2),
        "ratio": {base: round(round_ratio(times[name], times[base]), 4) for base in times if base != name},
        "page_faults": statistics.median_low(sample.page_faults for sample in samples[name]),
    }


class _LaunchCounter(TorchDispatchMode):
    """Counts the ops that reach a backend; views launch nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.launches += int(not func.is_view)
        return func(*args, **(kwargs or {}))


def count_launches(call: Call) -> int:
    """Ops one call sends to a backend, forward and backward, views not counted."""
    counter = _LaunchCounter()
    with counter:
        call()
    return counter.launches


def serving_backend(form: LossFn, problem: Problem) -> str:
    """Name of the backend that :func:`ltkernels.explain` says a call of ours uses."""
    backend = explain(form, problem.logits, problem.target).backend
    assert backend is not None  # a form that was called before
    return backend


def model_bytes(shape: Scenario, itemsize: int, mode: str, experts: int = 1) -> int:
    """Bytes a loss cannot avoid to move: logits read once, the gradient written once, labels read, tables read once.

    Where the logits are frozen they are read twice instead. A teacher's logits are not counted.
    """
    passes = 1 if mode == "fwd" else 2
    return passes * experts * shape.n * shape.c * itemsize + 8 * shape.n + 4 * shape.c


def measure(variant: Variant, shape: Scenario, device: Device, plan: Plan) -> Measurement:
    """Checks and times every form of one loss on one batch shape.

    Args:
        variant: the loss.
        shape: rows and classes.
        device: where to run.
        plan: mode, type, budget.

    Returns:
        One record a form, ``clone`` and the empty autograd Function included, and the refused forms with reasons.

    Raises:
        WrongResultError: ours is not the float64 loss.
    """
    dtype = DTYPES[plan.dtype]
    problem = make_problem(
        shape, dtype, cosine=variant.cosine, experts=variant.experts, device=device.name, seed=plan.seed
    )
    exact = problem.logits.detach().double().requires_grad_()
    truth = loss_and_grad(variant.eager(problem, torch.float64), exact, problem.target)
    rounding = relative_l2(truth[1].to(dtype), truth[1])
    del exact
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    forms = peers.loss_forms(variant, problem, table_dtype)
    if plan.compile:
        forms[peers.COMPILE] = peers.compiled(variant.eager(problem, table_dtype))
    answers = check_forms(forms, problem, truth)
    del truth
    refused = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    if variant.library is not None and peers.LIBRARY not in forms:
        refused[peers.LIBRARY] = "is not installed"
    backend = serving_backend(forms[peers.OURS], problem)
    calls = {name: make_call(form, problem, plan.mode) for name, form in forms.items() if name not in refused}
    calls[peers.EMPTY] = make_call(peers.empty_function, problem, plan.mode)
    source = problem.logits.detach()
    calls[peers.CLONE] = source.clone

    samples = interleave(calls, device, plan)
    times = {name: [sample.seconds for sample in samples[name]] for name in calls}
    experts = max(variant.experts, 1)
    ideal = model_bytes(shape, dtype.itemsize, plan.mode, experts)
    copied = 2 * experts * shape.n * shape.c * dtype.itemsize
    common = {
        "op": variant.op,
        "variant": variant.name,
        "scenario": shape.name,
        "source": shape.source,
        "N": experts * shape.n,  # rows of logits
        "C": shape.c,
        "dtype": plan.dtype,
        "mode": plan.mode,
        "memory": plan.memory,
        "threads": torch.get_num_threads(),
    }
    records = []
    for name, call in calls.items():
        error = answers.get(name)
        is_loss = name not in peers.NOT_LOSSES
        peak = device.peak_bytes(call)
        of_copy = round_ratio(times[peers.CLONE], times[name]) * ideal / copied
        records.append(
            common
            | {
                "peer": name,
                "less_work": not is_loss,
                "backend": backend if name == peers.OURS else None,
                "model_bytes": ideal if is_loss else None,
                "frac_copy": round(of_copy, 4) if is_loss else None,
                "launches": count_launches(call) if name != peers.COMPILE else None,  # Inductor bypasses dispatch
                "peak_mb": round(peak / 2**20, 4),
                "peak_bytes": peak,
                "rel_err_loss": error.loss if isinstance(error, Error) else None,
                "rel_err_grad": error.grad if isinstance(error, Error) else None,
                "rounding_grad": rounding,
            }
            | time_fields(name, samples)
        )
    return Measurement(records, refused)


def environment(device: Device) -> dict[str, object]:
    """Fields that say where and with what a record was measured."""
    return device.describe() | {
        "torch": torch.__version__,
        "ltkernels": getattr(ltkernels, "__version__", None),
        "git": _git_commit(),
        "utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _git_commit() -> str | None:
    """Commit of the source tree this package was imported from; ``None`` for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "ltkernels", "csrc", "setup.py")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


Case = TypeVar("Case")  # a loss, or another thing to measure
Measure = Callable[[Case, Scenario, Device, Plan], Measurement]
Progress = Callable[[Case, Scenario, Measurement], None]


def run(
    variants: Sequence[Case],
    shapes: Sequence[Scenario],
    device: Device,
    plan: Plan,
    report: Progress[Case],
    measure_one: Measure[Case],
) -> list[dict[str, Any]]:
    """Measures everything on every shape in this process.

    Args:
        variants: what to measure, the losses for one.
        shapes: the batch shapes.
        device: where to run.
        plan: mode, type and budget of each measurement.
        report: called after each measurement with its records completed by the environment's fields.
        measure_one: :func:`measure`, or another op's.

    Returns:
        All records.
    """
    where = environment(device)
    records = []
    for shape in shapes:
        for variant in variants:
            measurement = measure_one(variant, shape, device, plan)
            measurement.records = [record | where for record in measurement.records]
            report(variant, shape, measurement)
            records += measurement.records
    return records
