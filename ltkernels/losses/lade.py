"""LADE as a module: class counts in, the op's tables as buffers, one functional call out."""

from __future__ import annotations

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import functional, rebalance
from ltkernels.losses.base import LossModule, differing
from ltkernels.rebalance import ClassCounts
from ltkernels.reference.lade import offsets

__all__ = ["LADELoss"]


class LADELoss(LossModule):
    """Prior cross-entropy and ``weight`` times LADE's regulariser, which disentangles the logits from the prior.

    At evaluation add the log prior of the test data to the logits (``rebalance.adjust_logits`` with ``target_prior``);
    for a balanced test set the logits are what they should be.

    Args:
        class_counts: training samples of each class, ``(C,)``. A class with count 0 has the prior 1e-9 and is
            not refused as a label.
        remine_lambda: strength of the bound's own regulariser, >= 0. Published: 0.1; 0.5 on iNaturalist 2018.
        weight: of the regulariser beside the cross-entropy, >= 0. Published: 0.1; 0.05 on iNaturalist 2018.
        prior_axis: whose prior the importance weight ``uniform / pi`` is: ``"class"``, the column's, as in the
            published code, or ``"sample"``, the one of the row's label, as in the paper's equation (from memory of it).
            As coded it is a constant of each column and reaches the gradient through ``1 + 2 remine_lambda S`` alone.
        regularizer_only: leave out the cross-entropy.
        ignore_index: label of rows that take no part.

    Shape:
        logits ``(C,)``, ``(N, C)`` or ``(N, C, d1, ...)`` of any floating type, labels of any integer type; a 0-d loss.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.losses.LADELoss([900, 90, 10])
        >>> criterion(torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]]), torch.tensor([0, 2]))
        tensor(2.1040)

    Source:
        Hong et al., "Disentangling Label Distribution for Long-tailed Visual Recognition", CVPR 2021, equations 8 to
        10. The published code adds 1e-9 to a prior inside its logarithm, as here.
    """

    class_counts: Tensor
    class_prior: Tensor
    class_bias: Tensor
    offset: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        remine_lambda: float = 0.1,
        weight: float = 0.1,
        prior_axis: str = "class",
        regularizer_only: bool = False,
        *,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.prior_axis = arg.choice("prior_axis", prior_axis, ("class", "sample"))
        self.remine_lambda, self.weight = remine_lambda, weight
        self.regularizer_only, self.ignore_index = regularizer_only, ignore_index
        self.register_buffer("class_counts", rebalance.counts_buffer(class_counts))
        prior = self.class_counts.double() / self.class_counts.double().sum()
        self.register_buffer("class_prior", prior.float())
        self.register_buffer("class_bias", (prior + 1e-9).log().float())
        self.register_buffer("offset", offsets(prior, prior_axis).float())
        with torch.device("cpu"):  # whatever the default is
            self.forward(torch.zeros(0, len(prior)), torch.zeros(0, dtype=torch.int64))  # what a call would refuse

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: logits.
            target: labels.

        Returns:
            0-d; float64 for float64 logits, else float32.
        """
        return functional.lade_cross_entropy(
            input,
            target,
            self.class_prior,
            class_bias=self.class_bias,
            class_offset=self.offset if self.prior_axis == "class" else None,
            row_offset=self.offset if self.prior_axis == "sample" else None,
            remine_lambda=self.remine_lambda,
            weight=self.weight,
            ignore_index=self.ignore_index,
            regularizer_only=self.regularizer_only,
        )

    def extra_repr(self) -> str:
        shown = ("remine_lambda", "weight", "prior_axis", "regularizer_only")
        parts = [f"{name}={getattr(self, name)!r}" for name in shown]
        parts.append(rebalance.describe_counts(self.class_counts))
        return ", ".join(parts + differing(self, {"ignore_index": -100}))
