"""What the ways into cross_entropy cost, and what keeping the gradient from the forward saves.

Two tables, each interleaved call by call in one process (medians, one thread)::

    python benchmarks/entries.py [--seconds 2]

* **entries**: forward and backward through the lean autograd Function, torch.func, the dispatcher op and the reference,
  on a batch so small that the way in is most of the time;
* **gradient**: the C++ kernels alone: gradient in the forward, forward plus recomputing backward, and the gradient kept
  and then multiplied, which is what another upstream value than 1 costs. ltkernels/ops/entries.py says what
  follows from that.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table

from ltkernels import backends, functional
from ltkernels.bench import runner
from ltkernels.bench.device import Call, Cpu
from ltkernels.bench.scenarios import Problem, make_problem, scenario
from ltkernels.ops.cross_entropy import TABLE
from ltkernels.ops.options import CrossEntropyOptions

ENTRIES_BATCH = "128x100"
GRADIENT_BATCHES = ("128x100", "256x1000", "8192x1204", "512x8142")


def entry_calls(problem: Problem) -> dict[str, Call]:
    logits, target = problem.logits, problem.target
    options = CrossEntropyOptions()

    def reference() -> None:
        with backends.use_backend("reference"):
            lean()

    def lean() -> None:
        torch.autograd.grad(functional.cross_entropy(logits, target), logits)

    def dispatcher() -> None:
        loss, _ = torch.ops.ltkernels.cross_entropy(logits, target, None, None, None, None, None, *options)
        torch.autograd.grad(loss, logits)

    values = logits.detach()
    transformed = torch.func.grad(lambda x: functional.cross_entropy(x, target))
    return {
        "lean Function": lean,
        "torch.func.grad": lambda: transformed(values),
        "dispatcher op": dispatcher,
        "reference": reference,
        "F.cross_entropy": lambda: torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target), logits),
    }


def gradient_calls(problem: Problem) -> dict[str, Call]:
    """The kernels without autograd around them."""
    logits, target = problem.logits.detach(), problem.target
    kernels = next(row for row in TABLE.rows if row.backend == "cpu")
    tensors, options = (logits, target, None, None, None, None, None), CrossEntropyOptions()
    one, other = torch.tensor(1.0), torch.tensor(0.5)

    def recomputed() -> None:
        _, state, _ = kernels.forward(*tensors, *options, False)
        kernels.backward(one, state, *tensors, *options, True, False, False, False)

    return {
        "in the forward": lambda: kernels.forward(*tensors, *options, True),
        "kept, multiplied": lambda: kernels.forward(*tensors, *options, True)[2].mul_(other),
        "recomputed": recomputed,
        "clone": logits.clone,
    }


def report(title: str, calls: Mapping[str, Call], seconds: float, console: Console) -> None:
    samples = runner.interleave(calls, Cpu(), runner.Plan(seconds=seconds))
    table = Table("", "median µs", "of the first", title=title)
    first = [sample.seconds for sample in samples[next(iter(calls))]]
    for name, taken in samples.items():
        times = [sample.seconds for sample in taken]
        ratio = runner.round_ratio(times, first)
        table.add_row(name, f"{runner.quartiles(times)[1] * 1e6:.1f}", f"{ratio:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each table (default 2)")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    console = Console()
    problem = make_problem(scenario(ENTRIES_BATCH), torch.float32, cosine=False)
    report(f"entries, {ENTRIES_BATCH}", entry_calls(problem), seconds, console)
    for name in GRADIENT_BATCHES:
        problem = make_problem(scenario(name), torch.float32, cosine=False)
        report(f"gradient, {name}", gradient_calls(problem), seconds, console)


if __name__ == "__main__":
    main()
