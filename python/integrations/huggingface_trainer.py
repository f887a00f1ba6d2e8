"""Trains a small vision transformer on long-tailed digits with the Hugging Face Trainer, once for each loss.

The model comes from a configuration: nothing is downloaded. Loss, sampler and metrics are the only lines that differ
from any other Trainer program.

  python python/integrations/huggingface_trainer.py
  python python/integrations/huggingface_trainer.py --loss ce --sampler class_balanced
  torchrun --nproc-per-node 2 python/integrations/huggingface_trainer.py       two processes, the same samples
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import demo
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import ltkernels as ltk
from ltkernels.integrations.huggingface import LongTailTrainerMixin, hf_compute_metrics, hf_loss_func

LOSSES: dict[str, Callable[[Tensor, int], nn.Module]] = {
    "ce": lambda counts, epochs: ltk.losses.CrossEntropyLoss(),
    "la": lambda counts, epochs: ltk.losses.LogitAdjustedLoss(counts),
    "cb-drw": lambda counts, epochs: ltk.losses.CrossEntropyLoss(
        ltk.rebalance.DeferredReweighting(counts, reweight_epoch=epochs // 2)
    ),
}


class LongTailTrainer(LongTailTrainerMixin, Trainer):  # type: ignore[misc]
    """The Trainer, with ``train_sampler=``."""


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Trains with each loss and prints a table. Returns its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--sampler", choices=("instance", "class_balanced", "square_root"), default="instance")
    parser.add_argument("--epochs", type=int, default=24)
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # a model this small is slower on more
    digits = demo.load_digits()
    return {name: train(name, digits, args.sampler, args.epochs) for name in args.loss}


def train(name: str, digits: demo.Digits, strategy: str, epochs: int) -> dict[str, float]:
    """One run."""
    set_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=96,
            hidden_dropout_prob=0.0,
            num_labels=demo.CLASSES,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = LongTailTrainer(
            model,
            TrainingArguments(
                output_dir=folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=16 // int(os.environ.get("WORLD_SIZE", "1")),  # torchrun sets it
                gradient_accumulation_steps=2,  # the gradient is that of 32
                per_device_eval_batch_size=256,
                learning_rate=3e-3,
                weight_decay=0.01,
                lr_scheduler_type="cosine",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                log_level="error",
                logging_strategy="no",
                use_cpu=True,
            ),
            train_dataset=digits.train,
            eval_dataset=digits.test,
            data_collator=collate,
            compute_loss_func=hf_loss_func(LOSSES[name](digits.class_counts, epochs)),
            compute_metrics=hf_compute_metrics(digits.class_counts),
            train_sampler=ltk.samplers.LongTailSampler(digits.labels, strategy),
        )
        trainer.remove_callback(PrinterCallback)  # it prints each log as a dict
        trainer.train()
        measured: dict[str, Any] = trainer.evaluate()
    figures = {key.removeprefix("eval_"): value for key, value in measured.items() if isinstance(value, float)}
    if trainer.is_world_process_zero():
        print(demo.line(f"{name}, {strategy} sampling", figures))
    return figures


def collate(samples: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch as the model's arguments, and ``labels``, which the Trainer takes out for the loss."""
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images).view(-1, 1, 8, 8), "labels": torch.stack(labels)}


if __name__ == "__main__":
    main()
