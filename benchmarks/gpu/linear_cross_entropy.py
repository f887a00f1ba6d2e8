"""linear_cross_entropy in the GPU benchmark: classifier and loss in one, against what never has all logits either."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ltkernels as ltk
from benchmarks.gpu.table import CALL, COPY, FORWARD, OURS, SCALED, STEP, Case, Form, Step, Work
from ltkernels.bench import gpu_peers, peers, peers_linear, runner
from ltkernels.bench.scenarios import Scenario

UPSTREAM = 1 / 1024
CCE = "cut-cross-entropy"
SHAPES = (
    Scenario(8192, 128256, "Llama 3 8B", 4096),
    Scenario(4096, 21841, "ImageNet-21k, ViT-L", 1024),
    Scenario(4096, 8142, "iNaturalist 2018, ResNet-50", 2048),
)
VARIANTS = {variant.name: variant for variant in peers_linear.LINEAR_VARIANTS}
MOST_LOGITS = 2**28
"""Of a float64 truth that has them whole, three times over: 6 GB."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of features and classifier."""


@dataclass(frozen=True)
class Inputs:
    """One copy: features and classifier, which are leaves, and the upstream gradients of STEP and SCALED."""

    features: Tensor
    classifier: Tensor
    one: Tensor
    upstream: Tensor


class LinearCrossEntropy:
    name = "linear_cross_entropy"

    def cases(self, quick: bool, dry: bool) -> Sequence[Case]:
        if dry:
            return [self._case(variant, Scenario(9, 37, "tiny", 8), "float32") for variant in VARIANTS]
        if quick:
            return [self._case("linear_ce", SHAPES[1], "bfloat16")]
        return [
            *(self._case("linear_ce", shape, "bfloat16") for shape in SHAPES),
            *(self._case(variant, SHAPES[1], "bfloat16") for variant in VARIANTS if variant != "linear_ce"),
            *(self._case("linear_ce", shape, "float32") for shape in SHAPES[1:]),
        ]

    def _case(self, variant: str, shape: Scenario, dtype: str) -> Case:
        return Case(self.name, variant, shape, dtype, brief=True)

    def prepare(self, case: Case, device: str) -> Work:
        variant, shape, dtype = VARIANTS[case.variant], case.shape, runner.DTYPES[case.dtype]
        head = peers_linear.make_head(shape, dtype, device, seed=0)
        one = torch.ones((), device=device)
        inputs = Inputs(head.features, head.classifier, one, one * UPSTREAM)
        forms = variant.forms(head)
        truth = _truth(forms, inputs, shape.n * shape.c)

        ours = forms.pop(peers.OURS)
        made = [
            Form(OURS + backend, _steps(ours), backend=backend)
            for backend in ltk.available_backends(device)
            if backend != "reference" or device == "cpu"
        ]
        made += [Form(name, _steps(form)) for name, form in forms.items()]
        absent = {}
        for name, peer in ((gpu_peers.LIGER, _liger), (CCE, _cut_cross_entropy)):
            found = peer(case.variant, head.labels) if device == "cuda" else "needs a GPU"
            if isinstance(found, str):
                absent[name] = found
            else:  # both wait for the device within a call
                made.append(Form(name, _steps(found), captured=False))
        made.append(Form(COPY, {STEP: _copy, CALL: _copy, FORWARD: _copy}, less_work=True))

        learned = head.features.nbytes + head.classifier.nbytes
        return Work(
            case,
            inputs,
            _another,
            made,
            truth,
            runner.TOLERANCE[dtype],
            footprint=2 * learned,
            model_bytes={STEP: 3 * learned, FORWARD: learned},  # read in each direction; the gradients
            copied_bytes=2 * head.classifier.nbytes,
            rounding=runner.relative_l2(truth[2].to(dtype), truth[2]),
            absent=absent,
        )


def _truth(forms: dict[str, Any], inputs: Inputs, logits: int) -> tuple[Tensor, ...]:
    """Loss and gradients in float64: of plain PyTorch, or where the logits are too many, of its function in chunks."""
    exact = Inputs(
        inputs.features.detach().double().requires_grad_(),
        inputs.classifier.detach().double().requires_grad_(),
        inputs.one.double(),
        inputs.upstream.double(),
    )
    form = peers.EAGER if logits <= MOST_LOGITS else peers_linear.CHUNKED
    return _steps(forms[form])[STEP](exact)


def _liger(variant: str, labels: Tensor) -> Loss | str:
    """Liger-Kernel's: the gradients are computed in the forward, of chunks of rows."""
    if variant != "linear_ce":
        return f"has no {variant}"
    try:
        functional: Any = importlib.import_module("liger_kernel.transformers.functional")
    except Exception as error:  # not installed, or its own imports fail with this torch or Triton
        return f"cannot be imported: {type(error).__name__}: {error}"
    loss = functional.liger_fused_linear_cross_entropy
    return lambda x, w: loss(x, w, labels)


def _cut_cross_entropy(variant: str, labels: Tensor) -> Loss | str:
    """Apple's, in the mode that leaves no small gradients out."""
    if variant != "linear_ce":
        return f"has no {variant}"
    try:
        module: Any = importlib.import_module("cut_cross_entropy")
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}: {error}"
    return lambda x, w: module.linear_cross_entropy(x, w, labels, impl="cce_exact")


def _another(inputs: Inputs) -> Inputs:
    features, classifier = inputs.features.detach().clone(), inputs.classifier.detach().clone()
    return Inputs(features.requires_grad_(), classifier.requires_grad_(), inputs.one, inputs.upstream)


def _copy(inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs.classifier.detach().clone(),)


def _steps(loss: Loss) -> dict[str, Step]:
    """Features and classifier are views of the leaves, so that no AccumulateGrad copies their gradients."""

    def run(inputs: Inputs, upstream: Tensor | None) -> tuple[Tensor, ...]:
        learned = inputs.features.view_as(inputs.features), inputs.classifier.view_as(inputs.classifier)
        value = loss(*learned)
        gradients = torch.autograd.grad(value, learned, None if upstream is None else upstream.to(value.dtype))
        return value.detach(), *gradients

    def forward(inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(inputs.features, inputs.classifier),)

    return {
        STEP: lambda inputs: run(inputs, inputs.one),
        CALL: lambda inputs: run(inputs, None),
        SCALED: lambda inputs: run(inputs, inputs.upstream),
        FORWARD: forward,
    }
