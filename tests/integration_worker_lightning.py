"""One of the processes of test_integration_lightning.py: trains, stops and resumes; writes what it saw."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from test_integration_lightning import (
    BATCH,
    LABELS,
    LongTailCallback,
    LongTailSampler,
    Module,
    Positions,
    every_step,
    in_batches,
    pl,
    plain,
    trainer,
)
from torch.utils.data import DataLoader

import ltkernels as ltk

STOP = 9  # of 7 steps an epoch: in the second


def distributed() -> DataLoader[Any]:
    return DataLoader(Positions(), 4, sampler=ltk.samplers.DistributedLongTailSampler(LABELS, seed=3))


def wrapped() -> DataLoader[Any]:
    return DataLoader(Positions(), 4, sampler=ltk.samplers.LongTailSampler(LABELS, seed=3))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    report: dict[str, Any] = {"stop": STOP}

    def fit(loader: Any, *callbacks: Any, checkpoint: Path | None = None, **options: Any) -> tuple[Any, Module]:
        module = Module(loader)
        made = trainer(folder, LongTailCallback(), *callbacks, devices=2, strategy="ddp", **options)
        made.fit(module, ckpt_path=checkpoint)
        return made, module

    def vector(module: Module) -> list[float]:
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).tolist()

    def error_of(loader: Any, **options: Any) -> str:
        try:
            fit(loader, max_steps=1, **options)
        except (TypeError, ValueError) as error:
            return str(error)
        return "none"

    made, whole = fit(distributed, max_epochs=2)
    report |= {"distributed": whole.model.trained, "parameters": vector(whole)}
    report["sampler"] = type(made.train_dataloader.sampler).__name__
    fit(distributed, every_step(folder), max_steps=STOP)
    _, resumed = fit(distributed, checkpoint=folder / f"step={STOP}.ckpt", max_epochs=2)
    report |= {"resumed": resumed.model.trained, "resumed parameters": vector(resumed)}

    end = pl.callbacks.ModelCheckpoint(folder, "end", every_n_epochs=1)
    fit(wrapped, end, max_epochs=1)
    report["wrapped"] = fit(wrapped, every_step(folder / "wrapped"), max_epochs=2)[1].model.trained
    report["resumed at the end"] = fit(wrapped, checkpoint=folder / "end.ckpt", max_epochs=2)[1].model.trained
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(wrapped, checkpoint=folder / "wrapped/step=3.ckpt", max_steps=4)
    report["warning within an epoch"] = " ".join(str(warning.message) for warning in caught)

    report["error of the same samples"] = error_of(plain, use_distributed_sampler=False)
    report["error of a batch sampler"] = error_of(in_batches)
    repeated = LongTailSampler(LABELS, "repeat_factor", threshold=0.5)
    report["error of different lengths"] = error_of(lambda: DataLoader(Positions(), 4, sampler=repeated))
    made, module = fit(
        lambda: DataLoader(
            Positions(),
            batch_sampler=ltk.samplers.LongTailBatchSampler(
                ltk.samplers.DistributedLongTailSampler(LABELS, seed=3), BATCH
            ),
        ),
        use_distributed_sampler=False,
        max_steps=1,
    )
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, module.model.trained[0])
    report["alone"] = [position for pair in zip(*both, strict=True) for position in pair]
    (folder / f"rank{made.global_rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
