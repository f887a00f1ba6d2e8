"""What is measured: batch shapes, named after the data sets they come from, and the inputs made for them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

IMBALANCE_FACTOR = 100.0  # largest over smallest class count, the usual setting of CIFAR-100-LT
LARGEST_CLASS = 5_000


@dataclass(frozen=True)
class Scenario:
    """One batch shape: ``n`` rows of ``c`` classes, and where it occurs.

    ``d`` features a row, where a classifier is part of what is measured; 0 where that begins with logits.
    """

    n: int
    c: int
    source: str
    d: int = 0

    @property
    def name(self) -> str:
        return f"{self.n}x{self.d}x{self.c}" if self.d else f"{self.n}x{self.c}"


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(128, 100, "CIFAR-100-LT"),
    Scenario(256, 365, "Places-LT"),
    Scenario(256, 1000, "ImageNet-LT"),
    Scenario(8192, 1204, "LVIS v1 proposals, background included"),
    Scenario(512, 8142, "iNaturalist 2018"),
    Scenario(64, 50257, "GPT-2 vocabulary"),
)


def scenario(name: str) -> Scenario:
    """The scenario called ``name``, or the shape it spells.

    Args:
        name: ``"<rows>x<classes>"`` or ``"<rows>x<features>x<classes>"``, for example ``"512x8142"``; a shape outside
            the table is measured as well.

    Raises:
        ValueError: ``name`` is not two or three positive integers joined by ``x``.
    """
    for known in SCENARIOS:
        if known.name == name:
            return known
    match = re.fullmatch(r"([1-9]\d*)x(?:([1-9]\d*)x)?([1-9]\d*)", name)
    if match is None:
        known_names = ", ".join(s.name for s in SCENARIOS)
        raise ValueError(f"scenario: expected <rows>x<classes>, for example {known_names}, found {name!r}")
    return Scenario(int(match[1]), int(match[3]), "custom", int(match[2] or 0))


@dataclass(frozen=True)
class Problem:
    """Inputs of one measurement: target (N,), class_counts (C,), class weights (C,) in float32, logits.

    The logits are (N, C), or (E, N, C) of several experts.
    """

    logits: Tensor
    target: Tensor
    class_counts: Tensor
    weight: Tensor


def make_problem(
    shape: Scenario, dtype: torch.dtype, *, cosine: bool, experts: int = 0, device: str = "cpu", seed: int = 0
) -> Problem:
    """Random logits, long-tailed labels and the class counts they were drawn from.

    Args:
        shape: batch shape.
        dtype: type of the logits.
        cosine: draw logits from [-1, 1], as a normalised head gives them; otherwise normal with deviation 2.
        experts: how many experts the logits are of; 0 for logits without that dimension.
        device: where the tensors live, and are drawn: the same seed gives other numbers there.
        seed: of the generator.

    Returns:
        A problem whose logits are a *non-leaf* that requires a gradient, as a head would hand them over: no
        ``AccumulateGrad`` node, so no copy of the gradient enters the time.
    """
    generator = torch.Generator(device).manual_seed(seed)
    decay = torch.linspace(0, 1, shape.c, dtype=torch.float64, device=device)
    counts = (LARGEST_CLASS * IMBALANCE_FACTOR**-decay).round().long()
    target = torch.multinomial(counts.double(), shape.n, replacement=True, generator=generator)
    size = (*([experts] if experts else []), shape.n, shape.c)
    if cosine:
        values = torch.rand(size, generator=generator, device=device) * 2 - 1
    else:
        values = torch.randn(size, generator=generator, device=device) * 2
    leaf = values.to(dtype).requires_grad_()
    weight = counts.sum() / (shape.c * counts)  # inverse frequency, scikit-learn's "balanced"
    return Problem(leaf.view_as(leaf), target, counts, weight.float())
