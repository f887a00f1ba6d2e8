"""Stage one of decoupled training: the demo's model is trained as usual, and its features of all samples are kept.

The features of a frozen model never change, so they are computed once; what comes after is training on a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint
import longtail_plan
import longtail_run
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """What stage two starts with: M samples to train with, T to test with, D features each, C classes.

    Attributes:
        features: ``(M, D)`` of the training part.
        labels: ``(M,)`` int64.
        test_features: ``(T, D)`` of the test part; of the validation part where the run was one.
        head: stage one's classifier, frozen.
        run: stage one itself; ``run.figures(logits)`` judges logits ``(T, C)`` of the test part.
    """

    features: Tensor
    labels: Tensor
    test_features: Tensor
    head: nn.Linear
    run: longtail_run.Run

    @property
    def num_classes(self) -> int:
        return self.head.out_features

    def figures(self, logits: Tensor) -> dict[str, Any]:
        """Accuracies of logits ``(T, C)`` of the test part: ``longtail_metrics.summarize`` and recall by class."""
        return self.run.figures(logits)


def stage_one(data: str, seed: int, kept: Path, *, validate: bool = False, resume: bool = False) -> Stage:
    """Trains the model of ``python/train.py --method ce``, or reads it, and computes its features.

    Args:
        data: name of a data set.
        seed: of split, start and samples.
        kept: where the checkpoint of the trained model is put, in the format of ``train.py``.
        validate: train with a share of the training part, and take what was left out as the test part.
        resume: go on from what is in ``kept``, which is all that is to be done where training had ended.

    Raises:
        UserError: ``kept`` is not a checkpoint of this run.
        MissingPackageError: the package with the data is not installed.
    """
    *_, settings = longtail_plan.runs(data, ["ce"], seed + 1, validate=validate)
    run = longtail_run.Run(settings, *longtail_run.load_data(data))
    state = checkpoint.load(kept, run.config) if resume and kept.exists() else {}
    if "result" in state:
        run.model.load_state_dict(state["model"])
    else:
        if state:
            run.load_state_dict(state)
        while run.step < run.total_steps:
            run.train_step()
        checkpoint.save(kept, run.config, {"model": run.model.state_dict(), "result": run.result()})
    model: Any = run.model.requires_grad_(False).eval()

    def features(rows: Tensor) -> Tensor:
        return torch.cat([model.features(*run.batches.batch(some)) for some in rows.split(longtail_run.TEST_BATCH)])

    return Stage(features(run.train), run.labels[run.train], features(run.test), model.head, run)
