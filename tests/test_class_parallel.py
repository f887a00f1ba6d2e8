"""linear_cross_entropy with a group: what one process computes, whatever the number of processes.

The workers have the cases that need several processes; each start runs as many of them as there are. 3 processes divide
unevenly, with a part of no classes and one of no rows; 2 are what collectives do between two halves; 4 are more than
some tables are long. Here are the cases that a group of one can show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integration_cases import ROOT, torchrun
from torch import Tensor
from torch.library import opcheck

import ltkernels as ltk
from ltkernels.ops import class_parallel as op
from ltkernels.ops.class_shards import COEFFICIENT, HARD, PER_LABEL, SOFT, WEIGHT
from ltkernels.ops.options import ClassParallelOptions, Reduction

VALUES, CALLS = (ROOT / "tests" / f"class_parallel_worker{part}.py" for part in ("", "_calls"))
N, D, C = 7, 4, 5
linear_cross_entropy = ltk.functional.linear_cross_entropy


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_values(processes: int) -> None:
    torchrun(processes, VALUES, "values,halves,bits")
