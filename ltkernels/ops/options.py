"""The scalar options that every backend of an op receives, in one order."""

from __future__ import annotations

from collections import namedtuple
from enum import IntEnum
from typing import Any, NamedTuple, get_type_hints


class Reduction(IntEnum):
    """What the op does with the row losses; a denominator given by the caller is divided by outside, after ``SUM``."""

    NONE = 0
    SUM = 1
    MEAN_WEIGHT = 2
    MEAN_COUNT = 3


class CrossEntropyOptions(NamedTuple):
    """Scalars of :func:`ltkernels.functional.cross_entropy`, in the order of the op's schema."""

    ignore_index: int = -100
    reduction: int = Reduction.MEAN_WEIGHT
    label_smoothing: float = 0.0
    scale: float = 1.0
    focal_gamma: float = 0.0
    focal_weighted: bool = False
    focal_detached: bool = False
    z_loss: float = 0.0
    empty_zero: bool = False


class MarginType(IntEnum):
    """What a margin does to the label's logit."""

    ADDITIVE = 0
    ARC = 1
    ARC_STRAIGHT_THROUGH = 2


class PairTerm(IntEnum):
    """What is added to a logit for its pair of label and class."""

    NONE = 0
    TABLE = 1
    SEESAW = 2
    DROP = 3


class RowCrossEntropyOptions(NamedTuple):
    """Scalars of the losses whose adjustments depend on the row, in the order of the op's schema."""

    ignore_index: int = -100
    reduction: int = Reduction.MEAN_WEIGHT
    label_smoothing: float = 0.0
    off_target: bool = False
    scale: float = 1.0
    margin_type: int = MarginType.ADDITIVE
    focal_gamma: float = 0.0
    focal_weighted: bool = False
    focal_detached: bool = False
    influence_alpha: float = 1.0
    influence_eps: float = 1e-3
    z_loss: float = 0.0
    empty_zero: bool = False
    pair_term: int = PairTerm.NONE
    pair_p: float = 0.0
    """Seesaw's p; the probability of a drop."""
    pair_q: float = 0.0
    pair_eps: float = 0.0
    seed: int = 0


class LadeOptions(NamedTuple):
    """Scalars of :func:`ltkernels.functional.lade_cross_entropy`, in the order of the op's schema."""

    ignore_index: int = -100
    reduction: int = Reduction.MEAN_COUNT
    """Always the mean: the regulariser is of the whole batch."""
    remine_lambda: float = 0.1
    weight: float = 0.1
    with_ce: bool = True


class BinaryCrossEntropyOptions(NamedTuple):
    """Scalars of :func:`ltkernels.functional.binary_cross_entropy`, in the order of the op's schema."""

    ignore_index: int = -100
    reduction: int = Reduction.MEAN_COUNT
    """Never the mean by weight."""
    background_index: int = -1
    """The label of background rows; -1 for none."""
    alpha_pos: float = 1.0
    alpha_neg: float = 1.0
    gamma_pos: float = 0.0
    gamma_neg: float = 0.0
    clip: float = 0.0
    scored: bool = False
    """Whether negatives with a logit of at least ``score_logit`` are kept."""
    score_logit: float = 0.0
    row_draws: bool = False
    """Whether a row draws once for all its columns."""
    column_sums: bool = False
    empty_zero: bool = False
    seed: int = 0


class DistillationOptions(NamedTuple):
    """Scalars of :func:`ltkernels.functional.distillation_loss`, in the order of the op's schema."""

    ignore_index: int = -100
    reduction: int = Reduction.MEAN_COUNT
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 1.0


class ExpertCrossEntropyOptions(NamedTuple):
    """Scalars of :func:`ltkernels.functional.expert_cross_entropy`, in the order of the op's schema."""

    ignore_index: int = -100
    reduction: int = Reduction.MEAN_WEIGHT
    scale: float = 1.0
    diversity: float = 0.0
    """Factor of the divergences from the mean, of either sign; 0 for none."""
    distillation: float = 0.0
    """Factor of the divergence from the teacher."""
    distillation_scale: float = 1.0
    """One over its temperature."""
    aggregate: bool = False
    """Whether the state begins with the mean of the experts' logits."""
    empty_zero: bool = False


class AggregateMode(IntEnum):
    """What of the experts is averaged."""

    LOGITS = 0
    PROBS = 1
    LOG_PROBS = 2


class ExpertWeights(IntEnum):
    """What an expert's weight depends on."""

    EQUAL = 0
    EXPERT = 1
    SAMPLE = 2
    CLASS = 3


class AggregateExpertsOptions(NamedTuple):
    """Scalars of :func:`ltkernels.functional.aggregate_experts`, in the order of the op's schema."""

    mode: int = AggregateMode.LOGITS
    weights: int = ExpertWeights.EQUAL
    topk: int = 0
    """How many of the best classes the state has for each sample."""

    @property
    def reduction(self) -> int:
        """The result is not reduced."""
        return Reduction.NONE


class ExpertLinearOptions(NamedTuple):
    """Scalars of the op behind :func:`ltkernels.functional.expert_linear`, in the order of its schema."""

    mode: int = AggregateMode.PROBS
    weights: int = ExpertWeights.EQUAL

    @property
    def reduction(self) -> int:
        """The result is not reduced."""
        return Reduction.NONE


class ProductType(IntEnum):
    """What a linear loss multiplies."""

    INPUT = 0
    """Features and classifier as they are, which are of one type."""
    BFLOAT16 = 1
    FLOAT16 = 2


class LinearOptions(NamedTuple):
    """Scalars of the products in a linear loss, which stand behind those of the loss."""

    normalize: bool = False
    """Whether logits are cosines."""
    products: int = ProductType.INPUT
    chunk_rows: int = 0
    """Rows of a chunk; 0 for the rule of ops/chunked_linear.py."""


def _linear(name: str, loss: type[Any]) -> type[Any]:
    kinds = {**get_type_hints(loss), **get_type_hints(LinearOptions)}
    made = namedtuple(name, kinds, defaults=(*loss._field_defaults.values(), *LinearOptions()))  # type: ignore[misc]
    made.__annotations__ = kinds
    made.__doc__ = f"Scalars of {loss.__name__} and, behind them, of :class:`LinearOptions`, in the schema's order."
    return made


LinearCrossEntropyOptions = _linear("LinearCrossEntropyOptions", CrossEntropyOptions)
LinearRowCrossEntropyOptions = _linear("LinearRowCrossEntropyOptions", RowCrossEntropyOptions)


class ClassParallelOptions(NamedTuple):
    """Scalars of a loss whose classes are divided among processes, in the order of the op's schema."""

    reduction: int = Reduction.SUM
    """Without a denominator, which is in the coefficients; a mean says that they are about one over the rows."""
    scale: float = 1.0
    margin_type: int = MarginType.ADDITIVE
    focal_gamma: float = 0.0
    focal_weighted: bool = False
    focal_detached: bool = False
    influence_alpha: float = 1.0
    influence_eps: float = 1e-3
    z_loss: float = 0.0
    smoothing: bool = False
    soft_target: bool = False
    """Whether targets are probabilities, of a row as of one label."""
    normalize: bool = False
    products: int = ProductType.INPUT
    chunk_rows: int = 1
    """The same for all processes, whose chunks meet."""
    class_block: int = 0
    """Classes of a block, where all rows are a chunk and classes are divided again; 0 where they are not."""
    group: str = ""
    """Its name, as torch.distributed knows it; empty for this process alone."""
