"""The ops of the GPU benchmark. A new hot path is one more line here and a file of its name beside this one."""

from __future__ import annotations

from benchmarks.gpu.accuracy_counts import AccuracyCounts
from benchmarks.gpu.binary_cross_entropy import BINARY_CROSS_ENTROPY
from benchmarks.gpu.cross_entropy import CrossEntropy
from benchmarks.gpu.distillation import DISTILLATION
from benchmarks.gpu.experts import AGGREGATE_EXPERTS, EXPERT_CROSS_ENTROPY
from benchmarks.gpu.linear_cross_entropy import LinearCrossEntropy
from benchmarks.gpu.row_losses import LADE, ROW_CROSS_ENTROPY
from benchmarks.gpu.sampling import Sampling
from benchmarks.gpu.table import Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        CrossEntropy(),
        ROW_CROSS_ENTROPY,
        LADE,
        DISTILLATION,
        BINARY_CROSS_ENTROPY,
        EXPERT_CROSS_ENTROPY,
        AGGREGATE_EXPERTS,
        LinearCrossEntropy(),
        AccuracyCounts(),
        Sampling(),
    )
}
