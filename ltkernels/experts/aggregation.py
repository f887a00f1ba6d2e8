"""Weights of experts that are learnt at test time, without labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltkernels import arguments as arg
from ltkernels import functional
from ltkernels.functional.experts import Experts, stacked

__all__ = ["TestTimeAggregation"]

_EPS = 1e-6  # least norm of a distribution in the cosine, as published


class TestTimeAggregation(nn.Module):
    r"""The mean of E experts with weights :math:`\mathrm{softmax}(a)`, which test data without labels choose.

    The better an expert knows the classes that the test data have, the less its answer changes with the view of an
    image. So the weights are those for which two random views of each test sample get the most similar distributions:

    .. math:: -\frac1N \sum_i \cos\bigl(\sigma(\textstyle\sum_e w_e z^1_{ei}), \sigma(\sum_e w_e z^2_{ei})\bigr)

    The experts stay as they are; a has E numbers.

    Args:
        num_experts: E, at least 1.
        device: of the parameter.

    Attributes:
        score: a, ``(E,)``, starts at 1 / E: equal weights.

    Shape:
        logits ``(E, N, C)``, or a list of E tensors ``(N, C)``; output ``(N, C)`` of their type.

    Raises:
        TypeError: ``num_experts`` is not an integer.
        ValueError: ``num_experts`` below 1.

    Example:
        >>> import torch, ltkernels as ltk
        >>> aggregation = ltk.experts.TestTimeAggregation(3)
        >>> views = [(torch.randn(3, 8, 5), torch.randn(3, 8, 5)) for _ in range(4)]  # of four batches
        >>> weight = aggregation.fit(views)
        >>> aggregation(torch.randn(3, 2, 5)).shape
        torch.Size([2, 5])

    Source:
        Zhang et al., "Self-Supervised Aggregation of Diverse Experts for Test-Agnostic Long-Tailed Recognition" (SADE),
        NeurIPS 2022, and its published code.
    """

    __test__ = False  # pytest takes a class of this name for tests

    def __init__(self, num_experts: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        num_experts = arg.integer("num_experts", num_experts)
        if num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, found {num_experts}")
        self.score = nn.Parameter(torch.full((num_experts,), 1.0 / num_experts, device=device))

    @property
    def weight(self) -> Tensor:
        """The experts' weights, ``(E,)``, which sum to 1."""
        return self.score.softmax(dim=0)

    def forward(self, input: Experts) -> Tensor:
        """The weighted mean of the logits, ``(N, C)``."""
        mean = functional.aggregate_experts(input, self.weight)
        assert isinstance(mean, Tensor)  # no best classes were asked for
        return mean

    def loss(self, first: Experts, second: Experts) -> Tensor:
        """Minus the mean cosine between the distributions of two views of the same samples, 0-d.

        Args:
            first: logits of one view, ``(E, N, C)``.
            second: of the other.
        """
        first, second = (stacked(name, view, "E, N, C") for name, view in (("first", first), ("second", second)))
        if first.shape != second.shape:
            raise ValueError(f"second: expected first's shape {tuple(first.shape)}, found {tuple(second.shape)}")
        one, other = (self.forward(view).softmax(dim=1, dtype=arg.compute_type(view)) for view in (first, second))
        return -F.cosine_similarity(one, other, dim=1, eps=_EPS).mean()

    def fit(
        self,
        views: Iterable[tuple[Experts, Experts]],
        epochs: int = 5,
        lr: float = 0.025,
        *,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        least_weight: float = 0.05,
    ) -> Tensor:
        """Learns the weights by stochastic gradient descent with Nesterov's momentum.

        It stops after an epoch in which an expert's weight, rounded to two digits, fell below ``least_weight``: the
        experts are to help each other. The device is waited for once an epoch, for that.

        Args:
            views: the logits of two views of each batch, without gradients; gone through once an epoch, so a list or a
                loader rather than a generator.
            epochs: at most so many.
            lr: published: 0.025 on ImageNet-LT, 0.1 on CIFAR-100-LT, 0.2 on iNaturalist, 0.01 on Places.
            momentum: as published.
            weight_decay: of ``score``. Published: 5e-4; 2e-4 on iNaturalist, 4e-4 on Places.
            least_weight: as published.

        Returns:
            The weights, ``(E,)``, detached.

        Raises:
            ValueError: an epoch without views.
        """
        optimizer = torch.optim.SGD(
            self.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
        )
        for epoch in range(epochs):
            loss = None
            for first, second in views:
                loss = self.loss(first, second)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if loss is None:
                raise ValueError(f"views: expected a pair in every epoch, found none in epoch {epoch}")
            if bool((self.weight.detach().round(decimals=2) < least_weight).any()):
                break
        return self.weight.detach()
