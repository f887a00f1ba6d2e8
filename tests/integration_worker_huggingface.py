"""One of the processes of test_integration_huggingface.py: trains, stops and resumes; writes what it saw."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from test_integration_huggingface import COUNTS, WEIGHT, Model, hf_loss_func, trainer

import ltkernels as ltk

STOP = 9  # of 7 steps an epoch, each process two batches: in the second epoch


def vector(model: Model) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def work(folder: Path) -> dict[str, Any]:
    loss = hf_loss_func(ltk.losses.LogitAdjustedLoss(COUNTS))
    weighted = hf_loss_func(ltk.losses.LogitAdjustedLoss(COUNTS, weight=WEIGHT))

    def step(loss: Any, **options: Any) -> tuple[list[float], list[list[int]]]:
        model = Model()
        before = vector(model)
        trainer(folder / "step", loss, model, gradient_accumulation_steps=2, max_steps=1, **options).train()
        return (before - vector(model)).tolist(), model.trained

    report: dict[str, Any] = {}
    report["step"], report["drawn"] = step(loss)
    report["weighted step"], _ = step(weighted)
    report["step by own labels"], _ = step(weighted, average_tokens_across_devices=False)

    class StopAt(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest) -> None:
            control.should_training_stop = control.should_save = state.global_step == STOP

    whole, first, second = Model(), Model(), Model()
    options = {"num_train_epochs": 2, "learning_rate": 0.1}
    trainer(folder / "whole", loss, whole, **options).train()
    stopped = trainer(folder / "run", loss, first, **options, save_steps=10**6)
    stopped.add_callback(StopAt)
    stopped.train()
    trainer(folder / "run", loss, second, **options).train(
        resume_from_checkpoint=str(folder / f"run/checkpoint-{STOP}")
    )
    report |= {"whole": whole.trained, "resumed": second.trained, "stop": STOP}
    return report


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    report = work(folder)
    (folder / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(report))
    gc.collect()  # a DistributedDataParallel in the cycles of a Trainer that goes after its process group can hang
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
