"""The mean of three linear classifiers, from features to gradients of features and classifiers.

Forms besides ours, which all write the logits of every expert:

* ``eager``: one batched product of matrices, biases included, then softmax and mean; where experts share features, one
  product with all classifiers side by side;
* ``published``: a linear layer for each expert, their outputs stacked;
* ``compile``: ``torch.compile`` of ``eager``.

Besides time, a record has what the forward alone holds at most: in the backward, classifiers' gradients hide what
logits take.
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
from ltkernels.bench.peers_experts import EXPERTS
from ltkernels.bench.scenarios import Problem, Scenario, make_problem

FEATURES = {100: 64}
"""Of the usual backbone by number of classes: ResNet-32's for CIFAR; for all others those of ResNet-18."""
OTHER_FEATURES = 512
SLOW = 1_000_000  # logits of an expert, from which few rounds have to do
SLOW_ROUNDS = 5


class Heads(NamedTuple):
    """Features ``(E, N, D)`` or ``(N, D)``, classifiers ``(E, C, D)``, biases ``(E, C)``: all take a gradient."""

    features: Tensor
    weight: Tensor
    bias: Tensor


Form = Callable[..., Tensor]


@dataclass(frozen=True)
class Variant:
    """One mean.

    Attributes:
        name: identifier in records and on the command line.
        title: for tables.
        mode: ``"logits"`` or ``"probs"``.
        shared: whether the experts share features.
    """

    name: str
    title: str
    mode: str
    shared: bool

    def forms(self) -> dict[str, Form]:
        """Of the tensors of :class:`Heads`, by name."""
        return {peers.OURS: self._ours, peers.EAGER: self._eager, peers.PUBLISHED: self._published}

    def _ours(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.expert_linear(x, weight, bias, mode=self.mode)

    def _eager(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if self.shared:
            z, dim = F.linear(x, weight.flatten(0, 1), bias.flatten()).view(len(x), *bias.shape), 1
        else:
            z, dim = torch.baddbmm(bias.unsqueeze(1), x, weight.mT), 0
        return (z if self.mode == "logits" else z.softmax(dim=2)).mean(dim=dim)

    def _published(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        of_expert = [x] * len(weight) if self.shared else list(x)
        logits = torch.stack([F.linear(*layer) for layer in zip(of_expert, weight, bias, strict=True)], dim=1)
        return (logits if self.mode == "logits" else logits.softmax(dim=2)).mean(dim=1)


EXPERT_LINEAR_VARIANTS: tuple[Variant, ...] = (
    Variant("linear_logits", "mean of linear heads", "logits", False),
    Variant("linear_logits_shared", "mean of linear heads, shared features", "logits", True),
    Variant("linear_probs", "mean of linear heads' probabilities", "probs", False),
    Variant("linear_probs_shared", "mean of linear heads' probabilities, shared features", "probs", True),
)


def make_heads(variant: Variant, shape: Scenario, dtype: torch.dtype, device: str, seed: int) -> Heads:
    """Random features and classifiers, scaled so that logits have deviation 2."""
    generator = torch.Generator(device).manual_seed(seed)
    size = FEATURES.get(shape.c, OTHER_FEATURES)

    def normal(deviation: float, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * deviation
        return values.to(dtype).requires_grad_()

    features = normal(1.0, *(() if variant.shared else (EXPERTS,)), shape.n, size)
    return Heads(features, normal(2.0 / size**0.5, EXPERTS, shape.c, size), normal(0.1, EXPERTS, shape.c))


def _on(form: Form, heads: Heads) -> peers.Learning:
    """As a loss without logits, whose gradients are those of the heads."""
    return peers.Learning(lambda x, y: form(*heads), heads)


def measure(variant: Variant, shape: Scenario, device: Device, plan: runner.Plan) -> runner.Measurement:
    """Checks and times every form of one mean on one batch shape.

    Args:
        variant: what to measure.
        shape: rows and classes.
        device: where to run.
        plan: mode, type, budget.

    Returns:
        One record a form, and the refused forms with reasons.

    Raises:
        WrongResultError: ours is not the mean in float64.
    """
    dtype = runner.DTYPES[plan.dtype]
    heads = make_heads(variant, shape, dtype, device.name, plan.seed)
    problem = _problem(dtype, device.name)
    exact = Heads(*(value.detach().double().requires_grad_() for value in heads))
    truth = runner.loss_and_grad(_on(variant.forms()[peers.EAGER], exact), problem.logits, problem.target)
    rounding = runner.relative_l2(truth[1].to(dtype), truth[1])
    forms: dict[str, peers.LossFn] = {name: _on(form, heads) for name, form in variant.forms().items()}
    if plan.compile:
        forms[peers.COMPILE] = peers.compiled(forms[peers.EAGER])
    answers = runner.check_forms(forms, problem, truth)
    del exact, truth
    refused = {name: answer for name, answer in answers.items() if isinstance(answer, str)}
    calls = {name: runner.make_call(form, problem, plan.mode) for name, form in forms.items() if name not in refused}
    forwards = {name: runner.make_call(forms[name], problem, "fwd") for name in calls}
    if shape.n * shape.c >= SLOW:
        plan = replace(plan, min_rounds=min(plan.min_rounds, SLOW_ROUNDS), warm_up_rounds=1)
    samples = runner.interleave(calls, device, plan)
    held = {name: device.peak_bytes(call) for name, call in forwards.items()}
    backend = runner.serving_backend(forms[peers.OURS], problem) if variant.mode == "probs" else None
    common = {
        **{"op": "expert_linear", "variant": variant.name, "scenario": shape.name, "source": shape.source},
        **{"N": EXPERTS * shape.n, "C": shape.c, "dtype": plan.dtype, "mode": plan.mode, "memory": plan.memory},
        **{"threads": torch.get_num_threads(), "features": heads.weight.shape[2], "rounding_grad": rounding},
        **{"less_work": False, "model_bytes": None, "frac_copy": None},
    }
    records: list[dict[str, Any]] = []
    for name, call in calls.items():
        error, peak = answers[name], device.peak_bytes(call)
        assert isinstance(error, runner.Error)
        of_form = {
            "peer": name,
            "backend": backend if name == peers.OURS else None,
            "launches": runner.count_launches(call) if name != peers.COMPILE else None,
            "peak_mb": round(peak / 2**20, 4),
            "peak_bytes": peak,
            "forward_peak_bytes": held[name],
            "forward_peak_ratio": {base: round(held[name] / held[base], 4) for base in held if base != name},
            "rel_err_loss": error.loss,
            "rel_err_grad": error.grad,
        }
        records.append(common | of_form | runner.time_fields(name, samples))
    return runner.Measurement(records, refused)


def _problem(dtype: torch.dtype, device: str) -> Problem:
    """For the runner's functions, which hand logits and labels to a form: these have none."""
    return make_problem(Scenario(1, 1, ""), dtype, cosine=False, device=device)
