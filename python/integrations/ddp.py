"""Trains on long-tailed digits with torch's DistributedDataParallel; goes on where it was stopped, in any number of
processes.

All processes together draw the samples that one would draw, in the same steps: the number of processes changes how long
a run takes and nothing else.

  python python/integrations/ddp.py                                                      one process
  torchrun --nproc-per-node 2 python/integrations/ddp.py                                 two
  torchrun --nproc-per-node 2 python/integrations/ddp.py --out runs/ddp --stop-after 40  stopped within an epoch
  python python/integrations/ddp.py --out runs/ddp --resume                              the rest of it, in one
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import demo
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import ltkernels as ltk

BATCH = 32  # of all processes together


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and prints a line. Returns its figures: none, if it was stopped before the end."""
    args = demo.resumable(__doc__, argv)

    torch.set_num_threads(1)  # a model this small is slower on more
    if "RANK" not in os.environ:  # not started by torchrun
        return train(args, rank=0, processes=1)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        return train(args, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def train(args: argparse.Namespace, rank: int, processes: int) -> dict[str, float]:
    """What each process does."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    digits = demo.load_digits()
    sampler = ltk.samplers.DistributedLongTailSampler(
        digits.labels, args.sampler, num_replicas=processes, rank=rank, drop_last=True
    )
    loader = DataLoader(digits.train, BATCH // processes, sampler=sampler, drop_last=True)
    criterion: nn.Module
    if args.loss == "la":
        criterion = ltk.losses.LogitAdjustedLoss(digits.class_counts)
    else:
        criterion = ltk.losses.CrossEntropyLoss()
    criterion.to(device)
    model = nn.Sequential(nn.Linear(demo.PIXELS, 64), nn.ReLU(), nn.Linear(64, demo.CLASSES)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    checkpoint = None if args.out is None else args.out / "checkpoint.pt"
    if args.resume and checkpoint is not None:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sampler.load_state_dict(state["sampler"])
    replica = DistributedDataParallel(model) if processes > 1 else model

    trained = 0
    for epoch in range(sampler.epoch, args.epochs):
        sampler.set_epoch(epoch)
        criterion.set_epoch(epoch)
        consumed = sampler.start  # 0, or where the checkpoint was
        for images, labels in loader:
            optimizer.zero_grad()
            criterion(replica(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            consumed += len(images)
            trained += 1
            if trained == args.stop_after and checkpoint is not None:
                if rank == 0:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    state["sampler"] = sampler.state_dict(consumed=consumed)
                    checkpoint.parent.mkdir(parents=True, exist_ok=True)
                    torch.save(state, checkpoint)
                    print(f"stopped after {trained} steps; --resume --out {args.out} goes on")
                return {}

    images, labels = digits.test.tensors
    with torch.no_grad():
        figures = demo.shot_accuracy(model(images.to(device)).cpu(), labels, digits.class_counts)
    if rank == 0:
        print(demo.line(f"{args.loss}, {args.sampler} sampling", figures))
        if checkpoint is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), checkpoint.with_name("model.pt"))
    return figures


if __name__ == "__main__":
    main()
