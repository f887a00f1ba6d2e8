"""Trains LDAM-DRW, or another loss, on long-tailed digits with Lightning, and can be stopped at any step and resumed.

python python/integrations/lightning_module.py
python python/integrations/lightning_module.py --loss la --epochs 10
python python/integrations/lightning_module.py --loss ce --seeds 5                      the mean of five runs
python python/integrations/lightning_module.py --out runs/lightning --stop-after 40     within an epoch
python python/integrations/lightning_module.py --out runs/lightning --resume            the rest of the same run
python python/integrations/lightning_module.py --devices 2                              two processes, the same samples
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import demo
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ltkernels as ltk
from ltkernels.integrations.lightning import LongTailCallback

LOSSES = ("ldam-drw", "la", "ce")
LEARNING_RATE, DECAY = 5e-3, 0.01


class DigitClassifier(pl.LightningModule):  # type: ignore[misc]
    """The loss is an attribute like any other: its tables move with the module, and its epoch is in the checkpoint.

    The learning rate falls after four fifths of the epochs, as in the code of LDAM-DRW (Cao et al. 2019), whatever the
    loss. The class weights begin there: at the full rate they make a step from a handful of samples of rare classes as
    large as one from all others, and where training ends is a matter of luck.
    """

    def __init__(self, loss: str, digits: demo.Digits, epochs: int, strategy: str = "instance") -> None:
        super().__init__()
        self.digits, self.strategy, self.decay_epoch = digits, strategy, epochs * 4 // 5
        self.features = nn.Sequential(nn.Linear(demo.PIXELS, 64), nn.ReLU())
        self.head: nn.Module = nn.Linear(64, demo.CLASSES)
        counts = digits.class_counts
        self.criterion: nn.Module
        if loss == "ldam-drw":
            self.head = ltk.CosineLinear(64, demo.CLASSES)
            self.criterion = ltk.losses.LDAMLoss(counts, reweight_epoch=self.decay_epoch)
        elif loss == "la":
            self.criterion = ltk.losses.LogitAdjustedLoss(counts)
        else:
            self.criterion = ltk.losses.CrossEntropyLoss()
        self.tested: list[tuple[Tensor, Tensor]] = []
        self.figures: dict[str, float] = {}

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.criterion(self(images), labels)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.tested.append((self(images).cpu(), labels.cpu()))

    def on_test_epoch_end(self) -> None:
        logits, labels = map(torch.cat, zip(*self.tested, strict=True))
        self.figures = demo.shot_accuracy(logits, labels, self.digits.class_counts)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Made when the processes know of one another."""
        sampler: ltk.samplers.LongTailSampler
        if self.trainer.world_size > 1:
            sampler = ltk.samplers.DistributedLongTailSampler(self.digits.labels, self.strategy)
        else:
            sampler = ltk.samplers.LongTailSampler(self.digits.labels, self.strategy)
        return DataLoader(self.digits.train, batch_size=32 // self.trainer.world_size, sampler=sampler)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LRScheduler]]:
        optimizer = torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.decay_epoch], DECAY)]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains and prints a line. Returns its figures, means over the seeds: none, if it was stopped before the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default=LOSSES[0])
    parser.add_argument("--sampler", choices=("instance", "class_balanced", "square_root"), default="instance")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs, each with a division of the data and a start of its own"
    )
    parser.add_argument("--out", type=Path, help="folder for checkpoints; default: one that is deleted")
    parser.add_argument("--stop-after", type=int, default=-1, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args(argv)
    if args.resume and args.out is None:
        parser.error("--resume needs --out")
    if args.seeds < 1 or (args.seeds > 1 and (args.out is not None or args.stop_after >= 0 or args.devices > 1)):
        parser.error("--seeds: expected 1, or more without --out, --stop-after and --devices")

    torch.set_num_threads(1)  # a model this small is slower on more
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*dataloader' does not have many workers|.*is smaller than the logging")
    runs = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(train(args, args.out or Path(folder), seed))
    if len(runs) == 1:
        return runs[0]
    means = {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}
    deviation = statistics.stdev(run["balanced"] for run in runs)
    print(demo.line(f"mean of {len(runs)} runs", means) + f"  (deviation of balanced {deviation:.1%})")
    return means


def train(args: argparse.Namespace, out: Path, seed: int) -> dict[str, float]:
    """One run."""
    pl.seed_everything(seed, verbose=False)
    module = DigitClassifier(args.loss, demo.load_digits(seed), args.epochs, args.sampler)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=args.devices,
        max_epochs=args.epochs,
        max_steps=args.stop_after,
        callbacks=[
            LongTailCallback(),
            ModelCheckpoint(out, "last", every_n_train_steps=1, enable_version_counter=False),
        ],
        default_root_dir=out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=out / "last.ckpt" if args.resume else None)
    if trainer.current_epoch < args.epochs:
        print(f"stopped after {trainer.global_step} steps; --resume --out {out} goes on")
        return {}
    if trainer.world_size > 1:
        torch.distributed.destroy_process_group()
    if trainer.is_global_zero:
        tester = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=out,
        )  # fmt: skip
        tester.test(module, DataLoader(module.digits.test, batch_size=256), verbose=False)
        print(demo.line(f"{args.loss}, {args.sampler} sampling", module.figures))
    return module.figures


if __name__ == "__main__":
    main()
