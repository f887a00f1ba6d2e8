"""Classifier and loss in one, from features to the gradients of features and classifier.

Forms besides ours:

* ``eager``: ``F.linear`` and ``F.cross_entropy``, which have the logits in memory three times over;
* ``F.linear_cross_entropy``: PyTorch's own in chunks, of as many rows as ours, so at equal memory; it has no margins;
* ``F.linear_cross_entropy auto``: the same with the chunks that PyTorch chooses;
* ``compile``: ``torch.compile`` of ``eager``.

Besides time, a record has what a step holds beyond inputs and gradients, and the share of the logits that this is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltkernels import functional
from ltkernels.bench import peers, runner
from ltkernels.bench.device import Device
from ltkernels.bench.scenarios import Problem, Scenario, make_problem
from ltkernels.ops.chunked_linear import chunk_rows

CHUNKED = "F.linear_cross_entropy"
AUTO = "F.linear_cross_entropy auto"
LINEAR_SCENARIOS: tuple[Scenario, ...] = (
    Scenario(1024, 8142, "iNaturalist 2018 head", 512),
    Scenario(4096, 21841, "ImageNet-21k head", 64),
    Scenario(2048, 50257, "GPT-2 vocabulary", 512),
)
SLOW = 10_000_000  # logits, from which few rounds have to do
SLOW_ROUNDS = 5
FEATURES = 512  # where a scenario does not say how many
MARGIN, SCALE = 0.4, 16.0

Form = Callable[..., Tensor]


class Head(NamedTuple):
    """Features ``(N, D)`` and classifier ``(C, D)``, which take a gradient; labels; class biases and weights."""

    features: Tensor
    classifier: Tensor
    labels: Tensor
    prior: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Variant:
    """One loss of a linear classifier.

    Attributes:
        name: identifier in records and on the command line.
        title: for tables.
        adjusted: whether logits have class biases and rows class weights.
        cosine: whether logits are cosines with a margin at the label.
    """

    name: str
    title: str
    adjusted: bool = False
    cosine: bool = False

    def forms(self, head: Head) -> dict[str, Form]:
        """Of features and classifier, by name."""
        y, bias = head.labels, head.prior if self.adjusted else None
        weight = head.weight if self.adjusted else None

        def ours(x: Tensor, w: Tensor) -> Tensor:
            if self.cosine:
                return functional.linear_cross_entropy(x, w, y, class_margin=MARGIN, scale=SCALE, normalize=True)
            return functional.linear_cross_entropy(x, w, y, class_bias=bias, weight=weight)

        def eager(x: Tensor, w: Tensor) -> Tensor:
            if self.cosine:
                z = F.linear(F.normalize(x, dim=1), F.normalize(w, dim=1))
                return F.cross_entropy(SCALE * (z - MARGIN * F.one_hot(y, z.shape[1])), y)
            return F.cross_entropy(F.linear(x, w, None if bias is None else bias.to(x)), y, _as(weight, x))

        def chunked(rows: int | None) -> Form:
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
            return lambda x, w: F.linear_cross_entropy(
                x, w, y, linear_bias=None if bias is None else bias.to(x), weight=_as(weight, x), options=options
            )

        found = {peers.OURS: ours, peers.EAGER: eager}
        if not self.cosine:
            x, w = head.features, head.classifier
            found[CHUNKED] = chunked(chunk_rows(len(x), len(w), x.element_size(), x.is_cpu))
            found[AUTO] = chunked(None)
        return found


LINEAR_VARIANTS: tuple[Variant, ...] = (
    Variant("linear_ce", "linear classifier and cross entropy"),
    Variant("linear_la_weight", "linear classifier, logit adjustment and class weights", adjusted=True),
    Variant("linear_cosface", "cosine classifier and CosFace", cosine=True),
)


def _as(weight: Tensor | None, x: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(x.dtype)


def make_head(shape: Scenario, dtype: torch.dtype, device: str, seed: int) -> Head:
    """Random features and classifiers, scaled so that logits have deviation 2; labels by a long tail."""
    generator = torch.Generator(device).manual_seed(seed)
    size = shape.d or FEATURES

    def normal(deviation: float, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * deviation
        return values.to(dtype).requires_grad_()

    problem = make_problem(Scenario(shape.n, shape.c, ""), torch.float32, cosine=False, device=device)
    prior = (problem.class_counts / problem.class_counts.sum()).log().to(torch.float32)
    return Head(
        normal(1.0, shape.n, size), normal(2.0 / size**0.5, shape.c, size), problem.target, prior, problem.weight
    )


def _on(form: Form, head: Head) -> peers.Learning:
    """As a loss without logits, whose gradients are those of features and classifier."""
    learned = (head.features, head.classifier)
    return peers.Learning(lambda x, y: form(*learned), learned)


def measure(variant: Variant, shape: Scenario, device: Device, plan: runner.Plan) -> runner.Measurement:
    """Checks and times every form of one loss on one batch shape.

    Args:
        variant: what to measure.
        shape: rows, classes and features.
        device: where to run.
        plan: mode, type, budget.

    Returns:
        One record a form, and the refused forms with reasons.

    Raises:
        WrongResultError: ours is not the loss in float64.
    """
    dtype = runner.DTYPES[plan.dtype]
    head = make_head(shape, dtype, device.name, plan.seed)
    none = make_problem(Scenario(1, 1, ""), dtype, cosine=False, device=device.name)  # the runner hands over logits
    problem = Problem(none.logits.detach(), none.target, none.class_counts, none.weight)
    exact = Head(
        head.features.detach().double().requires_grad_(), head.classifier.detach().double().requires_grad_(), *head[2:]
    )
    truth = runner.loss_and_grad(_on(variant.forms(exact)[peers.EAGER], exact), problem.logits, problem.target)
    rounding = runner.relative_l2(truth[1].to(dtype), truth[1])
    forms: dict[str, peers.LossFn] = {name: _on(form, head) for name, form in variant.forms(head).items()}
    if plan.compile:
        forms[peers.COMPILE] = peers.compiled(forms[peers.EAGER])
    answers = runner.check_forms(forms, problem, truth)
    del exact, truth
    refused = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    calls = {name: runner.make_call(form, problem, plan.mode) for name, form in forms.items() if name not in refused}
    if shape.n * shape.c >= SLOW:
        plan = replace(plan, min_rounds=min(plan.min_rounds, SLOW_ROUNDS), warm_up_rounds=1)
    samples = runner.interleave(calls, device, plan)
    logits_bytes = shape.n * shape.c * dtype.itemsize
    results = head.features.nbytes + head.classifier.nbytes if plan.mode != "fwd" else 0
    common = {
        **{"op": "linear_cross_entropy", "variant": variant.name, "scenario": shape.name, "source": shape.source},
        **{"N": shape.n, "C": shape.c, "dtype": plan.dtype, "mode": plan.mode, "memory": plan.memory},
        **{"threads": torch.get_num_threads(), "features": head.features.shape[1], "rounding_grad": rounding},
        **{"less_work": False, "model_bytes": None, "frac_copy": None, "logits_bytes": logits_bytes},
    }
    records: list[dict[str, Any]] = []
    for name, call in calls.items():
        error, peak = answers[name], device.peak_bytes(call)
        assert isinstance(error, runner.Error)
        of_form = {
            "peer": name,
            "backend": runner.serving_backend(forms[peers.OURS], problem) if name == peers.OURS else None,
            "launches": runner.count_launches(call) if name != peers.COMPILE else None,
            "peak_mb": round(peak / 2**20, 4),
            "peak_bytes": peak,
            "beyond_bytes": max(0, peak - results),
            "rel_err_loss": error.loss,
            "rel_err_grad": error.grad,
        }
        records.append(common | of_form | runner.time_fields(name, samples))
    return runner.Measurement(records, refused)
