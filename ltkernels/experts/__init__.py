"""Several experts on one backbone: their losses, their mixture, and who answers for which sample.

================ ======================================================================================================
module           what it has
================ ======================================================================================================
`aggregation`    `TestTimeAggregation`: weights of experts, learnt on test data without labels (SADE)
`bbn`            `BBN`: a branch for the data as they are and one for rebalanced data (BBN)
`distillation`   `LFMELoss`: a student of experts for groups of the classes
`heads`          `ExpertHeads`: the classifiers of all experts as one layer
`router`         `ExpertRouter`: later experts see only samples that need them (RIDE)
`subsets`        `ACELoss`, `ResLTLoss`: experts for subsets of the classes, which `shot_groups` makes
================ ======================================================================================================

RIDE's and SADE's training losses are :class:`ltkernels.losses.RIDELoss` and :class:`ltkernels.losses.SADELoss`.
:func:`ltkernels.functional.aggregate_experts` gives what to predict from.
"""

from ltkernels.experts.aggregation import TestTimeAggregation
from ltkernels.experts.bbn import BBN
from ltkernels.experts.distillation import LFMELoss
from ltkernels.experts.heads import ExpertHeads
from ltkernels.experts.router import ExpertRouter, RoutedLogits
from ltkernels.experts.subsets import ACELoss, ResLTLoss, shot_groups

__all__ = [
    "ACELoss",
    "BBN",
    "ExpertHeads",
    "ExpertRouter",
    "LFMELoss",
    "ResLTLoss",
    "RoutedLogits",
    "TestTimeAggregation",
    "shot_groups",
]
