"""binary_cross_entropy in the GPU benchmark: measured as the other losses of rows are."""

from __future__ import annotations

from benchmarks.gpu.row_losses import RowLosses
from ltkernels.bench.peers_binary import BINARY_VARIANTS

BINARY_CROSS_ENTROPY = RowLosses("binary_cross_entropy", BINARY_VARIANTS)
