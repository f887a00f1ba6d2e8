"""One of the processes of test_integration_ddp.py: losses inside of DistributedDataParallel; writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ltkernels as ltk


class WithLoss(nn.Module):
    """A model that returns its loss, which so is inside of what DDP wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = ltk.losses.CrossEntropyLoss(class_bias=nn.Parameter(torch.zeros(3)))
        self.schedule = ltk.rebalance.DeferredReweighting([90, 9, 1], reweight_epoch=3)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.criterion(logits, labels)
        return loss


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(6, 3, generator=generator)
    labels = torch.randint(3, (6,), generator=generator)

    seesaw = ltk.losses.SeesawLoss(3, process_group=True)
    seesaw(logits, labels)

    model = WithLoss()
    replica = DistributedDataParallel(model)
    if rank == 0:
        model.schedule.set_epoch(3)  # its buffers reach the other rank with the next forward
    replica(logits, labels).backward()
    report = {
        "labels": labels.tolist(),
        "logits": logits.tolist(),
        "counts": seesaw.class_counts.tolist(),
        "gradient": model.criterion.class_bias.grad.tolist(),
        "weight": model.schedule().tolist(),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
