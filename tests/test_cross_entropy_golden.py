"""functional.cross_entropy gives the answers of published implementations (tests/data/README.md says which).

These compare formulas that were written by others; `losses` are tested against the same files in test_losses.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cross_entropy_cases import Form, cross_entropy, each_form, relative_error
from torch import Tensor

DATA = Path(__file__).parent / "data"
# The published code computes in float32 like ours; logits times 30 lose an ulp of 30 on both sides.
FLOAT32_ERROR = 2e-6
# SADE's published code ranks classes by a sort that is not stable. These classes of equal counts came out the other way
# round.
TIES_THE_OTHER_WAY = ((71, 72), (78, 79), (80, 81), (82, 83), (84, 85), (86, 87), (91, 93), (94, 96), (97, 99))


def _golden(name: str) -> dict[str, Tensor]:
    with np.load(DATA / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(value)) for key, value in file.items()}


def _published(name: str, golden: dict[str, Tensor], logits: Tensor) -> Tensor:
    """The method in the terms of functional.cross_entropy, each formula written out here."""
    y, counts = golden["target"], golden["counts"].double()
    prior = counts / counts.sum()
    if name == "ldam":  # Cao et al. 2019: margins n^-1/4, the largest of them 0.5; s 30
        return cross_entropy(logits, y, scale=30.0, class_margin=0.5 * (counts.min() / counts) ** 0.25)
    if name == "balanced_softmax":  # Ren et al. 2020
        return cross_entropy(logits, y, class_bias=counts.log())
    # Zhang et al. 2022, a sum over three experts: no adjustment, the prior, and also against an inverse prior, in which
    # the class of rank k has the frequency of rank C - 1 - k.
    order = prior.argsort(stable=True)
    inverse = torch.empty_like(prior).scatter(0, order, prior[order.flip(0)])
    first, second = torch.tensor(TIES_THE_OTHER_WAY).T
    inverse[first], inverse[second] = inverse[second], inverse[first]
    adjustment, inverse_adjustment = (prior + 1e-9).log(), (inverse + 1e-9).log()
    biases = (None, adjustment, adjustment - golden["tau"] * inverse_adjustment)
    losses = [cross_entropy(expert, y, class_bias=bias) for expert, bias in zip(logits, biases, strict=True)]
    return torch.stack(losses).sum()


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["ldam", "balanced_softmax", "sade"])
def test_golden(name: str, dtype: torch.dtype, form: Form) -> None:
    golden = _golden(name)
    logits = golden["logits"].to(dtype).requires_grad_()
    with form.use():
        loss = _published(name, golden, logits)
        (gradient,) = torch.autograd.grad(loss, logits)
    assert relative_error(loss.detach(), golden["loss"]) <= FLOAT32_ERROR
    assert relative_error(gradient, golden["grad"]) <= FLOAT32_ERROR


def test_the_cases_are_long_tailed() -> None:
    """Equal counts would make every bias and margin a constant, which cancels."""
    for name in ("ldam", "balanced_softmax", "sade"):
        golden = _golden(name)
        assert golden["counts"].max() / golden["counts"].min() >= 100
        assert golden["target"].unique().numel() >= 50
        assert golden["logits"].shape[-2:] == (golden["target"].numel(), golden["counts"].numel())
