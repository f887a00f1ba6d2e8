"""sample_indices in the GPU benchmark: data sets, ways to draw, peers, truth and bytes.

A case is a number of draws from long-tailed classes. Ours are held against the reference bit by bit; what PyTorch
draws is random, and only tests look whether it draws the same classes as often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ltkernels as ltk
from benchmarks.gpu.table import COPY, OURS, STEP, Case, Form, Step, Work
from ltkernels.bench.scenarios import Scenario
from ltkernels.reference.sampling import SamplingOptions
from ltkernels.reference.sampling import sample_indices as reference
from ltkernels.samplers import AliasTable, ClassIndex, ClassRounds

SEED, START = 1, 2**33
SAMPLES = {1000: 1_281_167, 8142: 10_000_000, 37: 1500}  # of a data set with so many classes
SECTOR = 32  # bytes that a gather of one member moves
BATCHES = (1 << 22, 1 << 16, 256)
VARIANTS = ("uniform", "weighted", "rounds", "slots")
MULTINOMIAL, VECTORISED = "torch.multinomial", "torch randint and gather"


@dataclass(frozen=True)
class Inputs:
    """One copy: the index, how classes come, and a weight for each sample, which torch.multinomial takes."""

    index: ClassIndex
    class_probs: AliasTable | ClassRounds | None
    of_sample: Tensor
    probs: Tensor  # of classes
    copied: Tensor


class Sampling:
    name = "sample_indices"

    def cases(self, quick: bool, dry: bool) -> Sequence[Case]:
        if dry:
            return [self._case(variant, Scenario(301, 37, "tiny")) for variant in VARIANTS]
        classes = (1000,) if quick else (1000, 8142)
        sources = {1000: "ImageNet, long-tailed", 8142: "iNaturalist 2018 classes, 10M samples"}
        return [
            self._case(variant, Scenario(count, c, sources[c]))
            for count in BATCHES
            for c in classes
            for variant in VARIANTS
        ]

    def _case(self, variant: str, shape: Scenario) -> Case:
        return Case(self.name, variant, shape, "int64", brief=True)

    def prepare(self, case: Case, device: str) -> Work:
        shape, replacement = case.shape, case.variant in ("uniform", "weighted")
        inputs = _inputs(case.variant, shape, device)
        forms = [
            Form(OURS + backend, {STEP: _ours(replacement, shape.n)}, backend=backend)
            for backend in ltk.available_backends(device)
            if backend != "reference" or device == "cpu"
        ]
        absent = {}
        if replacement:
            forms.append(Form(MULTINOMIAL, {STEP: _multinomial(shape.n)}, random=True))
            forms.append(Form(VECTORISED, {STEP: _vectorised(case.variant, shape.n)}, random=True))
        else:
            absent[MULTINOMIAL] = absent[VECTORISED] = "PyTorch has no draws without replacement within classes"
        forms.append(Form(COPY, {STEP: lambda inputs: (inputs.copied.clone(),)}, less_work=True))
        table = SAMPLES[shape.c] * inputs.index.members.element_size()
        return Work(
            case,
            inputs,
            _another,
            forms,
            (_truth(inputs, replacement, shape.n),),
            tolerance=0.0,
            footprint=table + 8 * shape.n,
            model_bytes={STEP: (8 + SECTOR) * shape.n},
            copied_bytes=16 * shape.n,
            rounding=0.0,
            absent=absent,
        )


def _inputs(variant: str, shape: Scenario, device: str) -> Inputs:
    """Class sizes that fall by a factor of 100 from the first class to the last; samples in random order."""
    generator = torch.Generator().manual_seed(0)
    share = 100 ** -(torch.arange(shape.c) / (shape.c - 1))
    counts = (share / share.sum() * SAMPLES[shape.c]).long().clamp(min=1)
    labels = torch.repeat_interleave(torch.arange(shape.c), counts)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    probs = counts.double().sqrt() if variant in ("weighted", "slots") else torch.ones(shape.c, dtype=torch.float64)
    class_probs: AliasTable | ClassRounds | None = None
    if variant == "weighted":
        class_probs = AliasTable(probs).to(device)
    elif variant == "slots":
        class_probs = ClassRounds(shape.c, probs).to(device)
    of_sample = (probs / counts)[labels].float().to(device)
    copied = torch.zeros(shape.n, dtype=torch.int64, device=device)
    return Inputs(ClassIndex(labels).to(device), class_probs, of_sample, probs.float().to(device), copied)


def _another(inputs: Inputs) -> Inputs:
    """Tables of classes are in the cache in any use; the members and weights are others."""
    index = ClassIndex.__new__(ClassIndex)
    index.__dict__.update(inputs.index.__dict__)
    index.members = inputs.index.members.clone()
    return Inputs(index, inputs.class_probs, inputs.of_sample.clone(), inputs.probs, inputs.copied.clone())


def _truth(inputs: Inputs, replacement: bool, count: int) -> Tensor:
    index, probs = inputs.index, inputs.class_probs
    rounds = probs if isinstance(probs, ClassRounds) else None
    options: dict[str, Any] = {"classes": index.num_classes, "draws": 1, "distinct": False, "seed": SEED, "epoch": 0}
    groups = 0 if replacement else index.num_classes if rounds is None else rounds.groups
    return reference(
        index.offsets,
        index.members,
        probs.entries if isinstance(probs, AliasTable) else None,
        rounds and rounds.slots,
        rounds and rounds.quotas,
        None,
        None,
        SamplingOptions(**options, groups=groups, start=START, step=1, num_positions=count),
    )


def _ours(replacement: bool, count: int) -> Step:
    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        found = ltk.functional.sample_indices(
            inputs.index, START, START + count, seed=SEED, class_probs=inputs.class_probs, replacement=replacement
        )
        return (found,)

    return step


def _multinomial(count: int) -> Step:
    return lambda inputs: (torch.multinomial(inputs.of_sample, count, replacement=True),)


def _vectorised(variant: str, count: int) -> Step:
    """A class each, then a member of it; the efficient form in plain PyTorch."""

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        offsets, members, device = inputs.index.offsets, inputs.index.members, inputs.copied.device
        if variant == "weighted":
            classes = torch.multinomial(inputs.probs, count, replacement=True)
        else:
            classes = torch.randint(len(offsets) - 1, (count,), device=device)
        first = offsets[classes]
        size = offsets[classes + 1] - first
        at = first + (torch.rand(count, device=device, dtype=torch.float64) * size).long()
        return (members[at].long(),)

    return step
