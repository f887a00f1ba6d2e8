"""The mean of several experts in one pass: logits, probabilities or log-probabilities, weighted."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ltkernels import arguments as arg
from ltkernels.functional.experts import Experts, stacked
from ltkernels.ops import aggregate_experts as _op
from ltkernels.ops.options import AggregateExpertsOptions, AggregateMode, ExpertWeights

MODES = {"logits": AggregateMode.LOGITS, "probs": AggregateMode.PROBS, "log_probs": AggregateMode.LOG_PROBS}


class TopClasses(NamedTuple):
    """The mean of the experts and its best classes."""

    output: Tensor
    """``(N, C)``."""
    classes: Tensor
    """``(N, k)`` int64, the best first; of equal ones the first."""
    confidence: Tensor
    """``(N, k)``, their probabilities; takes no gradient."""


def aggregate_experts(
    input: Experts, expert_weight: Tensor | None = None, mode: str = "logits", *, topk: int = 0
) -> Tensor | TopClasses:
    r"""The weighted mean over E experts, and on request its best classes, in one pass over their logits.

    .. math:: \mathrm{out}_{ic} = \frac{\sum_e w f_{eic}}{\sum_e w}

    with f the logits, ``softmax`` or ``log_softmax`` of expert e and w its weight, which may depend on the sample or
    the class: weights are divided by their sum over the experts. With weights by class probabilities need not sum to 1
    afterwards, and a mean of log-probabilities never does; neither is normalised again. What an expert with weight 0
    says counts for nothing, even -inf.

    Args:
        input: logits, ``(E, N, C)`` of any strides, or a list of E tensors ``(N, C)``, which is copied into one;
            float64, float32, bfloat16 or float16. Sums are float32 (float64 for float64).
        expert_weight: finite and >= 0, of a floating type: ``(E,)``; ``(N, E)``, by sample; ``(E, C)``, by class, 0
            where an expert does not cover a class. Where E = N = C, weights are by sample. None: 1 for all.
        mode: ``"logits"``, ``"probs"`` or ``"log_probs"``.
        topk: k > 0 also gives the k best classes of each sample with their probabilities: those of the mean where it is
            one of probabilities, else of the mean's softmax.

    Returns:
        ``(N, C)`` of ``input``'s type, differentiable with respect to logits and weights; with ``topk`` a
        :class:`TopClasses`.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or option; no expert, or experts that do not match; negative weights; a class
            or sample for which no expert has a weight (CPU).

    Example:
        >>> import torch, ltkernels as ltk
        >>> logits = torch.tensor([[[2.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])  # two experts, one sample
        >>> ltk.functional.aggregate_experts(logits, mode="probs")
        tensor([[0.4995, 0.3413, 0.1592]])
        >>> cover = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])  # the first does not know class 2
        >>> ltk.functional.aggregate_experts(logits, cover)
        tensor([[2.0000, 0.5000, 0.0000]])

    Source:
        Wang et al., RIDE, ICLR 2021, and Zhang et al., SADE, NeurIPS 2022 (mean of logits; weights by expert); Cai et
        al., "ACE: Ally Complementary Experts for Solving Long-Tailed Recognition in One-Shot", ICCV 2021 (weights by
        class).
    """
    z = stacked("input", input, "E, N, C")
    kind = MODES[arg.choice("mode", mode, tuple(MODES))]
    topk = arg.integer("topk", topk)
    if not 0 <= topk <= z.shape[2]:
        raise ValueError(f"topk: expected a number of classes in [0, {z.shape[2]}], found {topk}")
    weight, weights = expert_weights(expert_weight, z.shape, z)
    mean, best = _op.aggregate_experts((z, weight), AggregateExpertsOptions(kind, weights, topk))
    return mean if best is None else TopClasses(mean, *best)


def expert_weights(weight: Tensor | None, shape: tuple[int, ...], input: Tensor) -> tuple[Tensor | None, ExpertWeights]:
    """Weights in the type that ``(E, N, C)`` values of ``input``'s are computed in, and what they depend on."""
    if weight is None:
        return None, ExpertWeights.EQUAL
    if not arg.tensor("expert_weight", weight).is_floating_point():
        raise TypeError(f"expert_weight: expected a floating type, found {weight.dtype}")
    if weight.device != input.device:
        raise ValueError(f"expert_weight: expected device {input.device} as input's, found {weight.device}")
    experts, rows, classes = shape
    found = tuple(weight.shape)
    if found == (experts,):
        kind = ExpertWeights.EXPERT
    elif found[1:] == (experts,) and found[0] == rows:  # the rows last: their number may be a symbol
        kind = ExpertWeights.SAMPLE
    elif found == (experts, classes):
        kind = ExpertWeights.CLASS
    else:
        raise ValueError(
            f"expert_weight: expected shape ({experts},), ({rows}, {experts}) by sample or ({experts}, {classes}) by"
            f" class, found {found}"
        )
    return weight.to(arg.compute_type(input)).contiguous(), kind
