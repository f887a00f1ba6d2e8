"""BBN: two branches, one that learns from the data as they are and one from rebalanced data, mixed by a schedule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import functional
from ltkernels.losses.base import LossModule

__all__ = ["BBN"]


class BBN(LossModule):
    r"""The mixture of two branches' features and the loss of its two labels.

    A step draws a batch twice: a uniformly, b with ``LongTailSampler(labels, "reversed")``. Their features are joined
    to :math:`2 [\lambda f_a, (1 - \lambda) f_b]`, one classifier of twice the width sees them, and the loss is
    :math:`\lambda\,\mathrm{CE}(y_a) + (1 - \lambda)\,\mathrm{CE}(y_b)`. With :math:`\lambda = 1 - (t / D)^2` in epoch
    t of D, counted from 0, learning moves from all data to the rare classes.

    At evaluation one sample goes through both branches, and the features are joined as they are: what the factor 2 made
    of them at :math:`\lambda = 1/2`.

    Args:
        num_epochs: D, at least 1. Published code has the number of epochs, but 100 and 200 where those are 90 and 180:
            :math:`\lambda` then ends at 0.2. For these give 100 and 200.

    Attributes:
        lam: :math:`\lambda` of the current epoch, a 0-d buffer on the module's device.

    Raises:
        TypeError: ``num_epochs`` is not an integer.
        ValueError: ``num_epochs`` below 1.

    Example:
        >>> import torch, ltkernels as ltk
        >>> mixing, classifier = ltk.experts.BBN(num_epochs=200), torch.nn.Linear(2 * 16, 10)
        >>> mixing.set_epoch(100)
        >>> logits = classifier(mixing(torch.randn(8, 16), torch.randn(8, 16)))
        >>> loss = mixing.loss(logits, torch.randint(10, (8,)), torch.randint(10, (8,)))
        >>> mixing.lam
        tensor(0.7500)

    Source:
        Zhou et al., "BBN: Bilateral-Branch Network with Cumulative Learning for Long-Tailed Visual Recognition", CVPR
        2020, and its published code, which counts epochs from 1 and has t - 1 here.
    """

    lam: Tensor

    def __init__(self, num_epochs: int) -> None:
        super().__init__()
        self.num_epochs = arg.integer("num_epochs", num_epochs)
        if self.num_epochs < 1:
            raise ValueError(f"num_epochs: expected at least 1, found {num_epochs}")
        self.register_buffer("lam", torch.tensor(1.0, device="cpu"))

    def set_epoch(self, epoch: int) -> None:
        """Moves to an epoch in ``[0, num_epochs)``; call it before the epoch's first step."""
        epoch = arg.integer("epoch", epoch)
        if not 0 <= epoch < self.num_epochs:
            raise ValueError(f"epoch: expected an epoch in [0, {self.num_epochs}), counted from 0, found {epoch}")
        self.lam.fill_(1.0 - (epoch / self.num_epochs) ** 2)

    def forward(self, conventional: Tensor, rebalancing: Tensor) -> Tensor:
        """The joined features: mixed in ``train()`` mode, as they are in ``eval()`` mode.

        Args:
            conventional: features ``(N, D)`` of the branch for the data as they are.
            rebalancing: features of the other branch, ``(N, D')``.

        Returns:
            ``(N, D + D')``.
        """
        if self.training:
            lam = self.lam.to(conventional.dtype)
            conventional, rebalancing = 2.0 * lam * conventional, 2.0 * (1.0 - lam) * rebalancing
        return torch.cat([conventional, rebalancing], dim=1)

    def loss(self, logits: Tensor, target: Tensor, rebalanced_target: Tensor, **options: Any) -> Tensor:
        """The loss of both labels in one visit of the logits.

        Args:
            logits: ``(N, C)``, of the joined features.
            target: labels ``(N,)`` of the conventional branch's samples.
            rebalanced_target: of the other branch's.
            **options: of :func:`ltkernels.functional.cross_entropy`.

        Returns:
            A 0-d tensor, or ``(N,)`` with ``reduction="none"``.
        """
        return functional.cross_entropy(logits, (target, rebalanced_target, self.lam), **options)

    def extra_repr(self) -> str:
        return f"num_epochs={self.num_epochs}"
