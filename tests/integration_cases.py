"""What the tests of the integrations share: programs in processes of their own, and small data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "python/integrations"
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [60, 25, 10, 5]))
COUNTS = np.bincount(LABELS).tolist()
CLASSES, FEATURES, SAMPLES = len(COUNTS), 6, len(LABELS)
WIDTH = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


class Positions(Dataset[dict[str, Tensor]]):
    """Fixed random features with their labels; ``position`` says which sample it was."""

    def __init__(self) -> None:
        self.features = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "features": self.features[index],
            "labels": torch.tensor(int(LABELS[index])),
            "position": torch.tensor(index),
        }

    def batch(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        return self.features[positions], torch.from_numpy(LABELS[positions])


class Model(nn.Module):
    """A linear model that notes the positions it was trained with."""

    def __init__(self, seed: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.linear = nn.Linear(FEATURES, CLASSES)
        self.trained: list[list[int]] = []

    def forward(self, features: Tensor, position: Tensor | None = None, labels: Tensor | None = None) -> dict[str, Any]:
        if self.training and position is not None:
            self.trained.append(position.tolist())
        return {"logits": self.linear(features)}


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    """All of a model's gradients in one vector."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def run(*command: str | Path, timeout: float = 120, **environment: str) -> str:
    """Runs a program with this interpreter; its standard output."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, **WIDTH, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun(processes: int, *command: str | Path, timeout: float = 600, **environment: str) -> str:
    """The same in several processes that find one another, and may have to share a core."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return run(*launcher, *command, timeout=timeout, **environment)


def reports(folder: Path) -> list[Any]:
    """What each process of a worker has written, by rank."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
