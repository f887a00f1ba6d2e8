"""The scalar options that every backend of an op receives, in one order."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


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
