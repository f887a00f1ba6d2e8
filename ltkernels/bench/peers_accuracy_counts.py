"""Counting right predictions of each class, batch by batch as an evaluation does it.

Forms besides ours, all of which add to the counts of the batches before:

* ``eager``: the cheapest way we know in plain PyTorch: the largest logit of a row against the label's, or for several
  guesses how many are larger, then ``index_add_``. A label that ties with the best counts as right there, which is why
  the usual form is another; the logits here have no ties;
* ``usual``: ``argmax`` or ``topk``, a comparison, two ``bincount``;
* ``published``: research code's many-shot accuracy (Liu et al. 2019): softmax, the largest probability, then a loop
  over the classes that compares all labels and predictions with each;
* ``torchmetrics``: ``MulticlassRecall`` of each class without its checks of arguments, where that is installed. It
  counts false positives and true negatives too: what it is replaced for, not the same work;
* ``ltkernels module``: ``ShotAccuracy.update``; ``compile``: ``torch.compile`` of ``eager``;
* ``amax``: only the largest logit of each row: that all of them are read, less work.

How much ours reads depends on how often the model is right, since a row is left where a better class was found. Half of
the rows are right, in one variant all of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltkernels import functional, metrics
from ltkernels.backends import explain
from ltkernels.bench import peers, runner
from ltkernels.bench.device import Call, Device
from ltkernels.bench.scenarios import Scenario, make_problem

USUAL = "usual"
TORCHMETRICS = "torchmetrics"
AMAX = "amax"
SLOW = 1_000_000  # logits, from which few rounds have to do: torchmetrics takes C^2 numbers a batch
SLOW_ROUNDS = 5

ACCURACY_SCENARIOS: tuple[Scenario, ...] = (
    Scenario(128, 100, "CIFAR-100-LT"),
    Scenario(4096, 10, "CIFAR-10-LT"),
    Scenario(512, 1000, "ImageNet-LT"),
    Scenario(512, 8142, "iNaturalist 2018"),
)


class Batch(NamedTuple):
    """Logits ``(N, C)`` without ties between the label's and others, and labels ``(N,)``."""

    logits: Tensor
    target: Tensor


class Counts(NamedTuple):
    """What forms add to: int64 ``(C,)`` each."""

    correct: Tensor
    total: Tensor


Form = Callable[[Tensor, Tensor, Counts], object]


@dataclass(frozen=True)
class Variant:
    """One way to count.

    Attributes:
        name: identifier in records and on the command line.
        title: for tables.
        top_k: guesses of a row.
        right: share of the rows whose best guess is right.
    """

    name: str
    title: str
    top_k: int
    right: float

    def forms(self) -> dict[str, Form]:
        """Functions of logits, labels and counts, by name; all but ours for any device."""
        forms: dict[str, Form] = {peers.OURS: self._ours, peers.EAGER: self._eager, USUAL: self._usual}
        return forms | ({peers.PUBLISHED: _published} if self.top_k == 1 else {})

    def _ours(self, x: Tensor, y: Tensor, counts: Counts) -> None:
        functional.accuracy_counts(x, y, *counts, top_k=self.top_k)

    def _eager(self, x: Tensor, y: Tensor, counts: Counts) -> None:
        own = x.gather(1, y.unsqueeze(1))
        if self.top_k == 1:
            right = x.amax(dim=1) == own.squeeze(1)
        else:
            right = (x > own).sum(dim=1, dtype=torch.int32) < self.top_k
        counts.total.index_add_(0, y, torch.ones_like(y))
        counts.correct.index_add_(0, y, right.long())

    def _usual(self, x: Tensor, y: Tensor, counts: Counts) -> None:
        classes = len(counts.total)
        if self.top_k == 1:
            right = x.argmax(dim=1) == y
        else:
            right = (x.topk(self.top_k, dim=1).indices == y.unsqueeze(1)).any(dim=1)
        counts.total.add_(torch.bincount(y, minlength=classes))
        counts.correct.add_(torch.bincount(y[right], minlength=classes))


def _published(x: Tensor, y: Tensor, counts: Counts) -> None:
    predicted = x.softmax(dim=1).max(dim=1)[1].cpu().numpy()
    labels = y.cpu().numpy()
    for label in set(labels.tolist()):
        of_class = labels == label
        counts.total[label] += int(of_class.sum())
        counts.correct[label] += int((predicted[of_class] == labels[of_class]).sum())


ACCURACY_VARIANTS: tuple[Variant, ...] = (
    Variant("top_1", "top-1, half of the rows right", 1, 0.5),
    Variant("top_1_right", "top-1, all rows right", 1, 1.0),
    Variant("top_5", "top-5, half of the rows right at once", 5, 0.5),
)


def make_batch(variant: Variant, shape: Scenario, dtype: torch.dtype, device: str, seed: int) -> Batch:
    """Random logits with long-tailed labels, of which ``variant.right`` are lifted above all others of their row.

    Others are left where they are. What ties with a label's logit, in half types, is made smaller.
    """
    problem = make_problem(shape, dtype, cosine=False, device=device, seed=seed)
    x, label = problem.logits.detach().clone(), problem.target.unsqueeze(1)
    generator = torch.Generator().manual_seed(seed)
    lifted = (torch.rand(shape.n, 1, generator=generator) < variant.right).to(device)
    own = torch.where(lifted, x.amax(dim=1, keepdim=True) + 1, x.gather(1, label)).to(dtype)
    x = torch.where(x == own, x - 1, x).scatter(1, label, own)
    return Batch(x, problem.target)


def _zeros(shape: Scenario, device: str) -> Counts:
    return Counts(*torch.zeros((2, shape.c), dtype=torch.int64, device=device).unbind())


def _torchmetrics(variant: Variant, shape: Scenario, device: str) -> Any:
    """A metric, or the reason why there is none."""
    try:
        package = importlib.import_module("torchmetrics.classification")
    except ImportError:
        return "is not installed"
    if shape.c < 2:
        return "expects two classes at least"
    top_k = variant.top_k
    return package.MulticlassRecall(shape.c, average=None, top_k=top_k, validate_args=False).to(device)


def _counted(form: Form, batch: Batch, shape: Scenario, device: str) -> Counts:
    counts = _zeros(shape, device)
    form(*batch, counts)
    return counts


def measure(variant: Variant, shape: Scenario, device: Device, plan: runner.Plan) -> runner.Measurement:
    """Checks and times every form of one way to count on one batch shape.

    Args:
        variant: what to measure.
        shape: rows and classes.
        device: where to run.
        plan: type and budget; the mode means nothing here.

    Returns:
        One record a form, and the refused forms with reasons.

    Raises:
        WrongResultError: the counts of ours are wrong.
        ValueError: fewer classes than ``variant`` has guesses.
    """
    if shape.c < variant.top_k:
        raise ValueError(f"scenario: expected at least {variant.top_k} classes for {variant.name}, found {shape.name}")
    dtype = runner.DTYPES[plan.dtype]
    batch = make_batch(variant, shape, dtype, device.name, plan.seed)
    best = batch.logits.double().sort(dim=1, descending=True).indices[:, : variant.top_k]
    right = (best == batch.target.unsqueeze(1)).any(dim=1)
    truth = [torch.bincount(labels, minlength=shape.c) for labels in (batch.target[right], batch.target)]

    forms = variant.forms()
    if plan.compile:
        forms[peers.COMPILE] = torch.compile(forms[peers.EAGER], dynamic=False)
    refused: dict[str, str] = {}
    calls: dict[str, Call] = {}
    for name, form in forms.items():
        reason = _refusal(lambda form=form: _counted(form, batch, shape, device.name), truth)  # type: ignore[misc]
        if reason is None:
            counts = _zeros(shape, device.name)
            calls[name] = lambda form=form, counts=counts: form(*batch, counts)  # type: ignore[misc]
        elif name == peers.OURS:
            raise runner.WrongResultError(f"ltkernels, {variant.name} of {shape.name}: {reason}")
        else:
            refused[name] = reason
    _add_metrics(calls, refused, variant, shape, device, batch, truth)
    calls[AMAX] = lambda: batch.logits.amax(dim=1)

    if shape.n * shape.c >= SLOW:
        plan = replace(plan, min_rounds=min(plan.min_rounds, SLOW_ROUNDS), warm_up_rounds=1)
    samples = runner.interleave(calls, device, plan)
    backend = explain(functional.accuracy_counts, *batch, top_k=variant.top_k).backend
    common = {
        **{"op": "accuracy_counts", "variant": variant.name, "scenario": shape.name, "source": shape.source},
        **{"N": shape.n, "C": shape.c, "dtype": plan.dtype, "mode": "one batch", "memory": plan.memory},
        **{"threads": torch.get_num_threads()},
        **dict.fromkeys(("frac_copy", "rel_err_loss", "rel_err_grad", "rounding_grad")),
    }
    most_read = shape.n * (shape.c * dtype.itemsize + 8)
    records = []
    for name, call in calls.items():
        peak = device.peak_bytes(call)
        of_form = {
            "peer": name,
            "less_work": name == AMAX,
            "backend": backend if name == peers.OURS else None,
            "model_bytes": None if name == AMAX else most_read,
            "launches": runner.count_launches(call) if name != peers.COMPILE else None,
            "peak_mb": round(peak / 2**20, 4),
            "peak_bytes": peak,
        }
        records.append(common | of_form | runner.time_fields(name, samples))
    return runner.Measurement(records, refused)


def _refusal(count: Callable[[], Counts], truth: list[Tensor]) -> str | None:
    """Why a form may not be compared."""
    try:
        found = count()
    except Exception as error:  # a peer's own failure, a missing C++ compiler for torch.compile for one
        return f"does not run: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    good = all(torch.equal(mine, right) for mine, right in zip(found, truth, strict=True))
    return None if good else "counts otherwise"


def _add_metrics(
    calls: dict[str, Call],
    refused: dict[str, str],
    variant: Variant,
    shape: Scenario,
    device: Device,
    batch: Batch,
    truth: list[Tensor],
) -> None:
    """Metrics, which hold their counts themselves. ShotAccuracy is named here: it imports torchmetrics, for seconds."""
    module = metrics.ShotAccuracy(torch.ones(shape.c), top_k=variant.top_k).to(device.name)
    metric = _torchmetrics(variant, shape, device.name)

    def of_ours() -> Counts:
        module.update(*batch)
        return Counts(module.correct, module.total)

    def of_theirs() -> Counts:
        metric.update(*batch)
        return Counts(metric.tp, metric.tp + metric.fn)

    found: list[tuple[str, Any, Callable[[], Counts]]] = [
        (peers.MODULE, module, of_ours),
        (TORCHMETRICS, metric, of_theirs),
    ]
    for name, updated, count in found:
        reason = updated if isinstance(updated, str) else _refusal(count, truth)
        if reason is None:
            calls[name] = lambda updated=updated: updated.update(*batch)  # type: ignore[misc]
        else:
            refused[name] = reason
