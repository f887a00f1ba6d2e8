"""Losses and mean of several experts in the GPU benchmark: measured as the losses of rows are."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from benchmarks.gpu.row_losses import RowLosses
from benchmarks.gpu.table import CALL, FORWARD, STEP, Case, Work
from ltkernels.bench import runner
from ltkernels.bench.peers_experts import EXPERT_VARIANTS
from ltkernels.bench.scenarios import Problem

MEANS = [variant for variant in EXPERT_VARIANTS if variant.name.startswith("aggregate")]


class Means(RowLosses):
    """No losses: as large as an expert's logits, with an upstream gradient that has to be read."""

    def upstream(self, problem: Problem) -> Tensor:
        upstream = runner.upstream_of(problem.logits[0])
        assert upstream is not None
        return upstream

    def prepare(self, case: Case, device: str) -> Work:
        work = super().prepare(case, device)
        mean = case.shape.n * case.shape.c * runner.DTYPES[case.dtype].itemsize
        passes = {STEP: 2, FORWARD: 1}  # written by the forward; its gradient is read
        # Without an upstream gradient autograd has nothing to begin with.
        forms = [replace(f, steps={step: f.steps[step] for step in f.steps if step != CALL}) for f in work.forms]
        model_bytes = {step: work.model_bytes[step] + passes[step] * mean for step in passes}
        return replace(work, forms=forms, model_bytes=model_bytes)


EXPERT_CROSS_ENTROPY = RowLosses("expert_cross_entropy", [v for v in EXPERT_VARIANTS if v not in MEANS])
AGGREGATE_EXPERTS = Means("aggregate_experts", MEANS)
