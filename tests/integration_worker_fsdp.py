"""One of the processes of test_integration_fsdp.py: the same model in DDP and in FSDP; writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import ltkernels as ltk

COUNTS = [900, 90, 9, 1, 1]
STEPS = 3


class WithLoss(nn.Module):
    """Head, loss and a learnable bias of the loss in one module, so that all of it is sharded."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.head: nn.Module = nn.Linear(8, len(COUNTS))
        self.criterion: nn.Module
        if loss == "learned bias":
            self.criterion = ltk.losses.CrossEntropyLoss(class_bias=nn.Parameter(torch.zeros(len(COUNTS))))
        elif loss == "ldam":
            self.head = ltk.CosineLinear(8, len(COUNTS))
            self.criterion = ltk.losses.LDAMLoss(COUNTS, reweight_epoch=1)
        else:
            self.head = nn.Identity()
            self.criterion = ltk.losses.LinearCrossEntropyLoss(
                8, len(COUNTS), criterion=ltk.losses.LogitAdjustedLoss(COUNTS)
            )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.head(self.features(x)), labels)
        return loss


def trained(loss: str, how: str) -> dict[str, Any]:
    """Losses of a few steps with rows of this process, and the parameters in the end."""
    torch.manual_seed(0)
    model = WithLoss(loss)
    wrapped: nn.Module = model
    if how == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policy = half if how == "fsdp, bfloat16" else MixedPrecisionPolicy()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (model.features, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for step in range(STEPS):
        if hasattr(model.criterion, "set_epoch"):
            model.criterion.set_epoch(step)
        x, labels = torch.randn(7, 6, generator=generator), torch.randint(5, (7,), generator=generator)
        value = wrapped(x, labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    whole = {name: p.full_tensor() if how != "ddp" else p for name, p in model.named_parameters()}
    return {"losses": losses, "parameters": {name: p.tolist() for name, p in whole.items()}}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report = {
        loss: {how: trained(loss, how) for how in ("ddp", "fsdp", "fsdp, bfloat16")}
        for loss in ("learned bias", "ldam", "linear")
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
