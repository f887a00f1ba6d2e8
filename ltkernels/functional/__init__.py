"""Public functions, one per hot path: they check arguments, call the op and reduce.

``cross_entropy`` is a drop-in for :func:`torch.nn.functional.cross_entropy` that also takes the parameters of the
softmax losses for long-tailed data: per-class scales, biases and margins, focal factors, sample weights and explicit
denominators. ``sample_indices`` draws class-balanced samples: a pure function of seed, epoch and position.
"""

from ltkernels.functional.accuracy_counts import AccuracyCounts, accuracy_counts
from ltkernels.functional.aggregate_experts import TopClasses, aggregate_experts
from ltkernels.functional.binary_cross_entropy import binary_cross_entropy
from ltkernels.functional.class_samples import ClassSample, sample_classes
from ltkernels.functional.cross_entropy import cross_entropy
from ltkernels.functional.distillation import distillation_loss
from ltkernels.functional.expert_cross_entropy import expert_cross_entropy
from ltkernels.functional.expert_linear import expert_linear
from ltkernels.functional.lade import lade_cross_entropy
from ltkernels.functional.linear_cross_entropy import linear_cross_entropy
from ltkernels.functional.row_cross_entropy import (
    equalization_cross_entropy,
    pairwise_cross_entropy,
    seesaw_cross_entropy,
)
from ltkernels.functional.sampling import sample_indices

__all__ = [
    "AccuracyCounts",
    "ClassSample",
    "TopClasses",
    "accuracy_counts",
    "aggregate_experts",
    "binary_cross_entropy",
    "cross_entropy",
    "equalization_cross_entropy",
    "distillation_loss",
    "expert_cross_entropy",
    "expert_linear",
    "lade_cross_entropy",
    "linear_cross_entropy",
    "pairwise_cross_entropy",
    "sample_classes",
    "sample_indices",
    "seesaw_cross_entropy",
]
