"""aggregate_experts: derivatives, the ways into the op, compilers."""

from __future__ import annotations

import warnings

import pytest
import torch
from autograd_cases import ENTRIES, Subclass
from expert_cases import MODES, aggregate_experts, logits, weights_of
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import aggregate_experts as op
from ltkernels.ops.options import AggregateExpertsOptions, AggregateMode, ExpertWeights


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["equal", "expert", "sample", "class"])
def test_gradcheck_twice(mode: str, kind: str, entry: str) -> None:
    z, weight = logits(2, 3, 4, spread=1.0).requires_grad_(), weights_of(2, 3, 4)[kind]
    variables = (z,) if weight is None else (z, (weight + 0.1).requires_grad_())
    mean = ENTRIES[entry](lambda *v: aggregate_experts(*v, mode=mode))
    assert torch.autograd.gradcheck(mean, variables)
    assert torch.autograd.gradgradcheck(mean, variables, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["expert", "sample", "class"])
def test_torch_func_and_second_backward(mode: str, kind: str) -> None:
    z, weight = logits(3, 4, 5), weights_of(3, 4, 5)[kind]

    def total(x: Tensor, w: Tensor) -> Tensor:
        return aggregate_experts(x, w, mode).square().sum()

    variables = z.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = total(*variables)
    first, second = (torch.autograd.grad(loss, variables, retain_graph=True) for _ in range(2))
    step = torch.func.grad(total, argnums=(0, 1))
    for one, other, of in zip(first, second, step(z, weight), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(of, one)
    many = torch.stack([z, z + 1, z * 2])
    each = zip(*(step(one, weight) for one in many), strict=True)
    for batch, single in zip(torch.func.vmap(step, (0, None))(many, weight), each, strict=True):
        torch.testing.assert_close(batch, torch.stack(single))


def test_best_classes_under_vmap() -> None:
    many = logits(4, 3, 6, 5)
    best = torch.func.vmap(lambda x: tuple(aggregate_experts(x, mode="probs", topk=2)))(many)
    each = zip(*(aggregate_experts(z, mode="probs", topk=2) for z in many), strict=True)
    for batch, single in zip(best, each, strict=True):
        torch.testing.assert_close(batch, torch.stack(single))


def test_forward_mode() -> None:
    z, weight, tangent = logits(3, 4, 5), torch.rand(3, dtype=torch.float64), logits(3, 4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once a process: the reference computes this
        value, along = torch.func.jvp(lambda x: aggregate_experts(x, weight, "probs"), (z,), (tangent,))
    torch.testing.assert_close(value, aggregate_experts(z, weight, "probs"))
    expected = torch.func.jacrev(lambda x: aggregate_experts(x, weight, "probs"))(z)
    torch.testing.assert_close(along, torch.einsum("icekj,ekj->ic", expected, tangent))


@pytest.mark.parametrize("kind", ExpertWeights)
@pytest.mark.parametrize("mode", AggregateMode)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str, mode: AggregateMode, kind: ExpertWeights) -> None:
    z, weight = logits(2, 4, 5, dtype=torch.float32).requires_grad_(), list(weights_of(2, 4, 5).values())[kind]
    weight = None if weight is None else weight.float().requires_grad_()
    options = AggregateExpertsOptions(int(mode), int(kind), 2 if mode == AggregateMode.PROBS else 0)
    with ltk.use_backend(backend):
        torch.library.opcheck(op.OP.forward.default, (z, weight, *options))
        mean, state = op.OP.forward(z, weight, *options)
        held = z.detach(), None if weight is None else weight.detach()
        call = (torch.randn(4, 5), state.detach(), *held, *options, True, weight is not None)
        torch.library.opcheck(op.OP.backward.default, call)


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_by_the_reference_has_its_backward(mode: str) -> None:
    """Through the op, whose backward may run where another backend is chosen."""
    z, weight = logits(3, 4, 5), weights_of(3, 4, 5)["sample"]
    found = []
    for backend in ("reference", "cpu"):
        variables = z.clone().requires_grad_(), weight.clone().requires_grad_()
        with ltk.use_backend(backend):
            best = aggregate_experts(variables[0].as_subclass(Subclass), variables[1], mode, topk=2)
        gradients = torch.autograd.grad(best.output.square().sum(), variables)
        found.append([value.as_subclass(Tensor) for value in (best.classes, best.confidence, *gradients)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", ["expert", "sample", "class"])
def test_compiles_to_one_graph(kind: str) -> None:
    torch._dynamo.reset()

    def step(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        best = aggregate_experts(z, w, "probs", topk=2)
        return best.output.square().sum() + aggregate_experts(list(z.unbind()), mode="log_probs").sum(), best.classes

    z, w = logits(3, 4, 5, dtype=torch.float32), weights_of(3, 4, 5)[kind].float()
    pairs = [(z.clone().requires_grad_(), w.clone().requires_grad_()) for _ in range(2)]
    results = step(*pairs[0]), torch.compile(step, fullgraph=True, backend="aot_eager")(*pairs[1])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    gradients = [torch.autograd.grad(total, pair) for (total, _), pair in zip(results, pairs, strict=True)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7)
