"""What routing saves: the time of a batch against the share of its samples that need another expert.

Experts are multilayer perceptrons with random weights, and each gate is moved so that a given share of the samples
that reach it goes on. So time is all that is measured here; what routing costs in accuracy depends on trained gates.

    python python/expert_routing.py
    python python/expert_routing.py --device cuda --width 2048 --batch 1024
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import ltkernels as ltk

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
TOP = 30  # logits that a gate sees, as published


class Expert(nn.Module):
    """A perceptron that gives logits and features, and counts the rows that it sees.

    Shape:
        ``(n, width)`` to ``(n, C)`` and ``(n, width)``.
    """

    def __init__(self, width: int, depth: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())))
        self.head = nn.Linear(width, num_classes)
        self.rows = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.rows += len(x)
        features = self.layers(x)
        return self.head(features), features


class FixedShareRouter(ltk.experts.ExpertRouter):
    """A router whose gates do their work, and then let through ``share`` of the samples: those they find neediest."""

    share = 1.0

    def gate(self, place: int, mean_logits: Tensor, features: Tensor) -> Tensor:
        h = super().gate(place, mean_logits, features)
        order = h.argsort(descending=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(h), device=h.device))
        return round(self.share * len(h)) - rank - 0.5


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call in ms; a GPU is waited for."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def measure(args: argparse.Namespace) -> list[str]:
    """The lines of the table."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    experts = [Expert(args.width, args.depth, args.classes).to(device).eval() for _ in range(args.experts)]
    router = FixedShareRouter(args.experts, args.width, topk=min(TOP, args.classes), device=device)
    x = torch.randn(args.batch, args.width, device=device)

    def ask_all() -> object:
        return ltk.functional.aggregate_experts([expert(x)[0] for expert in experts])

    times: dict[float | None, list[float]] = {None: [], **{share: [] for share in SHARES}}
    table = {}
    for _ in range(args.repeats + 1):  # in turns, so that what else the machine does meets all of them
        times[None].append(milliseconds(ask_all, device))
        for router.share in SHARES:
            for expert in experts:
                expert.rows = 0
            times[router.share].append(milliseconds(lambda: router(x, experts), device))
            table[router.share] = [expert.rows for expert in experts]
    median = {share: statistics.median(found[1:]) for share, found in times.items()}  # the first warms up
    together = median[None]
    return [
        f"{args.batch} samples, {args.experts} experts of {args.depth} layers of {args.width}, {args.classes} classes,"
        f" {device}, {torch.get_num_threads()} threads, median of {args.repeats}",
        f"all experts for all samples: {together:.2f} ms",
        "",
        f"{'go on at a gate':>15}  {'experts a sample':>16}  {'ms':>8}  {'of all':>6}  rows of each expert",
        *(
            f"{share:>15.0%}  {sum(rows) / args.batch:>16.2f}  {median[share]:>8.2f}  {median[share] / together:>6.0%}"
            f"  {', '.join(map(str, rows))}"
            for share, rows in table.items()
        ),
    ]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="expert_routing.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sizes = {
        "batch": (256, "samples"),
        "experts": (3, "experts, at least 2"),
        "width": (1024, "width of their layers"),
        "depth": (4, "layers of an expert"),
        "classes": (1000, "classes"),
        "repeats": (20, "measurements of each time, of which the median is told"),
    }
    for name, (default, what) in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in sizes:
        least = 2 if name == "experts" else 1
        if getattr(args, name) < least:
            parser.error(f"argument --{name}: expected at least {least}, found {getattr(args, name)}")
    if args.device not in ("cpu", "cuda"):
        parser.error(f"argument --device: expected cpu or cuda, found {args.device!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no GPU here")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    print("\n".join(measure(parse(argv))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
