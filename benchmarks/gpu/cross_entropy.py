"""cross_entropy in the GPU benchmark: shapes, losses, forms, truth and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ltkernels as ltk
from benchmarks.gpu.table import CALL, COPY, FORWARD, OURS, SCALED, STEP, Case, Form, Step, Work
from ltkernels.bench import gpu_peers, peers, runner
from ltkernels.bench.peers import LossFn
from ltkernels.bench.scenarios import SCENARIOS, Problem, Scenario, make_problem

UPSTREAM = 1 / 1024  # as a loss scaler or gradient accumulation sets it; a power of two rounds nothing

LOGITS = 2**26  # of the large batches: 128 MB in bfloat16, beyond every L2
LARGE = tuple(
    Scenario(-(-LOGITS // c), c, source)
    for c, source in (
        (1000, "ImageNet-LT"),
        (4096, "aligned"),
        (16384, "aligned"),
        (1203, "LVIS v1"),
        (1204, "LVIS v1, background included"),
        (365, "Places-LT"),
        (8142, "iNaturalist 2018"),
        (50257, "GPT-2 vocabulary"),
        (128256, "Llama 3 vocabulary"),
        (100, "CIFAR-100-LT"),
    )
)
# What odd class counts are compared with: the next multiple of 8, so that rows start where vectors of 16 bytes do.
EVEN = tuple(Scenario(-(-LOGITS // c), c, f"even neighbour of {odd}") for odd, c in ((365, 368), (8142, 8144)))
COMPILED = {"128x100", "256x1000", "8192x1204", *(s.name for s in LARGE if s.c in (1000, 8142, 50257))}

FIRST, SECOND = ("ce", "la_weight", "ldam"), ("ce_weight_smoothing", "focal")
VARIANTS = {variant.name: variant for variant in peers.VARIANTS}


@dataclass(frozen=True)
class Inputs:
    """One copy: a leaf with the logits, the labels, and the upstream gradients of STEP and SCALED."""

    logits: Tensor
    target: Tensor
    one: Tensor
    upstream: Tensor


class CrossEntropy:
    name = "cross_entropy"
    variants = VARIANTS

    def cases(self, quick: bool, dry: bool) -> Sequence[Case]:
        if dry:
            shapes = (Scenario(6, 5, "tiny"), Scenario(9, 37, "tiny"))
            return [self._case("ce", s, d) for d in ("bfloat16", "float32") for s in shapes] + [
                self._case(variant, shapes[1], "float32") for variant in (*FIRST[1:], *SECOND)
            ]
        if quick:
            shapes = (*(s for s in LARGE if s.c in (1000, 1203, 50257)), SCENARIOS[2])
            return [self._case(variant, s, "bfloat16") for variant in FIRST[:2] for s in shapes]
        return list(self._all())

    def _all(self) -> Iterator[Case]:
        for dtype in ("bfloat16", "float32"):
            yield from (self._case("ce", shape, dtype) for shape in (*LARGE, *(EVEN if dtype == "bfloat16" else ())))
            yield from (self._case(variant, shape, dtype) for shape in SCENARIOS for variant in FIRST)
            yield from (self._case(variant, shape, dtype) for variant in FIRST[1:] for shape in LARGE)
            yield from (self._case(variant, shape, dtype) for shape in (*LARGE, *SCENARIOS) for variant in SECOND)

    def _case(self, variant: str, shape: Scenario, dtype: str) -> Case:
        compile = dtype == "bfloat16" and variant in FIRST and shape.name in COMPILED
        return Case(self.name, variant, shape, dtype, compile, brief=dtype == "float32" or variant in SECOND)

    def prepare(self, case: Case, device: str) -> Work:
        variant, dtype, shape = self.variants[case.variant], runner.DTYPES[case.dtype], case.shape
        problem = make_problem(shape, dtype, cosine=variant.cosine, experts=variant.experts, device=device)
        one = self.upstream(problem)
        inputs = Inputs(problem.logits.detach().requires_grad_(), problem.target, one, one * UPSTREAM)
        exact = inputs.logits.detach().double().requires_grad_()
        truth = runner.loss_and_grad(variant.eager(problem, torch.float64), exact, problem.target)
        del exact

        forms = [
            Form(OURS + backend, _steps(peers.our_function(variant, problem)), backend=backend)
            for backend in ltk.available_backends(device)
            if backend != "reference" or device == "cpu"
        ]
        forms.append(Form(peers.EAGER, _steps(variant.eager(problem, torch.float32))))
        if case.compile:
            steps = _steps(peers.compiled(variant.eager(problem, torch.float32)))
            del steps[FORWARD]  # without gradients it would be compiled once more
            forms.append(Form(peers.COMPILE, steps))
        absent = dict(gpu_peers.LEFT_OUT)
        liger = gpu_peers.liger(case.variant, problem) if device == "cuda" else "needs a GPU"
        if isinstance(liger, str):
            absent[gpu_peers.LIGER] = liger
        else:
            forms.append(
                Form(gpu_peers.LIGER, _steps(liger.loss), None, liger.captured, liger.overwrites, note=liger.note)
            )
        forms.append(Form(COPY, {STEP: _copy, CALL: _copy, FORWARD: _copy}, less_work=True))

        logits_bytes = problem.logits.numel() * dtype.itemsize
        beside = 8 * shape.n + 4 * shape.c  # labels and a table, at each pass
        return Work(
            case,
            inputs,
            _another,
            forms,
            truth,
            runner.TOLERANCE[dtype],
            footprint=2 * logits_bytes,
            model_bytes={STEP: 3 * logits_bytes + 2 * beside, FORWARD: logits_bytes + beside},
            copied_bytes=2 * logits_bytes,
            rounding=runner.relative_l2(truth[1].to(dtype), truth[1]),
            absent=absent,
        )

    def upstream(self, problem: Problem) -> Tensor:
        """The upstream gradient of STEP."""
        return torch.ones((), device=problem.logits.device)


def _another(inputs: Inputs) -> Inputs:
    logits = inputs.logits.detach().clone().requires_grad_()
    return Inputs(logits, inputs.target.clone(), inputs.one, inputs.upstream)


def _copy(inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs.logits.detach().clone(),)


def _steps(loss: LossFn) -> dict[str, Step]:
    """Logits are a view of the leaf, as a head hands them over: no AccumulateGrad copies their gradient.

    The view is made in the call, on the stream of the call, because a graph may hold nothing of another stream.
    """

    def run(inputs: Inputs, upstream: Tensor | None) -> tuple[Tensor, ...]:
        logits = inputs.logits.view_as(inputs.logits)
        value = loss(logits, inputs.target)
        (gradient,) = torch.autograd.grad(value, logits, None if upstream is None else upstream.to(value.dtype))
        return value.detach(), gradient

    def forward(inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(inputs.logits, inputs.target),)

    return {
        STEP: lambda inputs: run(inputs, inputs.one),
        CALL: lambda inputs: run(inputs, None),
        SCALED: lambda inputs: run(inputs, inputs.upstream),
        FORWARD: forward,
    }
