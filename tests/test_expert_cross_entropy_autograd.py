"""expert_cross_entropy: derivatives, the ways into the op, compilers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from autograd_cases import ENTRIES, through_dispatcher
from cross_entropy_cases import Form, each_form
from expert_cases import NAMES, expert_cross_entropy, labels, logits, options_of
from torch import Tensor

import ltkernels as ltk
from ltkernels.ops import expert_cross_entropy as op
from ltkernels.ops.options import ExpertCrossEntropyOptions, Reduction


def both(z: Tensor, y: Tensor, **options: Any) -> Tensor:
    """A number that loss and mean go into, neither with the gradient 1."""
    loss, mean = expert_cross_entropy(z, y, aggregate=True, **options)
    return 1.5 * loss.sum() + mean.square().sum()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_twice(name: str, entry: str) -> None:
    z, y = logits(2, 3, 4, spread=1.0).requires_grad_(), torch.tensor([0, 3, 1])
    options = options_of(2, 3, 4)[name]

    def loss(x: Tensor) -> Tensor:
        return both(x, y, **options)

    # The mean in the experts' divergence takes no gradient, which shows in second derivatives only: what would flow
    # through it, sum_e t_j (log pm_j - log p_ej) less its mean, is 0, because the t z_e add up to E t zbar.
    assert torch.autograd.gradcheck(ENTRIES[entry](loss), z)
    options["diversity_factor"] = 0.0
    assert torch.autograd.gradgradcheck(ENTRIES[entry](loss), z, fast_mode=True)


def test_second_derivatives_of_the_diversity() -> None:
    """Of the kernel's gradient as of the reference's, whose mean is detached."""
    y, direction = torch.tensor([0, 3, 1]), logits(2, 3, 4)
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(1)
        z = logits(2, 3, 4, spread=1.0).requires_grad_()
        with ltk.use_backend(backend):
            (first,) = torch.autograd.grad(expert_cross_entropy(z, y, diversity_factor=-0.3), z, create_graph=True)
            results.append(torch.autograd.grad(first, z, direction)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", NAMES)
def test_torch_func(name: str) -> None:
    z, y = logits(3, 4, 5), labels(4, 5)
    options = options_of(3, 4, 5)[name]
    variable = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(both(variable, y, **options), variable)
    step = torch.func.grad(lambda x: both(x, y, **options))
    torch.testing.assert_close(step(z), expected)
    many = torch.stack([z, z + 1, z * 2])
    torch.testing.assert_close(torch.func.vmap(step)(many), torch.stack([step(one) for one in many]))
    losses, means = torch.func.vmap(lambda x: expert_cross_entropy(x, y, aggregate=True, **options))(many)
    torch.testing.assert_close(losses, torch.stack([expert_cross_entropy(one, y, **options) for one in many]))
    torch.testing.assert_close(means, many.mean(1))


def test_forward_mode() -> None:
    z, y, tangent = logits(3, 4, 5), labels(4, 5), logits(3, 4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once a process: the reference computes this
        value, along = torch.func.jvp(lambda x: both(x, y), (z,), (tangent,))
    torch.testing.assert_close(value, both(z, y))
    torch.testing.assert_close(along, (torch.func.grad(lambda x: both(x, y))(z) * tangent).sum())


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_upstream_gradients_of_loss_and_mean(form: Form, dtype: torch.dtype) -> None:
    """Either alone, both together, again with the graph kept."""
    z, y = logits(3, 4, 5, dtype=dtype).to(form.device).requires_grad_(), labels(4, 5).to(form.device)
    with form.use():
        outputs = expert_cross_entropy(z, y, aggregate=True, diversity_factor=-0.2)
        upstream = [torch.randn_like(out) for out in outputs]
        separate = [
            torch.autograd.grad(out, z, up, retain_graph=True)[0] for out, up in zip(outputs, upstream, strict=True)
        ]
        again = [torch.autograd.grad(outputs, z, upstream, retain_graph=True)[0] for _ in range(2)]
    torch.testing.assert_close(separate[1], (upstream[1] / 3).to(dtype).expand(3, 4, 5))
    assert torch.equal(again[0], separate[0] + separate[1])
    assert torch.equal(again[1], again[0])


def test_batches_of_upstream_gradients() -> None:
    z, y = logits(3, 4, 5).requires_grad_(), labels(4, 5)
    for reduction in ("mean", "none"):
        outputs = expert_cross_entropy(z, y, reduction=reduction, aggregate=True, diversity_factor=-0.2)
        upstream = [torch.randn(2, *out.shape, dtype=out.dtype) for out in outputs]
        (batch,) = torch.autograd.grad(outputs, z, upstream, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(outputs, z, one, retain_graph=True)[0] for one in zip(*upstream, strict=True)]
        torch.testing.assert_close(batch, torch.stack(each))


@pytest.mark.filterwarnings("ignore:ltkernels. expert_cross_entropy does not use the cpu backend")
def test_learned_tables_have_a_gradient() -> None:
    z, y = logits(2, 3, 4), torch.tensor([0, 3, 1])
    bias, margin = logits(2, 4).requires_grad_(), logits(4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda b, m: expert_cross_entropy(z, y, class_bias=b, class_margin=m), (bias, margin)
    )


def test_teacher_and_temperatures_take_no_gradient() -> None:
    """Nor is the reference needed for those that require one."""
    z, y, teacher = logits(2, 3, 4), torch.tensor([0, 3, 1]), logits(3, 4).requires_grad_()
    temperature = (torch.rand(4, dtype=torch.float64) + 0.5).requires_grad_()
    with ltk.use_backend("cpu"):
        loss = expert_cross_entropy(
            z.requires_grad_(), y, teacher=teacher, diversity_factor=-0.2, diversity_temperature=temperature
        )
    loss.backward()
    assert z.grad is not None
    assert teacher.grad is temperature.grad is None


def operands(aggregate: bool, reduction: int) -> tuple[tuple[Tensor | None, ...], ExpertCrossEntropyOptions]:
    """A call as the op takes it, with everything that may be given."""
    z, table = logits(2, 4, 5, dtype=torch.float32).requires_grad_(), torch.rand(2, 5)
    tensors = (z, labels(4, 5), table, None, table, table, torch.rand(6) + 0.5, torch.rand(4), torch.randn(4, 5))
    return tensors, ExpertCrossEntropyOptions(reduction=reduction, diversity=0.2, distillation=1.0, aggregate=aggregate)


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize("reduction", [Reduction.NONE, Reduction.SUM, Reduction.MEAN_WEIGHT])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str, reduction: int, aggregate: bool) -> None:
    tensors, options = operands(aggregate, reduction)
    with ltk.use_backend(backend):
        torch.library.opcheck(op.OP.forward.default, (*tensors, *options))
        loss, state = op.OP.forward(*tensors, *options)
        held = tuple(None if value is None else value.detach() for value in tensors)
        torch.library.opcheck(op.OP.backward.default, (torch.ones_like(loss), state.detach(), *held, *options, True))


def test_a_forward_by_the_reference_has_its_backward() -> None:
    """Through the op, whose backward may run where another backend is chosen."""
    z, y = logits(3, 4, 5), labels(4, 5)
    options = options_of(3, 4, 5)["all"]
    gradients = []
    for backend in ("reference", "cpu"):
        x = z.clone().requires_grad_()
        with ltk.use_backend(backend):
            total = through_dispatcher(lambda v: both(v, y, **options))(x)
        gradients.append(torch.autograd.grad(total, x)[0])
    torch.testing.assert_close(*gradients)


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    y, rng = labels(4, 37), torch.randn(3, 37)

    def step(experts: list[Tensor]) -> Tensor:
        plain = expert_cross_entropy(experts, y, class_bias=rng, diversity_factor=-0.2, diversity_temperature=2.0)
        return plain + both(torch.stack(experts), y, teacher=rng[0].expand(4, 37), class_margin=0.5)

    pair = [[z.clone().requires_grad_() for z in logits(3, 4, 37, dtype=torch.float32)]]
    pair.append([z.detach().clone().requires_grad_() for z in pair[0]])
    losses = step(pair[0]), torch.compile(step, fullgraph=True, backend="aot_eager")(pair[1])
    assert torch.equal(*losses)
    for mine, other in zip(*(torch.autograd.grad(*call) for call in zip(losses, pair, strict=True)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


def test_autocast() -> None:
    layer, y = torch.nn.Linear(6, 5), labels(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        experts = [layer(torch.randn(4, 6)) for _ in range(3)]
        loss, mean = expert_cross_entropy(experts, y, aggregate=True)
    assert (experts[0].dtype, loss.dtype, mean.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    (loss + mean.sum()).backward()
    assert layer.weight.grad is not None and bool(layer.weight.grad.isfinite().all())


def test_the_mean_may_not_be_changed_before_the_backward() -> None:
    """The two are in one memory: where the backward reads it, PyTorch's version counter says so."""
    z = logits(2, 3, 4).requires_grad_()
    for changed in (lambda mean: mean.add_(1.0), lambda mean: mean.detach().add_(1.0)):
        loss, mean = expert_cross_entropy(z, torch.tensor([0, 3, 1]), reduction="none", aggregate=True)
        changed(mean)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()
