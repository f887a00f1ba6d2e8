"""Losses of GPU kernel libraries, as forms to compare with: each is told apart by what it does beside or less.

They come from whatever Python finds; ``python -m benchmarks.gpu --wheels FOLDER`` adds pure-Python wheels to that.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ltkernels.bench.peers import SMOOTHING, LossFn, log_prior, widen
from ltkernels.bench.scenarios import Problem

LIGER = "liger"

LEFT_OUT = {
    "cut-cross-entropy": "it has no form over logits: it multiplies features with the classifier and never writes them;"
    " a peer for linear_cross_entropy",
}
"""Libraries that were looked at, and why they have no form here."""


@dataclass(frozen=True)
class Peer:
    """A loss of another library.

    Attributes:
        loss: the call.
        overwrites: the gradient is written over the logits, so that a second call computes something else.
        captured: a CUDA graph can hold it; what waits for the device within a call cannot be in one.
        note: what it does beside the loss, or does not do.
    """

    loss: LossFn
    overwrites: bool
    captured: bool
    note: str | None = None


def liger(variant: str, problem: Problem) -> Peer | str:
    """Liger-Kernel's cross entropy for a loss that it has, else the reason why not.

    It computes the gradient in the forward, over the logits, waits for the device three to five times meanwhile and
    once more in the backward, to see whether the upstream gradient is 1; if not, a second kernel multiplies it.
    """
    try:
        functional: Any = importlib.import_module("liger_kernel.transformers.functional")
    except Exception as error:  # not installed, or its own imports fail with this torch or Triton
        return f"cannot be imported: {type(error).__name__}: {error}"
    loss = functional.liger_cross_entropy
    over = "writes the gradient over the logits: one pass less over memory, and the logits are lost"
    if variant == "ce":
        return Peer(lambda x, y: loss(x, y), overwrites=True, captured=False, note=over)
    if variant == "ce_weight_smoothing":
        weight = problem.weight
        return Peer(
            lambda x, y: loss(x, y, weight=weight, label_smoothing=SMOOTHING),
            overwrites=True,
            captured=False,
            note=over,
        )
    if variant == "la_weight":
        weight, adjustment = problem.weight, log_prior(problem.class_counts).float()

        def adjusted(x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = loss(widen(x) + adjustment, y, weight=weight)
            return result

        return Peer(adjusted, overwrites=False, captured=False, note="has no class bias: PyTorch adds it first")
    return f"has no {variant}"
