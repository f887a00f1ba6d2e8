"""What holds for all integrations: nothing is imported before it is asked for, and what is missing is said."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

import ltkernels as ltk
from ltkernels.integrations import epochs

ROOT = Path(__file__).resolve().parents[1]


def test_no_library_is_imported() -> None:
    program = (
        "import sys, ltkernels, ltkernels.integrations as all; all.timm.mixup_pairs; dir(all);"
        "print(*{'accelerate', 'lightning', 'pytorch_lightning', 'timm', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, []), run.stdout + run.stderr


@pytest.mark.parametrize(
    ("module", "library", "missing"),
    [
        ("accelerate", "accelerate", ["accelerate"]),
        ("huggingface", "transformers", ["transformers"]),
        ("lightning", "lightning", ["lightning", "lightning.pytorch", "pytorch_lightning"]),
    ],
)
def test_missing_library(module: str, library: str, missing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"ltkernels.integrations.{module}", raising=False)
    message = f"ltkernels.integrations.{module} needs {library}, run: pip install {library} "
    with pytest.raises(ImportError, match=message):
        importlib.import_module(f"ltkernels.integrations.{module}")


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'ltkernels.integrations' has no attribute 'fastai'"):
        ltk.integrations.fastai  # noqa: B018


def test_schedules_of_a_model_each_once() -> None:
    """A loss drives the schedule that it holds; one outside of it is driven by itself."""
    inside = ltk.rebalance.DeferredReweighting([9, 1], 3)
    outside = ltk.rebalance.DeferredReweighting([9, 1], 3)
    loss = ltk.losses.CrossEntropyLoss(inside)
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "loss": loss, "same": loss, "outside": outside})
    assert epochs.schedules(model) == [loss, outside]
    assert epochs.schedules(nn.Linear(2, 2)) == []


def test_samplers_behind_a_loader() -> None:
    data, sampler = torch.arange(4), ltk.samplers.LongTailSampler([0, 0, 0, 1])
    assert epochs.samplers(DataLoader(data)) == []
    for loader in (
        DataLoader(data, sampler=sampler),
        DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False)),
        DataLoader(data, batch_sampler=ltk.samplers.LongTailBatchSampler(sampler, 2)),
    ):
        assert epochs.samplers(loader) == [sampler]
