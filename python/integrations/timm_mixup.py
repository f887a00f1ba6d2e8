"""Trains a small timm vision transformer on long-tailed digits with timm's mixup and a loss for the long tail.

The last epochs are without mixup, as with ``--mixup-off-epoch`` of timm's training script: one loss takes probabilities
and labels.

  python python/integrations/timm_mixup.py
  python python/integrations/timm_mixup.py --loss ldam --sampler class_balanced
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import demo
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import ltkernels as ltk
from ltkernels.integrations.timm import mixup_pairs

try:
    import timm
    from timm.data import Mixup
    from timm.optim import create_optimizer_v2
    from timm.task import ClassificationTask
except ModuleNotFoundError as error:
    raise SystemExit(
        f"timm_mixup.py: {error.name} is missing; it needs timm, and timm the torchvision of your build of torch"
    ) from error

LOSSES = ("ce", "la", "ldam")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains with each loss and prints a table. Returns its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--sampler", choices=("instance", "class_balanced", "square_root"), default="instance")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a model this small is slower on more
    digits = demo.load_digits()
    return {name: train(name, digits, args.sampler, args.epochs) for name in args.loss}


def train(name: str, digits: demo.Digits, strategy: str, epochs: int) -> dict[str, float]:
    """One run."""
    torch.manual_seed(0)
    np.random.seed(0)  # timm's mixup draws with it
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=48, depth=1, num_heads=4,
        num_classes=demo.CLASSES,
    )  # fmt: skip
    criterion: nn.Module
    if name == "ldam":
        model.head = ltk.CosineLinear(model.num_features, demo.CLASSES)
        criterion = ltk.losses.LDAMLoss(digits.class_counts)
    elif name == "la":
        criterion = ltk.losses.LogitAdjustedLoss(digits.class_counts)
    else:
        criterion = ltk.losses.CrossEntropyLoss()
    task = ClassificationTask(model, criterion=criterion, verbose=False)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.0, label_smoothing=0.0, num_classes=demo.CLASSES)
    sampler = ltk.samplers.LongTailSampler(digits.labels, strategy)
    loader = DataLoader(digits.train, batch_size=32, sampler=sampler, drop_last=True)  # timm mixes an even number
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.01)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        criterion.set_epoch(epoch)
        for pixels, labels in loader:
            images, target = pixels.view(-1, 1, 8, 8), labels
            if epoch < epochs * 3 // 4:
                images, target = mixup(images, labels)
                if name == "ldam":  # its margin is that of a label
                    target = mixup_pairs(labels, target)
            optimizer.zero_grad()
            task(images, target)["loss"].backward()
            optimizer.step()

    images, labels = digits.test.tensors
    model.eval()
    with torch.no_grad():
        figures = demo.shot_accuracy(model(images.view(-1, 1, 8, 8)), labels, digits.class_counts)
    print(demo.line(f"{name}, {strategy} sampling", figures))
    return figures


if __name__ == "__main__":
    main()
