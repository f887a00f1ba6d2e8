"""What the tests of several experts share: logits in any layout, the calls of expert_cross_entropy, a truth to meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from cross_entropy_cases import Form
from torch import Tensor

import ltkernels as ltk

aggregate_experts = ltk.functional.aggregate_experts
expert_cross_entropy = ltk.functional.expert_cross_entropy
MODES = ("logits", "probs", "log_probs")

# The same logits in memory that kernels find harder; what lies between them is NaN, so that reading it shows.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "samples first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "classes first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "padded": lambda x: F.pad(x, (0, 3), value=math.nan)[..., :-3],
    "offset": lambda x: F.pad(x.flatten(), (1, 0), value=math.nan)[1:].view(x.shape),
    "every second sample": lambda x: torch.stack([x, torch.full_like(x, math.nan)], dim=2).flatten(1, 2)[:, ::2],
    "every second class": lambda x: torch.stack([x, torch.full_like(x, math.nan)], dim=3)[..., 0],
}


def logits(*shape: int, dtype: torch.dtype = torch.float64, spread: float = 3.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * spread).to(dtype)


def weights_of(experts: int, rows: int, classes: int) -> dict[str, Tensor | None]:
    """Weights of a mean by what they depend on; one of the experts has none in places."""

    def table(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64) + 0.1

    by_class = table(experts, classes)
    by_class[0, ::2] = 0.0 if experts > 1 else 1.0
    by_sample = table(rows, experts)
    by_sample[::2, -1] = 0.0 if experts > 1 else 1.0
    return {"equal": None, "expert": table(experts), "sample": by_sample, "class": by_class}


def labels(rows: int, classes: int) -> Tensor:
    y = torch.randint(0, classes, (rows,))
    y[1 % rows] = -100
    return y


def options_of(experts: int, rows: int, classes: int) -> dict[str, dict[str, Any]]:
    """Calls by name: each method, and everything at once."""

    def table(*shape: int, low: float = 0.5) -> Tensor:
        return torch.rand(shape, dtype=torch.float64) + low

    return {
        "plain": {},
        "ride": {"class_margin": 10 * table(classes), "diversity_factor": -0.2},
        "ride late": {
            "class_margin": 10 * table(classes),
            "weight": table(classes),
            "diversity_factor": -0.2,
            "diversity_temperature": table(classes),
        },
        "scaled": {"scale": 0.7, "diversity_factor": 0.3},  # the cross-entropies alone are
        "sade": {"class_bias": logits(experts, classes)},
        "distilled": {"teacher": logits(rows, classes), "distillation_temperature": 1.5},
        "all": {
            "scale": 0.7,
            "weight": table(experts, classes),
            "class_scale": table(experts, classes),
            "class_bias": logits(experts, classes),
            "class_margin": logits(experts, classes),
            "sample_weight": table(rows),
            "diversity_factor": 0.3,
            "diversity_temperature": 2.0,
            "teacher": logits(rows, classes),
            "distillation_factor": 0.5,
        },
    }


NAMES = list(options_of(2, 3, 4))


def converted(options: dict[str, Any], form: Form | None, dtype: torch.dtype) -> dict[str, Any]:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    device = "cpu" if form is None else form.device
    return {
        key: value.to(device, compute if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for key, value in options.items()
    }


def evaluate(form: Form | None, z: Tensor, y: Tensor, aggregate: bool = False, **options: Any) -> tuple[Tensor, ...]:
    """Loss, mean if wanted, and gradient, of upstream gradients that differ everywhere; without a form, the truth."""
    if form is None:
        with ltk.use_backend("reference"):
            return _evaluate(z.detach().cpu().double(), y.cpu(), aggregate, **options)
    with form.use():
        return tuple(value.cpu() for value in _evaluate(z.to(form.device), y.to(form.device), aggregate, **options))


def _evaluate(z: Tensor, y: Tensor, aggregate: bool, **options: Any) -> tuple[Tensor, ...]:
    z = z.detach().requires_grad_()
    outputs = expert_cross_entropy(z, y, aggregate=aggregate, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [
        torch.linspace(0.5, 2.0, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.device, out.dtype)
        for out in outputs
    ]
    (gradient,) = torch.autograd.grad(outputs, z, upstream)
    return (*(out.detach() for out in outputs), gradient)


def assert_near(actual: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    exact = dtype == torch.float64
    for value, true in zip(actual[:-1], truth[:-1], strict=True):
        assert value.dtype == (torch.float64 if exact else torch.float32)
        scale = float(true.abs().max()) if true.numel() else 0.0
        torch.testing.assert_close(value.double(), true, rtol=0, atol=(1e-12 if exact else 3e-6) * (1 + scale))
    rounding = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert actual[-1].dtype == dtype
    scale = float(truth[-1].abs().max()) if truth[-1].numel() else 0.0
    assert float((actual[-1].double() - truth[-1]).abs().max()) <= rounding * scale + (1e-13 if exact else 1e-6)
