"""accuracy_counts in the GPU benchmark: batches of an evaluation, ways to count, truth and bytes.

The forms add to counts that they are given and return them. What is compared are new counts, so STEP makes them: two
vectors of C zeros, the same launch for everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ltkernels as ltk
from benchmarks.gpu.table import COPY, OURS, STEP, Case, Form, Step, Work
from ltkernels.bench import peers, runner
from ltkernels.bench.peers_accuracy_counts import ACCURACY_VARIANTS, USUAL, Counts, Variant, make_batch
from ltkernels.bench.peers_accuracy_counts import Form as Count
from ltkernels.bench.scenarios import Scenario

VARIANTS = {variant.name: variant for variant in ACCURACY_VARIANTS}
SHAPES = (
    Scenario(8192, 8142, "iNaturalist 2018"),
    Scenario(65536, 1000, "ImageNet-LT"),
    Scenario(1 << 20, 19, "pixels of a street scene"),  # few classes: where additions could wait for one another
    Scenario(512, 1000, "ImageNet-LT, a batch"),
)


@dataclass(frozen=True)
class Inputs:
    """One copy."""

    logits: Tensor
    target: Tensor


class AccuracyCounts:
    name = "accuracy_counts"

    def cases(self, quick: bool, dry: bool) -> Sequence[Case]:
        if dry:
            return [self._case(variant, Scenario(9, 37, "tiny"), "float32") for variant in VARIANTS]
        if quick:
            return [self._case("top_1", shape, "bfloat16") for shape in SHAPES[:2]]
        types = {"top_1": ("bfloat16", "float32")}
        return [
            self._case(variant, shape, dtype)
            for variant in VARIANTS
            for shape in SHAPES
            for dtype in types.get(variant, ("bfloat16",))
        ]

    def _case(self, variant: str, shape: Scenario, dtype: str) -> Case:
        return Case(self.name, variant, shape, dtype, brief=True)

    def prepare(self, case: Case, device: str) -> Work:
        variant, shape, dtype = VARIANTS[case.variant], case.shape, runner.DTYPES[case.dtype]
        batch = make_batch(variant, shape, dtype, device, seed=0)
        counts = variant.forms()
        forms = [
            Form(OURS + backend, {STEP: _step(counts[peers.OURS], shape)}, backend=backend)
            for backend in ltk.available_backends(device)
            if backend != "reference" or device == "cpu"
        ]
        forms.append(Form(peers.EAGER, {STEP: _step(counts[peers.EAGER], shape)}))
        # bincount asks the device for the largest label: it waits, and no graph can hold it.
        forms.append(Form(USUAL, {STEP: _step(counts[USUAL], shape)}, captured=False))
        forms.append(Form(COPY, {STEP: lambda inputs: (inputs.logits.clone(),)}, less_work=True))
        logits_bytes = batch.logits.numel() * dtype.itemsize
        return Work(
            case,
            Inputs(*batch),
            lambda inputs: Inputs(inputs.logits.clone(), inputs.target.clone()),
            forms,
            _truth(variant, Inputs(*batch), shape),
            tolerance=0.0,
            footprint=logits_bytes + 8 * shape.n,
            model_bytes={STEP: logits_bytes + 8 * shape.n + 16 * shape.c},
            copied_bytes=2 * logits_bytes,
            rounding=0.0,
        )


def _truth(variant: Variant, inputs: Inputs, shape: Scenario) -> tuple[Tensor, ...]:
    own = inputs.logits.gather(1, inputs.target.unsqueeze(1))
    right = (inputs.logits > own).sum(dim=1) < variant.top_k  # a label's logit is its alone: make_batch
    found = (torch.bincount(labels, minlength=shape.c) for labels in (inputs.target[right], inputs.target))
    return tuple(counts.double() for counts in found)


def _step(count: Count, shape: Scenario) -> Step:
    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        counts = Counts(*torch.zeros((2, shape.c), dtype=torch.int64, device=inputs.logits.device).unbind())
        count(inputs.logits, inputs.target, counts)
        return tuple(counts)

    return step
