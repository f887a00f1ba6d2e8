"""One of the processes of test_integration_huggingface.py: trains, stops and resumes; writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from test_integration_huggingface import COUNTS, Model, hf_loss_func, trainer

import ltkernels as ltk

STOP = 9  # of 7 steps an epoch, each process two batches: in the second epoch


def vector(model: Model) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = Model()
    before = vector(model)
    loss = hf_loss_func(ltk.losses.LogitAdjustedLoss(COUNTS))
    run = trainer(folder / "step", loss, model, gradient_accumulation_steps=2, max_steps=1)
    run.train()
    report = {"step": (before - vector(model)).tolist(), "drawn": model.trained}

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
    (folder / f"rank{run.args.process_index}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
