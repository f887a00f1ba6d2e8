"""Stage two of decoupled training: the features stay, only the classifier is made anew, for balanced classes.

Stage one is the demo's model, trained with plain cross entropy. Its features of all samples are computed once; then a
step of stage two is drawing a batch, a linear classifier, its loss and its update, and nothing else.

  crt   classifier re-training: a new linear classifier, learnt from class-balanced batches
  lws   learnable weight scaling: a factor for each class on the logits of stage one, learnt the same way
  tau   tau-normalised classifier: stage one's class vectors, divided by a power of their length
  ncm   nearest class mean: no classifier but the means of the classes' features

The tau of "tau" is the best one on a part of the training data, for a stage one that was trained without that part.

  python python/recipes/crt.py                          all four on airport names, two seeds
  python python/recipes/crt.py --method crt --epochs 30 longer
  python python/recipes/crt.py --resume                 again, with stage one from the call before

A table of accuracies by class size is printed, beside stage one's, and kept as results.json in --out.
The exit code is 0, or 1 for a failure, 2 for a wrong option, 130 after Ctrl-C.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, with the
settings of its published code for ImageNet-LT.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the demo's modules
if importlib.util.find_spec("ltkernels") is None:  # a checkout that nobody has installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if missing := [name for name in ("numpy", "torch", "rich") if importlib.util.find_spec(name) is None]:
    sys.exit(f"crt.py needs {', '.join(missing)}; run: pip install 'ltkernels[demo]' (or make setup)")

import longtail_data
import longtail_report as report
import torch
import torch.nn.functional as F
from longtail_arguments import at_least_one
from longtail_features import Stage, stage_one
from rich.console import Console
from torch import Tensor, nn
from workers import UserError

import ltkernels as ltk

BATCH_SIZE = 512
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.2, 0.9, 5e-4
DRAWS_PER_CLASS = 4
EPOCHS = {"crt": 10, "lws": 5}
MOST_TURNS = 11
"""An epoch of class-aware sampling is as long as if every class had as many samples as the largest one. On ImageNet-LT
that is 11 times the training part; here it is up to 120 times, and much of it after nothing changes any more."""
TAUS = tuple(step / 10 for step in range(21))
MOST_LOGITS = 2**28
"""Up to so many logits of stage one's classifier are kept for LWS, a gigabyte; beyond, each batch computes its own."""

TITLES = {
    "stage one": "stage one",
    "crt": "cRT",
    "lws": "LWS",
    "tau": "tau-normalised",
    "ncm un": "NCM",
    "ncm l2n": "NCM, length 1",
    "ncm cl2n": "NCM, centred, length 1",
}
METHODS = ("crt", "lws", "tau", "ncm")


@dataclass(frozen=True)
class Outcome:
    """What a method makes of the test part, and how fast it was.

    Attributes:
        logits: ``(T, C)``, to predict from.
        notes: what else is to be told: seconds, samples a second, the tau chosen.
    """

    logits: Tensor
    notes: dict[str, float] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------ the two trained


def crt(stage: Stage, epochs: int, seed: int) -> Outcome:
    """A new linear classifier on class-balanced batches of the features."""
    torch.manual_seed(seed)
    head = nn.Linear(stage.features.shape[1], stage.num_classes)
    weight, bias = head.weight, head.bias
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)

    def backward(x: Tensor, y: Tensor) -> Tensor:
        # What autograd does for a linear layer on features without a gradient, but into the memory of the last step's
        # gradients. It would take new memory, which for a large classifier the system has to map at every step.
        with torch.no_grad():
            logits = head(x)
        loss = ltk.functional.cross_entropy(logits.requires_grad_(), y)
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.mm(gradient.t(), x, out=weight.grad)
        torch.sum(gradient, 0, out=bias.grad)
        return loss

    notes = train(balanced_batches(stage, stage.features, seed), backward, [weight, bias], epochs)
    with torch.no_grad():
        return Outcome(head(stage.test_features), notes)


def lws(stage: Stage, epochs: int, seed: int) -> Outcome:
    """A factor for each class on stage one's logits, which do not change either: where they fit, they are kept too."""
    scaling = ltk.LearnableWeightScaling(stage.num_classes)
    kept = len(stage.features) * stage.num_classes <= MOST_LOGITS
    batches = balanced_batches(stage, stage.head(stage.features) if kept else stage.features, seed)

    def backward(x: Tensor, y: Tensor) -> Tensor:
        loss = scaling.loss(x if kept else stage.head(x), y)
        scaling.zero_grad()
        loss.backward()
        return loss

    notes = train(batches, backward, [scaling.class_scale], epochs)
    with torch.no_grad():
        return Outcome(scaling(stage.head(stage.test_features)), notes)


def balanced_batches(stage: Stage, rows: Tensor, seed: int) -> ltk.samplers.DeviceBatches:
    """Class-aware batches of ``rows`` ``(M, ...)`` and labels: all classes in turn, four samples of each at a time."""
    counts = stage.run.class_counts
    sampler = ltk.samplers.LongTailSampler(
        stage.labels,
        "class_aware",
        draws_per_class=DRAWS_PER_CLASS,
        num_classes=stage.num_classes,
        num_samples=min(len(counts) * int(counts.max()), MOST_TURNS * len(rows)),
        seed=seed,
    )
    return ltk.samplers.DeviceBatches(sampler, rows, stage.labels, batch_size=min(BATCH_SIZE, len(sampler)))


def train(
    batches: ltk.samplers.DeviceBatches,
    backward: Callable[[Tensor, Tensor], Tensor],
    parameters: Sequence[Tensor],
    epochs: int,
) -> dict[str, float]:
    """Stage two's loop: SGD with momentum, the learning rate falling as a cosine to 0, epoch by epoch.

    Args:
        batches: rows and labels.
        backward: from these to the loss, leaving gradients in ``.grad``.
        parameters: what is trained.
        epochs: how often the batches are gone through.

    Returns:
        Samples seen, seconds, samples a second.

    Raises:
        UserError: the loss is not finite at the end.
    """
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    began = time.perf_counter()
    for _ in range(epochs):
        for rows, labels in batches:
            loss = backward(rows, labels)
            optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    if not torch.isfinite(loss):
        raise UserError(f"stage two: the loss is {loss.item()} in the last of {epochs} epochs")
    samples = epochs * len(batches) * batches.batch_size
    return {"seconds": seconds, "samples": samples, "samples_per_second": samples / seconds}


# ---------------------------------------------------------------------------------------------------- the two computed


def tau_normalised(stage: Stage, tau: float) -> Outcome:
    """Stage one's class vectors over a power of their length; the bias is dropped with it."""
    return Outcome(F.linear(stage.test_features, ltk.rebalance.tau_normalize(stage.head.weight, tau)), {"tau": tau})


def best_tau(stage: Stage) -> float:
    """The tau of the best balanced accuracy on what ``stage`` has as its test part; the smallest of equal ones."""
    balanced = {tau: stage.figures(tau_normalised(stage, tau).logits)["balanced"] for tau in TAUS}
    return max(balanced, key=lambda tau: balanced[tau])


def nearest_class_mean(stage: Stage, kind: str) -> Outcome:
    """Minus the squared distance to each class's mean feature, but for a constant of the row.

    Args:
        stage: the features.
        kind: ``"un"``, as they are; ``"l2n"``, each brought to length 1; ``"cl2n"``, the mean of all taken off first.
            The means are not brought to length 1 again, as published.
    """
    centre = stage.features.mean(0) if kind == "cl2n" else 0.0

    def prepared(features: Tensor) -> Tensor:
        return features if kind == "un" else F.normalize(features - centre)

    means = class_means(prepared(stage.features), stage.labels, stage.num_classes)
    # -|x - m|^2 = 2 x m - |m|^2 - |x|^2, of which the last does not tell classes apart: a linear classifier.
    return Outcome(F.linear(prepared(stage.test_features), 2 * means, -means.square().sum(1)))


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean feature of each class, ``(C, D)``; 0 for a class without samples.

    A class index lists the rows class by class, which is what a bag of embeddings is. It takes as long as reading the
    features, half of what ``index_add_`` takes, and gives the same bits every time, on a GPU too.
    """
    index = ltk.samplers.ClassIndex(labels, num_classes)
    offsets = index.offsets.to(index.members.dtype)
    return F.embedding_bag(index.members, features, offsets, mode="mean", include_last_offset=True)


# ---------------------------------------------------------------------------------------------------------- the program


def outcomes(args: argparse.Namespace, seed: int, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Figures and notes of stage one and of all methods for one seed."""
    began = time.perf_counter()
    stage = stage_one(args.data, seed, args.out / f"ce-seed{seed}.pt", resume=args.resume)
    samples, width = stage.features.shape
    say(
        f"seed {seed}: stage one and {samples} x {width} features, {stage.num_classes} classes,"
        f" {time.perf_counter() - began:.1f} s"
    )
    found = {"stage one": Outcome(stage.head(stage.test_features))}
    for name in args.method:
        if name == "ncm":
            found |= {f"ncm {kind}": nearest_class_mean(stage, kind) for kind in ("un", "l2n", "cl2n")}
        elif name == "tau":
            kept = args.out / f"ce-seed{seed}-validation.pt"
            chosen = best_tau(stage_one(args.data, seed, kept, validate=True, resume=args.resume))
            found[name] = tau_normalised(stage, chosen)
            say(f"seed {seed}: tau {chosen:g} is the best on the validation part")
        else:
            method = {"crt": crt, "lws": lws}[name]
            found[name] = method(stage, args.epochs or EPOCHS[name], seed)
            notes = found[name].notes
            say(
                f"seed {seed}: {TITLES[name]} saw {notes['samples']:,} samples in {notes['seconds']:.1f} s,"
                f" {notes['samples_per_second']:,.0f} a second"
            )
    return {name: {**stage.figures(one.logits), "notes": one.notes} for name, one in found.items()}


def train_and_report(args: argparse.Namespace) -> None:
    """Runs everything, prints the table and writes the results."""
    console = Console() if sys.stdout.isatty() else Console(width=120)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    torch.set_num_threads(1)  # as in train.py: the products are small, and so the number of cores changes nothing
    args.out.mkdir(parents=True, exist_ok=True)  # a folder that can not be written should fail now
    seeds = [outcomes(args, seed, say) for seed in range(args.seeds)]
    methods = {
        name: {
            "title": TITLES[name],
            "accuracy": report.over_seeds([found[name] for found in seeds]),
            "notes": [found[name]["notes"] for found in seeds],
        }
        for name in seeds[0]
    }
    report.write_json(
        args.out / "results.json",
        {
            "data": args.data,
            "seeds": args.seeds,
            "threads": torch.get_num_threads(),
            "versions": {"ltkernels": ltk.__version__, "torch": str(torch.__version__)},
            "methods": methods,
        },
    )
    console.print(report.accuracy_table(methods.values(), "test part", args.seeds))
    say(f"{args.out / 'results.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code (argparse itself exits with 2)."""
    args = parse(argv)
    errors = Console(stderr=True, soft_wrap=True)
    try:
        train_and_report(args)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (OSError, UserError, longtail_data.MissingPackageError) as error:
        errors.print(f"crt.py: {error}", highlight=False, markup=False)
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="crt.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data", choices=list(longtail_data.LOADERS), default="airports", help="data set (default: %(default)s)"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        nargs="+",
        default=METHODS,
        metavar="METHOD",
        help=f"one or more of {', '.join(METHODS)} (default: all)",
    )
    parser.add_argument("--seeds", type=at_least_one, default=2, help="runs of each method (default: %(default)s)")
    parser.add_argument(
        "--epochs",
        type=at_least_one,
        help=f"epochs of stage two (default: {EPOCHS['crt']} of cRT, {EPOCHS['lws']} of LWS)",
    )
    parser.add_argument("--out", type=Path, help="folder of results and of stage one (default: runs/crt/DATA)")
    parser.add_argument("--resume", action="store_true", help="go on with the stage one that is in --out")
    args = parser.parse_args(argv)
    args.method = [method for method in METHODS if method in args.method]
    args.out = args.out or Path("runs") / "crt" / args.data
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: expected a folder, found the file {args.out}")
    return args


if __name__ == "__main__":
    sys.exit(main())
