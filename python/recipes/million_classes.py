"""Trains the classifier of a million classes, whose logits no machine of this size could hold, beside the plain form.

A sample is its class's centre and noise; classes are drawn by a long tail, in which a class is as frequent as its
place in the order of frequencies is low. The features stand for those of a backbone, so they ask for a gradient too.
With 4096 rows the logits are 16 GB, and the plain form (F.linear and F.cross_entropy) needs them three times. It runs
in a process of its own, which may take the memory that is free and no more, and says how it ended.

  python python/recipes/million_classes.py                                 both forms, 4 steps: two minutes
  python python/recipes/million_classes.py --classes 20000 --batch 512     where the plain form fits
  python python/recipes/million_classes.py --sample-rate 0.1               a tenth of the classes a step (Partial FC)
  torchrun --nproc-per-node 2 python/recipes/million_classes.py --class-parallel --form ltkernels
                                                                           half of the classes on each of two processes

Each step's loss and time are printed, then the highest memory of the process and, with --class-parallel, the bytes of
a step that the processes exchanged, counted, beside those of the formula in docs/scale.md, which goes on from there to
a hundred million classes.
The exit code is 0, or 1 for a failure, 2 for a wrong option, 3 where the plain form found no memory, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the demo's modules
if importlib.util.find_spec("ltkernels") is None:  # a checkout that nobody has installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if missing := [name for name in ("numpy", "torch", "rich") if importlib.util.find_spec(name) is None]:
    sys.exit(f"million_classes.py needs {', '.join(missing)}; run: pip install 'ltkernels[demo]' (or make setup)")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from longtail_arguments import at_least_one
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from workers import UserError

import ltkernels as ltk

LEARNING_RATE = 1.0
NOISE = 0.5
GIB = 2**30
NO_MEMORY = 3  # exit code
FORMS = ("both", "ltkernels", "plain")


class Clusters:
    """Rows of long-tailed classes, without a data set in memory: the class at a position of the stream is drawn, and
    its centre put together of two vectors, one of about sqrt(C) of each."""

    def __init__(self, classes: int, features: int, seed: int) -> None:
        self.seed = seed
        self.side = int(classes**0.5) + 1
        generator = torch.Generator().manual_seed(seed)
        self.parts = torch.randn(2, self.side, features, generator=generator) * 0.5**0.5
        self.index = ltk.samplers.ClassIndex(torch.arange(classes))  # a member of each: what is drawn is the class
        self.frequency = ltk.samplers.AliasTable(1.0 / torch.arange(1, classes + 1, dtype=torch.float64))

    def batch(self, step: int, rows: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor]:
        """Features and labels; a rank's are every ``ranks``-th of what one process would get."""
        start, stop = step * rows + rank, (step + 1) * rows
        labels = ltk.functional.sample_indices(
            self.index, start, stop, ranks, seed=self.seed, class_probs=self.frequency
        )
        noise = torch.randn(rows, self.parts.shape[2], generator=torch.Generator().manual_seed(self.seed + 1 + step))
        centres = self.parts[0, labels // self.side] + self.parts[1, labels % self.side]
        return centres + NOISE * noise[rank::ranks], labels


class Traffic(TorchDispatchMode):
    """Counts the collective operations that are called while it is on, and the bytes of their results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            for kind in ("all_gather", "reduce_scatter"):
                name = kind if kind in name or kind.replace("_", "") in name else name
            self.calls[name] += 1
            self.bytes[name] += _bytes(args[0])
        return func(*args, **(kwargs or {}))


def expected_traffic(rows: int, features: int, ranks: int) -> dict[str, int]:
    """Bytes of the results of a step's collective operations, of float32 features that each process has a part of.

    Gathered are all features, all labels (int64) and of each process five numbers of each row (float32) and a header of
    six integers; summed and scattered are the gradients of all features, of which a process keeps its part. The number
    of classes is not among it.
    """
    gathered = 4 * rows * features + 8 * rows + ranks * (5 * 4 * rows + 6 * 8)
    return {"all_gather": gathered, "reduce_scatter": 4 * rows * features // ranks}


def _bytes(results: Any) -> int:
    """Of tensors in lists in lists: the first argument of an operation of c10d is what it writes."""
    if isinstance(results, Tensor):
        return results.nbytes
    return sum(map(_bytes, results)) if isinstance(results, (list, tuple)) else 0


# ------------------------------------------------------------------------------------------------------------- training


def ours(args: argparse.Namespace) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The classifier and its loss, whose logits exist for some rows at a time."""
    loss = ltk.losses.LinearCrossEntropyLoss(
        args.features,
        args.classes,
        sample_rate=args.sample_rate,
        sparse_grad=args.sample_rate is not None,
        group=dist.group.WORLD if args.class_parallel else None,
        batch="gathered" if args.class_parallel else "replicated",
    )
    return loss, loss


def plain(args: argparse.Namespace) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The same in PyTorch: all logits, and their gradient."""
    head = nn.Linear(args.features, args.classes, bias=False)
    return head, lambda x, y: F.cross_entropy(head(x), y)


def train(args: argparse.Namespace, form: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains and reports; in each process, if there are several."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if args.class_parallel else (0, 1)
    torch.manual_seed(args.seed)
    clusters = Clusters(args.classes, args.features, args.seed)
    module, loss_of = (ours if form == "ltkernels" else plain)(args)
    optimizer = torch.optim.SGD(module.parameters(), LEARNING_RATE, foreach=False)
    losses, seconds = [], []
    traffic = Traffic()
    for step in range(args.steps):
        x, y = clusters.batch(step, args.batch, rank, ranks)
        began = time.perf_counter()
        with traffic:
            loss = loss_of(x.requires_grad_(), y)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
        say(f"{form}: step {step + 1}, loss {losses[-1]:.4f}, {seconds[-1]:.2f} s")
    if not all(map(math.isfinite, losses)):
        raise UserError(f"{form}: the loss is {losses[-1]}")
    middle = sorted(seconds)[len(seconds) // 2]
    found: dict[str, Any] = {"form": form, "loss": losses, "seconds": seconds, "peak_bytes": peak_bytes()}
    expected = expected_traffic(args.batch, args.features, ranks)
    found["traffic"] = {
        name: {
            "calls": calls / args.steps,
            "bytes": traffic.bytes[name] / args.steps,
            "by_formula": expected.get(name, 0),
        }
        for name, calls in sorted(traffic.calls.items())
    }
    say(
        f"{form}: {args.batch / middle:,.0f} rows a second,"
        f" {found['peak_bytes'] / GIB:.2f} GiB at most in this process,"
        f" where the logits are {args.batch * args.classes * 4 / GIB:.2f}"
    )
    for name, of in found["traffic"].items():
        say(
            f"{form}: {name}, {of['calls']:g} calls and {of['bytes']:,.0f} bytes a step and process,"
            f" {of['by_formula']:,} by the formula"
        )
    return found


def peak_bytes() -> int:
    """The most memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ------------------------------------------------------------------------------------------------------- the plain form


def plain_in_its_own_process(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs this program with ``--form plain``; what it lacks of memory is an outcome, not a failure."""
    command = [sys.executable, __file__, "--form", "plain", "--json"]
    for name in ("classes", "features", "batch", "steps", "seed"):
        command += [f"--{name}", str(getattr(args, name))]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode not in (0, NO_MEMORY):
        raise UserError(f"the plain form ended with code {run.returncode}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    if "no_memory" in found:
        say(f"plain: no memory. {found['no_memory']}")
    else:
        say(
            f"plain: loss {found['loss'][0]:.4f} to {found['loss'][-1]:.4f},"
            f" {sorted(found['seconds'])[len(found['seconds']) // 2]:.2f} s a step,"
            f" {found['peak_bytes'] / GIB:.2f} GiB at most"
        )
    return found


def within_free_memory() -> int:
    """Lets this process allocate what is free now and no more, so that asking for more fails and harms nobody else."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = free if most == resource.RLIM_INFINITY else min(free, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    return limit


def plain_or_no_memory(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    limit = within_free_memory()
    try:
        return train(args, "plain", say)
    except (RuntimeError, MemoryError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, MemoryError) and "memory" not in said:
            raise
        return {"form": "plain", "limit_bytes": limit, "no_memory": f"{said} ({limit / GIB:.1f} GiB were free)"}


# ---------------------------------------------------------------------------------------------------------- the program


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All forms asked for, one after the other."""
    console = Console(stderr=args.json, soft_wrap=True)
    first = not args.class_parallel or dist.get_rank() == 0

    def say(text: str) -> None:
        if first:
            console.print(text, highlight=False, markup=False)

    found = []
    if args.form == "both":
        found.append(plain_in_its_own_process(args, say))
    elif args.form == "plain":
        found.append(plain_or_no_memory(args, say))
    if args.form != "plain":
        found.append(train(args, "ltkernels", say))
    if args.json and first:
        for one in found:
            print(json.dumps(one))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code (argparse itself exits with 2)."""
    args = parse(argv)
    errors = Console(stderr=True, soft_wrap=True)
    try:
        if args.class_parallel:
            dist.init_process_group("gloo")
        try:
            found = run(args)
        finally:
            if args.class_parallel:
                dist.destroy_process_group()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, UserError) as error:
        errors.print(f"million_classes.py: {error}", highlight=False, markup=False)
        return 1
    return NO_MEMORY if args.form == "plain" and "no_memory" in found[0] else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="million_classes.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, default, what in (
        ("classes", 1_000_000, "number of classes"),
        ("features", 128, "features of a row"),
        ("batch", 4096, "rows of a step, of all processes together"),
        ("steps", 4, "steps of training"),
    ):
        parser.add_argument(f"--{name}", type=at_least_one, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data and classifier (default: %(default)s)")
    parser.add_argument("--form", choices=FORMS, default="both", help="which forms run (default: %(default)s)")
    parser.add_argument("--sample-rate", type=float, help="share of the classes that a step of ltkernels' form trains")
    parser.add_argument("--class-parallel", action="store_true", help="divide the classes among torchrun's processes")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each form, the rest to stderr")
    args = parser.parse_args(argv)
    if args.sample_rate is not None and not 0 < args.sample_rate <= 1:
        parser.error(f"argument --sample-rate: expected a number in (0, 1], found {args.sample_rate}")
    if args.class_parallel:
        if "RANK" not in os.environ:
            parser.error("argument --class-parallel: expected to be started by torchrun")
        if args.form != "ltkernels":
            parser.error("argument --class-parallel: expected --form ltkernels")
        if args.sample_rate is not None:
            parser.error("argument --class-parallel: expected no --sample-rate")
        if args.batch % (ranks := int(os.environ["WORLD_SIZE"])):
            parser.error(f"argument --batch: expected a multiple of the {ranks} processes, found {args.batch}")
    return args


if __name__ == "__main__":
    sys.exit(main())
