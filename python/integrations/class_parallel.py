"""Trains on long-tailed digits with the classifier divided among the processes, and the rest of the model replicated
by DistributedDataParallel or sharded by FSDP; goes on where it was stopped, in any number of processes.

All processes together draw the samples that one would draw, in the same steps, and the loss is that of all of them: the
number of processes changes where the class vectors are and nothing else. --compare shows it.

  python python/integrations/class_parallel.py                                            one process
  torchrun --nproc-per-node 2 python/integrations/class_parallel.py --compare             two, and one beside them
  torchrun --nproc-per-node 2 python/integrations/class_parallel.py --backbone fsdp       FSDP for the backbone
  torchrun --nproc-per-node 2 python/integrations/class_parallel.py --out runs/class_parallel --stop-after 40
  python python/integrations/class_parallel.py --out runs/class_parallel --resume         the rest of it, in one
"""

from __future__ import annotations

import argparse
import datetime
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import demo
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import ltkernels as ltk

BATCH = 32  # of all processes together
WIDTH = 64
MAX_NORM = 1.0
# How long a process waits for one that is gone, before it ends with an error too. torchrun ends it sooner.
TIMEOUT = datetime.timedelta(minutes=5)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and prints a line. Returns its figures: none, if it was stopped before the end."""
    parser = demo.resumable_parser(__doc__)
    parser.add_argument("--backbone", choices=("ddp", "fsdp"), default="ddp", help="how its processes share the rest")
    parser.add_argument("--compare", action="store_true", help="train in one process too, and print the difference")
    args = demo.parse_resumable(parser, argv)

    torch.set_num_threads(1)  # a model this small is slower on more
    if "RANK" not in os.environ:  # not started by torchrun
        return run(args)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    try:
        return run(args)
    finally:
        dist.destroy_process_group()


def run(args: argparse.Namespace) -> dict[str, float]:
    """What each process does."""
    processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if BATCH % processes:
        raise SystemExit(f"a batch of {BATCH} is not divided by {processes} processes; start 1, 2, 4, 8, 16 or 32")
    model, figures = train(args, dist.group.WORLD if dist.is_initialized() else None)
    if figures and rank == 0:
        print(demo.line(f"{args.loss}, {args.sampler} sampling", figures))
    if figures and args.compare and dist.is_initialized():
        # One process is a group of one; rank 0 trains in it while the others wait below.
        alone = dist.new_group([0])
        if rank == 0:
            single, _ = train(argparse.Namespace(**vars(args) | {"out": None, "resume": False}), alone)
            expected = whole(single)
        parameters = whole(model)
        if rank == 0:
            largest = max(float((value - expected[name]).abs().max().detach()) for name, value in parameters.items())
            print(f"one process has the same parameters, up to {largest:.0e}")
    return figures


def train(args: argparse.Namespace, group: dist.ProcessGroup | None) -> tuple[nn.ModuleDict, dict[str, float]]:
    """Trains in the processes of a group; None is this process without any."""
    rank, processes = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    digits = demo.load_digits()
    sampler = ltk.samplers.DistributedLongTailSampler(
        digits.labels, args.sampler, num_replicas=processes, rank=rank, drop_last=True
    )
    loader = DataLoader(digits.train, BATCH // processes, sampler=sampler, drop_last=True)
    criterion = ltk.losses.LogitAdjustedLoss(digits.class_counts) if args.loss == "la" else None
    # DDP and FSDP get the backbone alone: the head's gradients are those of the whole batch already.
    backbone = nn.Sequential(nn.Linear(demo.PIXELS, WIDTH), nn.ReLU()).to(device)
    head = ltk.losses.LinearCrossEntropyLoss(
        WIDTH, demo.CLASSES, bias=True, criterion=criterion, group=group, batch="gathered", device=device
    ).to(device)
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    replica: nn.Module = backbone
    if group is not None and args.backbone == "fsdp":
        fully_shard(backbone, mesh=DeviceMesh.from_group(group, device.type))
    elif processes > 1:
        replica = DistributedDataParallel(backbone, process_group=group)
    # Two groups of parameters, since fused and foreach optimizers do not mix DTensors and plain tensors.
    optimizer = torch.optim.Adam([{"params": list(part.parameters())} for part in (backbone, head)], lr=5e-3)
    checkpoint = None if args.out is None else args.out / "checkpoint"
    if args.resume and checkpoint is not None:
        load(checkpoint, model, optimizer, sampler)

    trained = 0
    for epoch in range(sampler.epoch, args.epochs):
        sampler.set_epoch(epoch)
        head.set_epoch(epoch)
        consumed = sampler.start  # 0, or where the checkpoint was
        for images, labels in loader:
            optimizer.zero_grad()
            head(replica(images.to(device)), labels.to(device)).backward()
            clip_grad_norm_([backbone, head], MAX_NORM)
            optimizer.step()
            consumed += len(images)
            trained += 1
            if trained == args.stop_after and checkpoint is not None:
                save(checkpoint, model, optimizer, sampler, consumed)
                if rank == 0:
                    print(f"stopped after {trained} steps; --resume --out {args.out} goes on")
                return model, {}

    images, labels = digits.test.tensors
    with torch.no_grad():
        # Each process has a part of the test images, and gets their logits over all classes.
        logits = head.logits(backbone(images[rank::processes].to(device))).cpu()
        metric = ltk.metrics.ShotAccuracy(digits.class_counts, process_group=group)
        metric.update(logits, labels[rank::processes])
        return model, {name: float(value) for name, value in metric.compute().items()}


def save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sampler: ltk.samplers.DistributedLongTailSampler,
    consumed: int,
) -> None:
    """Each process writes what it has."""
    parameters, state = get_state_dict(model, optimizer)
    content = {"model": parameters, "optimizer": state, "sampler": sampler.state_dict(consumed=consumed)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as in load()
        state_dict_saver.save(content, checkpoint_id=path, no_dist=not dist.is_initialized())


def load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, sampler: ltk.samplers.DistributedLongTailSampler
) -> None:
    """Each process reads what it needs, whichever processes wrote it."""
    parameters, state = get_state_dict(model, optimizer)
    content: dict[str, Any] = {"model": parameters, "optimizer": state, "sampler": sampler.state_dict()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # so it is meant to be
        state_dict_loader.load(content, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    sampler.load_state_dict(content["sampler"])


def clip_grad_norm_(parts: Sequence[nn.Module], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` over modules whose parameters are DTensors in one and plain in another."""
    gradients = [[p.grad for p in part.parameters() if p.grad is not None] for part in parts]
    norms = [torch.nn.utils.get_total_norm(of) for of in gradients]
    total: Tensor = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    for part in parts:
        torch.nn.utils.clip_grads_with_norm_(part.parameters(), max_norm, total)
    return total


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter as a plain tensor; all processes call it."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.detach()
        for name, value in model.named_parameters()
    }


if __name__ == "__main__":
    main()
