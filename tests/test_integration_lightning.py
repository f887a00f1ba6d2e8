"""The real Lightning Trainer with this package's losses and samplers."""

from __future__ import annotations

import itertools
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_cases import COUNTS, LABELS, PROGRAMS, ROOT, SAMPLES, Model, Positions, reports, run, torchrun
from torch.utils.data import DataLoader

import ltkernels as ltk
from ltkernels.samplers import DistributedLongTailSampler, LongTailBatchSampler, LongTailSampler

pl = pytest.importorskip("lightning.pytorch", reason="needs lightning")

from ltkernels.integrations.lightning import LongTailCallback  # noqa: E402

BATCH = 8
STEPS = -(-SAMPLES // BATCH)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*resuming from a checkpoint that ended"),
    pytest.mark.filterwarnings(
        "ignore:.*LeafSpec", "ignore:'set_vital' is deprecated", "ignore:.*smaller than the log"
    ),
    pytest.mark.filterwarnings("ignore:.*max_epochs", "ignore:.*exists and is not empty", "ignore:Be aware that"),
]


class Module(pl.LightningModule):
    """A linear model that notes what it was trained with, and in which epoch the loss believed to be."""

    def __init__(self, loader: Any, schedule: ltk.rebalance.DeferredReweighting | None = None) -> None:
        super().__init__()
        self.model, self.loader = Model(), loader
        self.schedule = schedule or ltk.rebalance.DeferredReweighting(COUNTS, reweight_epoch=1, beta=0.9)
        self.criterion = ltk.losses.LogitAdjustedLoss(COUNTS, weight=self.schedule)
        self.epochs: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.epochs.append(int(self.schedule.epoch))
        return self.criterion(self.model(batch["features"], batch["position"])["logits"], batch["labels"])

    def train_dataloader(self) -> Any:
        return self.loader() if callable(self.loader) else self.loader

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "default_root_dir": folder,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks),
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


def every_step(folder: Path) -> Any:
    """Keeps the checkpoint of each step: what a run leaves that is killed there."""
    return pl.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


def plain(workers: int = 0, **options: Any) -> DataLoader[Any]:
    sampler = LongTailSampler(LABELS, seed=3)
    return DataLoader(Positions(), BATCH, sampler=sampler, num_workers=workers, **options)


def in_batches(workers: int = 0) -> DataLoader[Any]:
    batches = LongTailBatchSampler(LongTailSampler(LABELS, seed=3), BATCH)
    return DataLoader(Positions(), batch_sampler=batches, num_workers=workers)


def stateful(workers: int = 0) -> Any:
    kind = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    return kind(Positions(), BATCH, sampler=LongTailSampler(LABELS, seed=3), num_workers=workers)


class Rows(Positions):
    """A data set that takes the positions of a batch."""

    def __getitem__(self, index: Any) -> Any:
        samples = [super(Rows, self).__getitem__(i) for i in index]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def batches_as_samples(workers: int = 0) -> DataLoader[Any]:
    sampler = LongTailBatchSampler(LongTailSampler(LABELS, seed=3), BATCH)
    return DataLoader(Rows(), batch_size=None, sampler=sampler, num_workers=workers)


def one_rank(workers: int = 0) -> DataLoader[Any]:
    sampler = DistributedLongTailSampler(LABELS, seed=3, num_replicas=1, rank=0)
    return DataLoader(Positions(), BATCH, sampler=sampler, num_workers=workers)


def stream(epochs: int, drop_last: bool = False) -> list[list[int]]:
    """What a run that is not interrupted trains with."""
    sampler = LongTailSampler(LABELS, seed=3)
    return [batch for _ in range(epochs) for batch in torch.utils.data.BatchSampler(sampler, BATCH, drop_last)]


@pytest.mark.parametrize("make", [plain, in_batches, stateful, one_rank])
def test_epochs_of_sampler_and_loss(make: Any, tmp_path: Path) -> None:
    module = Module(make)
    trainer(tmp_path, LongTailCallback()).fit(module)
    assert module.model.trained == stream(3)
    assert module.epochs == [epoch for epoch in range(3) for _ in range(STEPS)]


def test_a_loss_outside_the_module_and_one_sampler_for_two_loaders(tmp_path: Path) -> None:
    outside = ltk.losses.RIDELoss(COUNTS, reweight_epoch=1)
    module = Module(lambda: {"first": plain(), "second": plain()})
    module.training_step = lambda batch, batch_idx: type(module).training_step(module, batch["second"], batch_idx)
    trainer(tmp_path, LongTailCallback(outside), max_epochs=2).fit(module)
    assert int(outside.weight.epoch) == 1
    assert module.model.trained == stream(2)


# Within the first epoch of 13 steps, at its last step, within the second, and at its end, with the checkpoint of a step
# (None: of the epoch's end). With workers the loader has drawn ahead of what was trained, and starting them takes long.
STOPS = [("step", 3), ("step", 13), ("step", 17), ("epoch", 13), ("epoch", 26)]
CASES = [
    *((make, 0, *stop) for make in (plain, in_batches, batches_as_samples, stateful, one_rank) for stop in STOPS),
    (plain, 2, "step", 17),
    (plain, 2, "epoch", 13),
    (in_batches, 2, "step", 3),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Module:
    module = Module(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path_factory.mktemp("whole")).fit(module)  # without the callback the epochs of the loss are missing
        module = Module(plain)
        trainer(tmp_path_factory.mktemp("whole"), LongTailCallback()).fit(module)
    return module


@pytest.mark.parametrize(("make", "workers", "kind", "stop"), CASES)
def test_resumed_run_is_the_same_run(
    make: Any, workers: int, kind: str, stop: int, whole: Module, tmp_path: Path
) -> None:
    first, second = Module(lambda: make(workers)), Module(lambda: make(workers))
    if kind == "step":
        trainer(tmp_path, LongTailCallback(), every_step(tmp_path), max_steps=stop).fit(first)
        checkpoint = tmp_path / f"step={stop}.ckpt"
    else:
        saving = pl.callbacks.ModelCheckpoint(tmp_path, "end", every_n_epochs=1)
        trainer(tmp_path, LongTailCallback(), saving, max_epochs=stop // STEPS).fit(first)
        checkpoint = tmp_path / "end.ckpt"
    trainer(tmp_path, LongTailCallback()).fit(second, ckpt_path=checkpoint)
    assert second.model.trained == whole.model.trained[stop:]
    assert second.epochs == whole.epochs[stop:]
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


def test_resumed_twice_and_with_the_last_batch_left_out(tmp_path: Path) -> None:
    """The second time it counts from where the first had begun. 100 samples are 12 batches of 8, and 4 are left."""
    expected = stream(3, drop_last=True)
    module = Module(lambda: plain(drop_last=True))
    checkpoint = None
    found: list[list[int]] = []
    for stop in (2, 5, 12, 20, 36):
        module.model.trained.clear()
        made = trainer(tmp_path, LongTailCallback(), every_step(tmp_path), max_steps=stop)
        made.fit(module, ckpt_path=checkpoint)
        found += module.model.trained
        checkpoint = tmp_path / f"step={stop}.ckpt"
        assert found == expected[:stop]


@pytest.mark.parametrize("stop", [17, 20])
def test_epochs_of_different_lengths(stop: int, tmp_path: Path) -> None:
    """131, 140 and 134 samples, of which Lightning takes as many batches as in the first: 17. Resumed at its end and
    within the second epoch."""
    options: dict[str, Any] = {"strategy": "repeat_factor", "threshold": 0.5, "seed": 3}
    sampler = LongTailSampler(LABELS, **options)
    expected = [list(torch.utils.data.BatchSampler(sampler, BATCH, False))[:17] for _ in range(3)]

    def loader() -> DataLoader[Any]:
        return DataLoader(Positions(), BATCH, sampler=LongTailSampler(LABELS, **options))

    first, second = Module(loader), Module(loader)
    ending = pl.callbacks.ModelCheckpoint(tmp_path, "end", every_n_epochs=1)
    trainer(tmp_path, LongTailCallback(), every_step(tmp_path), ending, max_steps=stop).fit(first)
    trainer(tmp_path, LongTailCallback()).fit(second, ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert first.model.trained + second.model.trained == list(itertools.chain(*expected))


def test_without_the_callback_lightning_begins_the_samples_anew(tmp_path: Path) -> None:
    """Why there is one: the second run trains again with what the first has had."""
    first, second = Module(plain), Module(plain)
    trainer(tmp_path, every_step(tmp_path), max_steps=3).fit(first)
    trainer(tmp_path, max_steps=6).fit(second, ckpt_path=tmp_path / "step=3.ckpt")
    assert second.model.trained == first.model.trained


def test_accumulated_gradients_and_limited_epochs(tmp_path: Path) -> None:
    """An epoch that ends early is left where it ended."""
    expected = list(itertools.chain(*(stream(3)[epoch * STEPS : epoch * STEPS + 6] for epoch in range(3))))
    options = {"accumulate_grad_batches": 2, "limit_train_batches": 6}
    first, second = Module(plain), Module(plain)
    trainer(tmp_path, LongTailCallback(), every_step(tmp_path), **options, max_steps=4).fit(first)
    trainer(tmp_path, LongTailCallback(), **options).fit(second, ckpt_path=tmp_path / "step=4.ckpt")
    assert first.model.trained == expected[:8]
    assert second.model.trained == expected[8:]


def test_wrong_parts_and_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="parts: expected objects with set_epoch, found object"):
        LongTailCallback(object())
    trainer(tmp_path, LongTailCallback(), every_step(tmp_path), max_steps=3).fit(Module(plain))
    checkpoint = tmp_path / "step=3.ckpt"
    with pytest.raises(ValueError, match="checkpoint: expected states of 2 samplers, as the loaders have, found 1"):
        trainer(tmp_path, LongTailCallback()).fit(Module(lambda: [plain(), plain()]), ckpt_path=checkpoint)
    other = DataLoader(Positions(), BATCH, sampler=LongTailSampler(LABELS, "instance", seed=3))
    with pytest.raises(ValueError, match="state_dict: expected the strategy of this sampler"):
        trainer(tmp_path, LongTailCallback()).fit(Module(other), ckpt_path=checkpoint)


def test_a_sampler_of_another_rank_is_refused(tmp_path: Path) -> None:
    sampler = DistributedLongTailSampler(LABELS, num_replicas=2, rank=1)
    with pytest.raises(ValueError, match="sampler: expected rank 0 of 1, as the Trainer's, found rank 1 of 2"):
        trainer(tmp_path, LongTailCallback()).fit(Module(DataLoader(Positions(), BATCH, sampler=sampler)))


def test_the_loss_is_in_the_checkpoint(tmp_path: Path) -> None:
    """Its epoch too: a model that is loaded without the Trainer has the weights of its stage."""
    trainer(tmp_path, LongTailCallback(), every_step(tmp_path), max_steps=STEPS + 1).fit(Module(plain))
    loaded = Module(plain)
    assert (loaded.schedule() == 1).all()
    loaded.load_state_dict(torch.load(tmp_path / f"step={STEPS + 1}.ckpt", weights_only=False)["state_dict"])
    assert torch.equal(loaded.schedule(), loaded.schedule.weight_at(1))


def test_under_the_other_name(tmp_path: Path) -> None:
    """``pytorch_lightning`` is a package of its own, with classes of its own."""
    other = pytest.importorskip("pytorch_lightning", reason="needs pytorch_lightning")

    class OtherModule(other.LightningModule):
        __init__, training_step = Module.__init__, Module.training_step
        train_dataloader, configure_optimizers = Module.train_dataloader, Module.configure_optimizers

    def fit(module: Any, checkpoint: Path | None = None, **options: Any) -> None:
        saving = other.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        other.Trainer(
            accelerator="cpu", callbacks=[LongTailCallback(), saving], logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, **options,
        ).fit(module, ckpt_path=checkpoint)  # fmt: skip

    OtherModule.__init__ = lambda self, loader: _set_up(other.LightningModule, self, loader)  # type: ignore[method-assign]
    first, second = OtherModule(plain), OtherModule(plain)
    fit(first, max_steps=17)
    fit(second, tmp_path / "step=17.ckpt", max_epochs=2)
    assert first.model.trained + second.model.trained == stream(2)
    assert first.epochs + second.epochs == [epoch for epoch in range(2) for _ in range(STEPS)]


def _set_up(base: type, module: Any, loader: Any) -> None:
    """``Module.__init__`` for a module of another base."""
    base.__init__(module)
    made = Module(loader)
    module.model, module.loader, module.schedule, module.criterion, module.epochs = (
        made.model, made.loader, made.schedule, made.criterion, made.epochs
    )  # fmt: skip


def test_two_processes(tmp_path: Path) -> None:
    """Lightning shuffles and shares out what the plain sampler draws, and leaves the distributed one alone."""
    torchrun(2, ROOT / "tests/integration_worker_lightning.py", tmp_path)
    ranks = reports(tmp_path)
    single = [[position for batch in stream(2)[e * STEPS : (e + 1) * STEPS] for position in batch] for e in range(2)]
    for epoch in range(2):
        for kind in ("wrapped", "distributed"):
            parts = [itertools.chain(*rank[kind][epoch * 13 : (epoch + 1) * 13]) for rank in ranks]
            both = [position for step in zip(*parts, strict=True) for position in step]
            assert sorted(both) == sorted(single[epoch])
            assert (both == single[epoch]) == (kind == "distributed")
    for rank in ranks:
        assert rank["sampler"] == "DistributedLongTailSampler"
        assert rank["resumed"] == rank["distributed"][rank["stop"] :]
        assert rank["resumed at the end"] == rank["wrapped"][13:]
        assert rank["alone"] == single[0][: 2 * BATCH]
        assert "expected a DistributedLongTailSampler in 2 processes" in rank["error of the same samples"]
        assert "give it num_samples, or take a DistributedLongTailSampler" in rank["error of different lengths"]
        assert "give the Trainer use_distributed_sampler=False" in rank["error of a batch sampler"]
        assert "begins its epoch anew" in rank["warning within an epoch"]
    assert ranks[0]["parameters"] == ranks[1]["parameters"]
    assert all(rank["resumed parameters"] == rank["parameters"] for rank in ranks)


def test_program(tmp_path: Path) -> None:
    """Stopped within the fourth epoch of 14 steps and resumed, it ends with the same figures, and gains by the loss."""
    import lightning_module

    arguments = ["--loss", "la", "--epochs", "20"]
    with warnings.catch_warnings():
        whole = lightning_module.main(arguments)
        assert lightning_module.main([*arguments, "--out", str(tmp_path), "--stop-after", "47"]) == {}
        assert lightning_module.main([*arguments, "--out", str(tmp_path), "--resume"]) == whole
        plain = lightning_module.main(["--loss", "ce", "--epochs", "20"])
    assert whole["few"] > plain["few"] + 0.05
    assert whole["balanced"] > plain["balanced"] > 0.8


@pytest.mark.slow
def test_the_program_shows_what_ldam_drw_is_for() -> None:
    """Over five divisions of the data, since a single one may say anything."""
    import lightning_module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, ldam = (lightning_module.main(["--loss", loss, "--seeds", "5"]) for loss in ("ce", "ldam-drw"))
    assert ldam["balanced"] > plain["balanced"] + 0.01
    assert ldam["few"] > plain["few"] + 0.03


@pytest.mark.parametrize("beside", [["--stop-after", "3"], ["--out", "x"], ["--devices", "2"]])
def test_several_seeds_are_whole_runs_in_one_process(beside: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import lightning_module

    with pytest.raises(SystemExit):
        lightning_module.main(["--seeds", "2", *beside])
    assert "--seeds: expected 1, or more without" in capsys.readouterr().err


def test_program_in_two_processes() -> None:
    """As users start it: by its path, and Lightning starts the second process."""
    assert "ldam-drw, instance sampling" in run(PROGRAMS / "lightning_module.py", "--devices", "2", "--epochs", "3")
