"""What the programs of this folder share: long-tailed digits as tensors, and the accuracy that counts.

The data is scikit-learn's digits, whose training part is cut to an exponential tail: 20 times as many zeros as nines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHON = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PYTHON), str(PYTHON.parent)]  # the demo's modules, and a checkout that nobody has installed

import longtail_data  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

import ltkernels as ltk  # noqa: E402

CLASSES = 10
PIXELS = 64
LOSSES = ("la", "ce")


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 64)`` in [0, 1] with labels; ``class_counts`` ``(10,)`` of the training part."""

    train: TensorDataset
    test: TensorDataset
    labels: Tensor
    class_counts: Tensor


def load_digits(seed: int = 0) -> Digits:
    """The digits, divided anew for each seed."""
    data = longtail_data.load("digits")
    parts = longtail_data.split(data, seed)
    images, labels = torch.from_numpy(np.asarray(data.inputs)), torch.from_numpy(data.labels)
    train, test = (TensorDataset(images[rows], labels[rows]) for rows in (parts.train, parts.test))
    return Digits(train, test, train.tensors[1], torch.from_numpy(parts.class_counts))


def shot_accuracy(logits: Tensor, labels: Tensor, class_counts: Tensor) -> dict[str, float]:
    """Overall, balanced, many-shot, medium-shot, few-shot and prior-weighted accuracy."""
    metric = ltk.metrics.ShotAccuracy(class_counts)
    metric.update(logits, labels)
    return {name: float(value) for name, value in metric.compute().items()}


def line(name: str, accuracy: dict[str, float]) -> str:
    """One line of a table."""
    figures = "  ".join(f"{key} {accuracy[key]:6.1%}" for key in ("balanced", "many", "medium", "few"))
    return f"{name:<28} {figures}"


def resumable(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a program that can be stopped and go on."""
    return parse_resumable(resumable_parser(description), argv)


def resumable_parser(description: str | None) -> argparse.ArgumentParser:
    """The same for a program that has more arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default=LOSSES[0])
    parser.add_argument("--sampler", choices=("instance", "class_balanced", "square_root"), default="instance")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder for the checkpoint of a run that is stopped")
    parser.add_argument("--stop-after", type=int, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser


def parse_resumable(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Refuses arguments that mean nothing together."""
    args = parser.parse_args(argv)
    if (args.resume or args.stop_after is not None) and args.out is None:
        parser.error("--resume and --stop-after need --out")
    return args
