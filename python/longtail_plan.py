"""Which runs are to be trained, and with what settings. Does not import torch: only the workers need it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers import Link, Stopped

TITLES = {
    "ce": "cross entropy",
    "weighted": "weighted CE, 1/n",
    "cb": "class-balanced",
    "la": "logit adjustment",
    "la-posthoc": "LA post hoc (CE)",
    "ldam-drw": "LDAM-DRW",
    "vs": "VS",
    "seesaw": "seesaw",
    "arcface": "ArcFace by count",
    "label-aware-smoothing": "label-aware smooth.",
    "equalization": "softmax equalization",
    "lade": "LADE",
    "sigmoid-focal": "sigmoid focal",
    "cb-sigmoid": "class-bal. sigmoid",
    "ride": "RIDE",
    "sade": "SADE",
    "bbn": "BBN",
    "ace": "ACE",
    "lfme": "LFME",
}
"""Methods in the order of tables and plots."""

DEFAULT = ("ce", "weighted", "cb", "la", "la-posthoc", "ldam-drw", "vs")
"""Methods that are trained when none is named: what fits into three minutes."""

SAMPLERS = (
    "instance",
    "class_balanced",
    "square_root",
    "progressive",
    "effective_number",
    "reversed",
    "class_aware",
    "over_sampling",
)
"""Strategies of ``ltk.samplers.LongTailSampler`` that ``--sampler`` offers; an epoch is as long with each."""


def trained_method(method: str) -> str:
    """The training run that a method's figures come from."""
    return "ce" if method == "la-posthoc" else method


@dataclass(frozen=True)
class Recipe:
    """How a data set is trained: Adam, the learning rate falling linearly to zero."""

    epochs: int
    batch_size: int
    learning_rate: float


RECIPES = {
    "airports": Recipe(epochs=10, batch_size=512, learning_rate=0.03),
    "cities": Recipe(epochs=10, batch_size=512, learning_rate=0.03),
    "tokens": Recipe(epochs=3, batch_size=512, learning_rate=0.006),
    "digits": Recipe(epochs=40, batch_size=32, learning_rate=0.003),
}
"""Short, because twelve runs have to fit in three minutes on two cores. ``--validate`` tries others."""

VS_GAMMA = 0.05
"""VS (Kini et al. 2021) divides a class's training logits by (n_max / n)^gamma. Published is 0.3, for an imbalance of
100: the rarest class is divided by 4. At the 4,000 of airports that is 12; the model makes up for it in training, and
predicts hardly anything but rare classes at evaluation, without the divisor. On a part of the training data, balanced
accuracy, mean ± standard deviation of two seeds: gamma 0 (which is logit adjustment) 20.7 ± 0.2 %, 0.05 20.0 ± 0.3 %,
0.1 18.6 ± 1.1 %, 0.15 16.1 ± 3.0 %, 0.2 14.0 ± 2.4 %, 0.3 13.1 ± 1.1 %. So 0.05, the best that is not 0; it moves 1.8
points more to few-shot classes than 0 does. The command, once for each gamma:
``python python/train.py --method vs --validate --vs-gamma 0.05``."""


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; the names stand in error messages."""

    data: str
    method: str
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    vs_gamma: float
    backend: str | None
    validate: bool
    sampler: str


@dataclass(frozen=True)
class Task:
    """A run, and how it is kept."""

    settings: Settings
    checkpoint: Path
    resume: bool
    seconds_between_checkpoints: float

    @property
    def title(self) -> str:
        return f"{TITLES[self.settings.method]}, seed {self.settings.seed}"


def runs(
    data: str,
    methods: Sequence[str],
    seeds: int,
    *,
    epochs: int | None = None,
    vs_gamma: float = VS_GAMMA,
    backend: str | None = None,
    validate: bool = False,
    sampler: str = SAMPLERS[0],
) -> Iterator[Settings]:
    """The settings of every run that these methods need: all methods of a seed, then the next seed.

    Without ``epochs`` it is those of the data set's recipe.
    """
    recipe = RECIPES[data]
    for seed in range(seeds):
        for method in dict.fromkeys(trained_method(method) for method in methods):
            yield Settings(
                data=data,
                method=method,
                seed=seed,
                epochs=recipe.epochs if epochs is None else epochs,
                batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                vs_gamma=vs_gamma,
                backend=backend,
                validate=validate,
                sampler=sampler,
            )


def work(task: Task, link: Link) -> dict[str, Any]:
    """What a worker does with a task: ``longtail_run.train``."""
    from longtail_run import train

    if link.stop_requested():  # while torch was loading
        raise Stopped
    return train(task, link)
