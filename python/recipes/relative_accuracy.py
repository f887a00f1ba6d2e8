"""Relative accuracy: how much of what is possible without a long tail a method keeps.

A method that is better on any data is better on long-tailed data too. The survey's relative accuracy tells the two
apart: A_t / max(A_v, A_b), with the accuracies on one test set after three trainings of the same model:

  A_t   the method, on the long-tailed set
  A_v   plain cross-entropy, on a balanced set of as many samples
  A_b   the method, on that balanced set

The data is scikit-learn's digits: the demo's exponential tail (124 zeros to 6 nines) and its test part; the balanced
set has as many images in all, from the same pool. The model is a small perceptron, one for each method and set.

  python python/recipes/relative_accuracy.py              all methods, three seeds: some 15 seconds
  python python/recipes/relative_accuracy.py --seeds 10   with less spread

The exit code is 0, or 1 for a failure, 2 for a wrong option, 130 after Ctrl-C.

Source: Zhang et al., "Deep Long-Tailed Learning: A Survey", TPAMI 2023, section 4.1.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the demo's modules
if importlib.util.find_spec("ltkernels") is None:  # a checkout that nobody has installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if missing := [name for name in ("numpy", "torch", "rich") if importlib.util.find_spec(name) is None]:
    sys.exit(f"relative_accuracy.py needs {', '.join(missing)}; run: pip install 'ltkernels[demo]' (or make setup)")

import longtail_data
import numpy as np
import torch
from longtail_arguments import at_least_one
from longtail_data import LongTailData
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import ltkernels as ltk

HIDDEN, BATCH_SIZE, LEARNING_RATE = 64, 32, 3e-3
EPOCHS = 40  # of 417 images: the loss of plain cross-entropy on them is below 0.01 then


@dataclass(frozen=True)
class Method:
    """A loss, made of the counts of the classes it is trained with, and whether its classifier sees directions only."""

    title: str
    loss: Callable[[Tensor], nn.Module]
    cosine: bool = False


METHODS = {
    "ce": Method("cross-entropy", lambda counts: ltk.losses.CrossEntropyLoss()),
    "class-balanced": Method("class-balanced", lambda counts: ltk.losses.ClassBalancedLoss(counts, beta=0.99)),
    "logit-adjusted": Method("logit-adjusted", lambda counts: ltk.losses.LogitAdjustedLoss(counts)),
    "ldam": Method("LDAM", lambda counts: ltk.losses.LDAMLoss(counts), cosine=True),
}


@dataclass(frozen=True)
class Parts:
    """Rows of the data: a long-tailed and a balanced set of as many samples, and a test part that neither has."""

    long_tailed: NDArray[np.int64]
    balanced: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """Accuracies of a method and a seed, and their ratio."""

    long_tailed: float
    plain_on_balanced: float
    method_on_balanced: float

    @property
    def relative(self) -> float:
        return ltk.metrics.relative_accuracy(self.long_tailed, self.plain_on_balanced, self.method_on_balanced)


def divide(data: LongTailData, seed: int) -> Parts:
    """The demo's division; the balanced set is drawn from all that is not in the test part."""
    parts = longtail_data.split(data, seed)
    rows = np.random.default_rng(seed).permutation(len(data.labels))
    rows = rows[~np.isin(rows, parts.test)]
    share, more = divmod(len(parts.train), data.num_classes)
    of_class = [rows[data.labels[rows] == c][: share + (c < more)] for c in range(data.num_classes)]
    return Parts(parts.train, np.concatenate(of_class), parts.test)


def train(data: LongTailData, rows: NDArray[np.int64], method: Method, seed: int, epochs: int = EPOCHS) -> nn.Module:
    """A model that has seen the images at ``rows``."""
    torch.manual_seed(seed)
    images, labels = torch.from_numpy(np.asarray(data.inputs)[rows]), torch.from_numpy(data.labels[rows])
    loss = method.loss(ltk.rebalance.count_classes(labels, data.num_classes))
    head = ltk.CosineLinear(HIDDEN, data.num_classes) if method.cosine else nn.Linear(HIDDEN, data.num_classes)
    model = nn.Sequential(nn.Linear(images.shape[1], HIDDEN), nn.ReLU(), head)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def accuracy(data: LongTailData, test: NDArray[np.int64], model: nn.Module, class_counts: Tensor) -> dict[str, float]:
    """The figures of :func:`ltkernels.metrics.shot_accuracy` on the test part."""
    images, labels = torch.from_numpy(np.asarray(data.inputs)[test]), torch.from_numpy(data.labels[test])
    with torch.no_grad():
        counts = ltk.functional.accuracy_counts(model(images), labels)
    return ltk.metrics.shot_accuracy(*counts, class_counts)


def run(methods: Sequence[str], seeds: int, epochs: int = EPOCHS) -> dict[str, list[Outcome]]:
    """Trains every method on both sets, for every seed."""
    data = longtail_data.load("digits")
    outcomes: dict[str, list[Outcome]] = {name: [] for name in methods}
    for seed in range(seeds):
        parts = divide(data, seed)
        counts = ltk.rebalance.count_classes(data.labels[parts.long_tailed], data.num_classes)

        def top1(name: str, rows: NDArray[np.int64]) -> float:
            model = train(data, rows, METHODS[name], seed, epochs)  # noqa: B023 (called in this turn of the loop)
            return accuracy(data, parts.test, model, counts)["overall"]  # noqa: B023

        plain = top1("ce", parts.balanced)
        for name in methods:
            on_balanced = plain if name == "ce" else top1(name, parts.balanced)
            outcomes[name].append(Outcome(top1(name, parts.long_tailed), plain, on_balanced))
    return outcomes


def table(outcomes: dict[str, list[Outcome]]) -> Table:
    """A row for each method: mean and standard deviation over the seeds, in %."""
    seeds = len(next(iter(outcomes.values())))
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so no spread"
    made = Table("method", title=f"Top-1 accuracy in % on the test part of digits: {spread}")
    for column in ("long-tailed A_t", "plain A_v", "balanced A_b", "relative"):
        made.add_column(column, justify="right")
    for name, found in outcomes.items():
        columns = ("long_tailed", "plain_on_balanced", "method_on_balanced", "relative")
        made.add_row(METHODS[name].title, *(_cell([getattr(one, column) for one in found]) for column in columns))
    return made


def _cell(values: list[float]) -> str:
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code (argparse itself exits with 2)."""
    args = parse(argv)
    torch.set_num_threads(1)  # the model is tiny: a second thread costs more than it does
    try:
        Console().print(table(run(args.method, args.seeds, args.epochs)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except longtail_data.MissingPackageError as error:
        print(f"relative_accuracy.py: {error}", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="relative_accuracy.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--method",
        choices=list(METHODS),
        nargs="+",
        default=list(METHODS),
        metavar="METHOD",
        help=f"one or more of {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument("--seeds", type=at_least_one, default=3, help="runs of each training (default: %(default)s)")
    parser.add_argument("--epochs", type=at_least_one, default=EPOCHS, help="of a training (default: %(default)s)")
    args = parser.parse_args(argv)
    args.method = [method for method in METHODS if method in args.method]
    return args


if __name__ == "__main__":
    sys.exit(main())
