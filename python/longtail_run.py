"""One training run: a method, a seed, checkpoints on the way and figures at the end.

A run is a function of its settings: stopped anywhere and resumed from its checkpoint, it ends with the same bits. For
that a checkpoint holds the model, the optimizer, the loss (schedules such as DRW live in its buffers), the
learning-rate schedule, torch's random state, and where in its stream each sampler is: three numbers.
"""

from __future__ import annotations

import math
import platform
import time
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import checkpoint
import longtail_data
import longtail_metrics
import numpy as np
import torch
from longtail_data import LongTailData
from longtail_method import Loss
from longtail_methods import METHODS, check_agreement, evaluations
from longtail_model import Batches
from longtail_plan import Settings, Task
from torch import Tensor
from workers import Link, Stopped, UserError

import ltkernels as ltk

MEASURE_EVERY = 10
"""Every tenth step times the loss alone, with ltkernels and in plain PyTorch; the others are timed as whole steps."""
TEST_BATCH = 1024
SEED_OF_SECOND = 2**32
"""Between the seeds of two samplers: that of a run is small."""


@lru_cache(maxsize=1)
def load_data(name: str) -> tuple[LongTailData, Batches]:
    data = longtail_data.load(name)
    return data, Batches(data)


def train(task: Task, link: Link) -> dict[str, Any]:
    """Trains one run in a worker process and returns its result: numbers, lists and strings only.

    Raises:
        UserError: a checkpoint of another configuration, a backend that this machine does not have, a diverged loss.
        Stopped: asked to stop; the checkpoint holds all steps done.
    """
    torch.set_num_threads(1)  # the workers are as many as the cores; more threads would only wait for one another
    try:
        ltk.use_backend(task.settings.backend)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    data, batches = load_data(task.settings.data)
    run = Run(task.settings, data, batches)
    if task.resume and task.checkpoint.exists():
        state = checkpoint.load(task.checkpoint, run.config)
        if "result" in state:
            finished: dict[str, Any] = state["result"]
            return finished
        run.load_state_dict(state)

    saved = time.monotonic()
    while run.step < run.total_steps:
        run.train_step()
        link.report({"step": run.step, "total": run.total_steps, "loss": run.mean_loss()})
        stop = link.stop_requested()
        if stop or time.monotonic() - saved >= task.seconds_between_checkpoints:
            checkpoint.save(task.checkpoint, run.config, run.state_dict())
            saved = time.monotonic()
        if stop:
            raise Stopped
    result = run.result()
    checkpoint.save(task.checkpoint, run.config, {"model": run.model.state_dict(), "result": result})
    return result


class Run:
    """The state of a training run, one step at a time."""

    def __init__(self, settings: Settings, data: LongTailData, batches: Batches) -> None:
        self.settings, self.data, self.batches = settings, data, batches
        part = longtail_data.split(data, settings.seed, validate=settings.validate)
        self.labels = torch.from_numpy(data.labels)
        self.train = torch.from_numpy(part.train)
        self.test = torch.from_numpy(part.test)
        self.class_counts = torch.from_numpy(part.class_counts)
        self.steps_per_epoch = math.ceil(len(part.train) / settings.batch_size)
        self.method = METHODS[settings.method]
        self.total_steps = self.method.stages * settings.epochs * self.steps_per_epoch

        torch.manual_seed(settings.seed)
        self.loss: Any = self.method.build(self.class_counts, settings)
        self.model = self.method.classifier(data, self.loss)
        self.plain_loss = self.method.plain(self.class_counts, self.loss)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate, fused=True)
        self.schedule = self._stage_schedule()

        strategies = [settings.sampler, "reversed"] if self.method.paired else [settings.sampler]
        self.samplers = [
            ltk.samplers.LongTailSampler(
                data.labels,
                strategy,
                indices=part.train,
                num_samples=len(part.train),
                seed=settings.seed + place * SEED_OF_SECOND,
                **({"epochs": settings.epochs} if strategy == "progressive" else {}),
            )
            for place, strategy in enumerate(strategies)
        ]
        self.step = 0
        self.losses: list[float] = []
        self.timings: dict[str, list[float]] = {"step": [], "loss": [], "plain_loss": []}
        self.config = {
            **asdict(settings),
            "loss": repr(self.loss),
            "model": repr(self.model),
            "data_checksum": data.fingerprint(),
            "torch": str(torch.__version__),
            "ltkernels": ltk.__version__,
        }

    def train_step(self) -> None:
        """One step of the run."""
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        if batch == 0:
            if epoch and epoch % self.settings.epochs == 0:
                self.schedule = self._stage_schedule()
            self.loss.set_epoch(epoch)
            if self.method.watches:
                self.loss.watch(self.logits(self.train), self.labels[self.train])
            for sampler in self.samplers:
                sampler.set_epoch(epoch)
            self.losses.append(0.0)
        first = batch * self.settings.batch_size
        last = min(first + self.settings.batch_size, len(self.train))
        rows = torch.cat([sampler.indices(first, last) for sampler in self.samplers])
        full = last - first == self.settings.batch_size

        start = time.perf_counter()
        logits = self.model(*self.batches.batch(rows))
        labels = self.labels[rows]
        measure = self.step % MEASURE_EVERY == 0 and full
        if measure:
            self._measure_loss(logits, labels)
        loss = self.loss(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        if not measure and full:
            self.timings["step"].append(time.perf_counter() - start)

        self.schedule.step()
        self.step += 1
        self.losses[-1] += value
        if not math.isfinite(value):
            raise UserError(
                f"{self.settings.method}, seed {self.settings.seed}: the loss is {value} at step {self.step}"
            )

    def _stage_schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate  # a stage before ended at 0
        steps = self.settings.epochs * self.steps_per_epoch
        return torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=steps)

    def _measure_loss(self, logits: Tensor, labels: Tensor) -> None:
        """Times forward and backward of the loss alone, both ways on the same logits; which goes first alternates.

        Each is called twice, and the second call counts: this run trains with ltkernels, so the buffers of that loss
        are in the allocator's hands anyway, while the plain form would pay for getting its own from the system, which
        it would not do in a run of its own.
        """
        if self.step == 0:
            exact = self.method.exact(self.loss)
            check_agreement(logits, labels, exact, self.method.plain(self.class_counts, exact))
        both: list[tuple[str, Loss]] = [("loss", self.loss), ("plain_loss", self.plain_loss)]
        for name, loss_fn in both if self.step // MEASURE_EVERY % 2 else both[::-1]:
            for _ in range(2):
                start = time.perf_counter()
                torch.autograd.grad(loss_fn(logits, labels), logits)
                seconds = time.perf_counter() - start
            self.timings[name].append(seconds)

    def mean_loss(self) -> float:
        """Mean training loss of the steps of the epoch under way."""
        return self.losses[-1] / ((self.step - 1) % self.steps_per_epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss": self.loss.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": torch.get_rng_state(),
            "samplers": [
                sampler.state_dict(consumed=self.step % self.steps_per_epoch * self.settings.batch_size)
                for sampler in self.samplers
            ],
            "step": self.step,
            "losses": self.losses,
            "timings": self.timings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss.load_state_dict(state["loss"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        for sampler, saved in zip(self.samplers, state["samplers"], strict=True):
            sampler.load_state_dict(saved)
        self.step = state["step"]
        self.losses, self.timings = state["losses"], state["timings"]

    @torch.no_grad()
    def logits(self, rows: Tensor) -> Tensor:
        """The model's logits of some samples."""
        self.model.eval()
        parts = [self.model(*self.batches.batch(some)) for some in torch.split(rows, TEST_BATCH)]
        self.model.train()
        return torch.cat(parts, dim=-2)  # experts have a dimension before

    def result(self) -> dict[str, Any]:
        """Figures of the trained model on the test part, by method, and the timings."""
        logits = self.logits(self.test)
        predicted = self.method.predict(self.loss, logits)
        counts = self.class_counts.numpy()
        outcomes = {
            name: self.figures(adjusted)
            for name, adjusted in evaluations(self.settings.method, predicted, self.class_counts).items()
        }
        if self.method.each is not None:
            experts = self.method.each(self.loss, logits)
            outcomes[self.settings.method]["experts"] = [self.figures(expert) for expert in experts]
        backend = self.settings.backend or ltk.available_backends("cpu")[0]
        return {
            "settings": asdict(self.settings),
            "loss": repr(self.loss),
            "outcomes": outcomes,
            "train_loss": (np.array(self.losses) / self.steps_per_epoch).tolist(),
            "class_counts": counts.tolist(),
            "timings": self.timings,
            "backend": backend,
            "versions": {
                "ltkernels": ltk.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }

    def figures(self, logits: Tensor) -> dict[str, Any]:
        """How good the test part's logits are: recall by class, and its means."""
        labels = torch.from_numpy(self.data.labels[self.test.numpy()])
        return longtail_metrics.summarize(logits, labels, self.class_counts)
