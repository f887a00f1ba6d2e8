"""distillation in the GPU benchmark: measured as the other losses of rows are, with the teacher's bytes beside."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.gpu.row_losses import RowLosses
from benchmarks.gpu.table import FORWARD, STEP, Case, Work
from ltkernels.bench import runner
from ltkernels.bench.peers_distillation import DISTILLATION_VARIANTS


class Distillation(RowLosses):
    def prepare(self, case: Case, device: str) -> Work:
        work = super().prepare(case, device)
        teacher = case.shape.n * case.shape.c * runner.DTYPES[case.dtype].itemsize
        passes = {STEP: 2, FORWARD: 1}  # both ways read it; nobody writes a gradient for it
        return replace(work, model_bytes={step: work.model_bytes[step] + passes[step] * teacher for step in passes})


DISTILLATION = Distillation("distillation", DISTILLATION_VARIANTS)
