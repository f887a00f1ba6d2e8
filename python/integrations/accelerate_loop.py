"""Trains on long-tailed digits in a loop with accelerate, in one process or several, and goes on where it was stopped.

python python/integrations/accelerate_loop.py
torchrun --nproc-per-node 2 python/integrations/accelerate_loop.py                     the same samples, shared out
python python/integrations/accelerate_loop.py --out runs/accelerate --stop-after 40    within an epoch
python python/integrations/accelerate_loop.py --out runs/accelerate --resume           the rest of the same run
"""

from __future__ import annotations

from collections.abc import Sequence

import demo
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

import ltkernels as ltk
from ltkernels.integrations.accelerate import epoch_batches

BATCH = 32  # of all processes together


class Position:
    """Where the loop is: stored and loaded by ``accelerator.save_state`` and ``load_state``."""

    epoch = step = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and prints a line. Returns its figures: none, if it was stopped before the end."""
    args = demo.resumable(__doc__, argv)

    torch.set_num_threads(1)  # a model this small is slower on more
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    digits = demo.load_digits()
    sampler = ltk.samplers.LongTailSampler(digits.labels, args.sampler)
    model = nn.Sequential(nn.Linear(demo.PIXELS, 64), nn.ReLU(), nn.Linear(64, demo.CLASSES))
    criterion: nn.Module
    if args.loss == "la":
        criterion = ltk.losses.LogitAdjustedLoss(digits.class_counts)
    else:
        criterion = ltk.losses.CrossEntropyLoss()
    loader = DataLoader(digits.train, BATCH // accelerator.num_processes, sampler=sampler)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    criterion.to(accelerator.device)
    position = Position()
    accelerator.register_for_checkpointing(position)
    if args.resume:
        accelerator.load_state(str(args.out))

    trained = 0
    for epoch in range(position.epoch, args.epochs):
        criterion.set_epoch(epoch)
        for images, labels in epoch_batches(loader, epoch, skip_batches=position.step):
            optimizer.zero_grad()
            accelerator.backward(criterion(model(images), labels))
            optimizer.step()
            position.step += 1
            trained += 1
            if trained == args.stop_after:
                accelerator.save_state(str(args.out))
                accelerator.print(f"stopped after {trained} steps; --resume --out {args.out} goes on")
                accelerator.end_training()
                return {}
        position.epoch, position.step = epoch + 1, 0

    images, labels = digits.test.tensors
    with torch.no_grad():
        logits = accelerator.unwrap_model(model)(images.to(accelerator.device)).cpu()
    figures = demo.shot_accuracy(logits, labels, digits.class_counts)
    accelerator.print(demo.line(f"{args.loss}, {args.sampler} sampling", figures))
    accelerator.end_training()
    return figures


if __name__ == "__main__":
    main()
