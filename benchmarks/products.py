"""How fast the three products of a linear classifier are in chunks, which the rules of ops/chunked_linear.py rest on.

``python benchmarks/products.py`` prints GFLOP/s for each batch: of all rows at once, which is what the plain form has,
and of a chunk of as many rows as the rule says: ``X W^T`` at once and in parts of some classes, ``G W``, and ``G^T X``
added to what is there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ltkernels.bench.peers_linear import LINEAR_SCENARIOS
from ltkernels.bench.scenarios import Scenario
from ltkernels.ops.chunked_linear import Classifier, Needed, chunk_rows

SHAPES = (*LINEAR_SCENARIOS, Scenario(64, 1_000_000, "few rows", 128))
PARTS = (256, 512, 1024, 2048, 4096)
ROUNDS = 5


def seconds(call: Callable[[], object]) -> float:
    """The median of some calls."""
    call()
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def rates(shape: Scenario) -> dict[str, float]:
    """GFLOP/s by product."""
    n, c, d = shape.n, shape.c, shape.d
    x, w, g = torch.randn(n, d), torch.randn(c, d), torch.randn(n, c)
    d_x, d_w = torch.empty(n, d), torch.zeros(c, d)
    found = {}

    def add(name: str, rows: int, call: Callable[[], object]) -> None:
        found[name] = 2 * rows * c * d / seconds(call) / 1e9

    add("all X W^T", n, lambda: torch.mm(x, w.t(), out=g))
    add("all G W", n, lambda: torch.mm(g, w, out=d_x))
    add("all G^T X", n, lambda: torch.mm(g.t(), x, out=d_w))
    rows = min(n, chunk_rows(n, c, 4, True))
    x, g, d_x = x[:rows], g[:rows], d_x[:rows]
    add("X W^T", rows, lambda: torch.mm(x, w.t(), out=g))
    for size in PARTS:
        add(f"of {size}", rows, lambda size=size: _in_parts(x, w, g, size))  # type: ignore[misc]
    by_rule = Classifier(x, w, None, torch.float32, Needed())
    add("by rule", rows, lambda: by_rule._multiply(x, g))
    add("G W", rows, lambda: torch.mm(g, w, out=d_x))
    add("+ G^T X", rows, lambda: d_w.addmm_(g.t(), x))
    return {"rows": rows, **found}


def _in_parts(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor, size: int) -> None:
    for start in range(0, len(w), size):
        part = slice(start, start + size)
        torch.mm(x, w[part].t(), out=g[:, part])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    for shape in SHAPES:
        print(f"{shape.name}, {args.threads} threads, GFLOP/s")
        print("  " + ", ".join(f"{name} {value:.0f}" for name, value in rates(shape).items()), flush=True)


if __name__ == "__main__":
    main()
