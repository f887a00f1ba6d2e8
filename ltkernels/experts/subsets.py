"""Experts of subsets of the classes: which expert knows which class, and the losses of ACE and ResLT."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ltkernels import arguments as arg
from ltkernels import functional, rebalance
from ltkernels.functional.experts import Experts, stacked
from ltkernels.losses.base import LossModule
from ltkernels.rebalance import ClassCounts

__all__ = ["ACELoss", "ResLTLoss", "shot_groups"]


def shot_groups(
    class_counts: ClassCounts, many_above: float = 100, few_below: float = 20, *, nested: bool = False
) -> Tensor:
    """Which classes are many-shot, medium-shot and few-shot: a row for each group, the many-shot first.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        many_above: many-shot classes have more samples.
        few_below: few-shot classes have fewer.
        nested: each row has the classes of the later groups too: all, medium and few, few.

    Returns:
        ``(G, C)`` bool on the CPU, G <= 3: groups without classes are left out.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: bad counts, or ``few_below`` above ``many_above``.

    Example:
        >>> import torch, ltkernels as ltk
        >>> ltk.experts.shot_groups([900, 90, 10], nested=True)
        tensor([[ True,  True,  True],
                [False,  True,  True],
                [False, False,  True]])
    """
    counts = rebalance.as_class_counts(class_counts)
    few_below = arg.number("few_below", few_below, 0.0, math.inf)
    many_above = arg.number("many_above", many_above, few_below, math.inf)
    many, few = counts > many_above, counts < few_below
    groups = torch.stack([many, ~many & ~few, few])
    groups = groups[groups.any(dim=1)]
    return groups.flip(0).cumsum(0).flip(0) > 0 if nested else groups


def class_sets(name: str, value: Tensor, class_counts: Tensor) -> Tensor:
    """Checked ``(E, C)`` bool sets of classes; every class in one of them, and none without a class."""
    if arg.tensor(name, value).dtype is not torch.bool:
        raise TypeError(f"{name}: expected torch.bool, found {value.dtype}")
    if value.dim() != 2 or value.shape[1] != class_counts.numel():
        raise ValueError(f"{name}: expected shape (E, {class_counts.numel()}), found {tuple(value.shape)}")
    for dim, found in ((1, "a row without a class, row"), (0, "no row with class")):
        empty = ~value.any(dim=dim)
        if bool(empty.any()):
            raise ValueError(f"{name}: expected classes in every row and every class in one, found {found}"
                             f" {int(empty.nonzero()[0])}")  # fmt: skip
    return value.to("cpu", copy=True)  # where class counts start, too


class _SubsetLoss(LossModule):
    """Experts that cover subsets of the classes."""

    class_counts: Tensor
    cover: Tensor

    def __init__(self, class_counts: ClassCounts, cover: Tensor | None, ignore_index: int) -> None:
        super().__init__()
        self.register_buffer("class_counts", rebalance.counts_buffer(class_counts))
        cover = shot_groups(class_counts, nested=True) if cover is None else cover
        self.register_buffer("cover", class_sets("cover", cover, self.class_counts))
        self.ignore_index = arg.integer("ignore_index", ignore_index)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.cover.shape[0]

    def _stacked(self, input: Experts) -> Tensor:
        z = stacked("input", input, "E, N, C")
        if z.shape[0] != self.num_experts or z.shape[2] != self.cover.shape[1]:
            raise ValueError(
                f"input: expected shape ({self.num_experts}, N, {self.cover.shape[1]}), found {tuple(z.shape)}"
            )
        return z

    def extra_repr(self) -> str:
        return f"cover={self.cover.sum(dim=1).tolist()}, {rebalance.describe_counts(self.class_counts)}"


class ACELoss(_SubsetLoss):
    r"""ACE: each expert learns its own classes, and to be silent on all others.

    .. math:: \sum_e \Bigl(\mathrm{CE}_{C_e}(z_e) + \frac{\mu}{N} \sum_i \sum_{c \notin C_e} z_{eic}^2\Bigr)

    The cross-entropy is a softmax over the expert's classes :math:`C_e` alone, averaged over the samples of these
    classes. The second, complementary part keeps the logits of interfering classes at 0.

    Published training lets the first expert alone move the backbone, so that the others see ``features.detach()``, and
    multiplies the learning rate of each expert by ``sample_share``.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        cover: ``(E, C)`` bool, the classes of each expert. None: ``shot_groups(class_counts, nested=True)``, which is
            all, medium and few, few.
        complementary_weight: :math:`\mu`, at least 0.
        ignore_index: label of samples that take no part.

    Attributes:
        sample_share: share of the training samples that are of each expert's classes, ``(E,)``.

    Shape:
        logits ``(E, N, C)`` of any floating type, labels ``(N,)`` of any integer type; a 0-d loss.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape; an expert without classes, a class without expert.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.experts.ACELoss([900, 90, 10])
        >>> logits, labels = torch.zeros(3, 2, 3), torch.tensor([0, 1])
        >>> criterion(logits, labels), criterion.aggregate(logits).shape
        (tensor(1.7918), torch.Size([2, 3]))

    Source:
        Cai et al., "ACE: Ally Complementary Experts for Solving Long-Tailed Recognition in One-Shot", ICCV 2021. Its
        code was not at hand: the complementary part and its average over the samples are from memory of the paper,
        which also rescales the experts' logits before it averages them, as :meth:`aggregate` does not.
    """

    class_bias: Tensor
    sample_share: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        cover: Tensor | None = None,
        complementary_weight: float = 1.0,
        *,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(class_counts, cover, ignore_index)
        self.complementary_weight = arg.number("complementary_weight", complementary_weight, 0.0, math.inf)
        counts = self.class_counts.double()
        self.register_buffer(
            "class_bias", torch.zeros(self.cover.shape, device="cpu").masked_fill(~self.cover, -math.inf)
        )
        self.register_buffer("sample_share", ((self.cover * counts).sum(dim=1) / counts.sum()).float())

    def forward(self, input: Experts, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: the experts' logits, ``(E, N, C)`` or a list of ``(N, C)``.
            target: labels.

        Returns:
            0-d; float64 for float64 logits, else float32. An expert that has no sample in the batch adds nothing to
            the cross-entropy.
        """
        z = self._stacked(input)
        loss = functional.expert_cross_entropy(
            z,
            target,
            self.cover.to(z.dtype),  # weight 0: samples of other classes
            self.ignore_index,
            class_bias=self.class_bias,
        )
        ignored = target.long() == self.ignore_index
        interfering = torch.where(self.cover[:, None, :] | ignored[:, None], 0.0, z.to(loss.dtype))
        mean = interfering.square().sum() / (~ignored).sum()
        return loss + self.complementary_weight * mean

    def aggregate(self, input: Experts) -> Tensor:
        """The logits to predict from, ``(N, C)``: of each class the mean over the experts that cover it."""
        z = self._stacked(input)
        mean = functional.aggregate_experts(z, self.cover.to(arg.compute_type(z)))
        assert isinstance(mean, Tensor)  # no best classes were asked for
        return mean


class ResLTLoss(_SubsetLoss):
    r"""ResLT: one head for all classes, further heads that learn what it misses of the rarer ones, and their sum.

    .. math:: (1 - \beta)\,\mathrm{CE}\Bigl(\sum_e z_e\Bigr) + \beta\,
        \frac{\sum_e \sum_{i: y_i \in C_e} \mathrm{CE}(z_{ei})}{\sum_e |\{i: y_i \in C_e\}|}

    Every softmax is over all classes; :math:`C_e` only says whose samples head e has a loss for. Predict from the sum
    of the heads, or from their mean.

    Args:
        class_counts: training samples of each class, ``(C,)``.
        cover: ``(E, C)`` bool, the classes of each head. None: ``shot_groups(class_counts, nested=True)``. Published
            for ImageNet-LT: all, the 825 rarest, the 220 rarest.
        beta: :math:`\beta` in ``[0, 1]``. Published: 0.99 for ResNeXt-50 on ImageNet-LT.
        ignore_index: label of samples that take no part.

    Shape:
        logits ``(E, N, C)`` of any floating type, labels ``(N,)`` of any integer type; a 0-d loss.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value or shape; a head without classes, a class without head.

    Example:
        >>> import torch, ltkernels as ltk
        >>> criterion = ltk.experts.ResLTLoss([900, 90, 10])
        >>> criterion(torch.zeros(3, 2, 3), torch.tensor([0, 1]))
        tensor(1.0986)

    Source:
        Cui et al., "ResLT: Residual Learning for Long-tailed Recognition", TPAMI 2022, and its published code, which
        adds 1e-7 to probabilities inside the logarithm.
    """

    def __init__(
        self, class_counts: ClassCounts, cover: Tensor | None = None, beta: float = 0.99, *, ignore_index: int = -100
    ) -> None:
        super().__init__(class_counts, cover, ignore_index)
        self.beta = arg.number("beta", beta, 0.0, 1.0)

    def forward(self, input: Experts, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: the heads' logits, ``(E, N, C)`` or a list of ``(N, C)``.
            target: labels.

        Returns:
            0-d; float64 for float64 logits, else float32.
        """
        z = self._stacked(input)
        heads, mean = functional.expert_cross_entropy(
            z, target, self.cover.to(z.dtype), self.ignore_index, reduction="sum", aggregate=True
        )
        valid = target.long() != self.ignore_index
        known = torch.where(valid, self.cover.sum(dim=0)[torch.where(valid, target.long(), 0)], 0).sum()
        of_sum = functional.cross_entropy(mean, target, ignore_index=self.ignore_index, scale=float(self.num_experts))
        return (1.0 - self.beta) * of_sum + self.beta * heads / known
