"""The real transformers.Trainer with this package's losses and samplers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_cases import (
    CLASSES,
    COUNTS,
    LABELS,
    PROGRAMS,
    ROOT,
    SAMPLES,
    Model,
    Positions,
    gradients,
    reports,
    torchrun,
)
from torch import nn

import ltkernels as ltk

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate, as transformers.Trainer does")

from ltkernels.integrations.huggingface import EpochCallback, LongTailTrainerMixin, hf_compute_metrics, hf_loss_func  # noqa: E402

BATCH = 8
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class LongTailTrainer(LongTailTrainerMixin, transformers.Trainer):
    """The Trainer, with ``train_sampler=``."""


def arguments(folder: Path, **options: Any) -> Any:
    """Plain gradient descent with learning rate 1: what a step takes from the parameters is the gradient."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.TrainingArguments(output_dir=str(folder), **(defaults | options))


def trainer(folder: Path, loss: Any, model: Model | None = None, **options: Any) -> Any:
    made = LongTailTrainer(
        model or Model(),
        arguments(folder, **options),
        train_dataset=Positions(),
        compute_loss_func=loss,
        train_sampler=ltk.samplers.LongTailSampler(LABELS, seed=3),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 4.0])
FREQUENCY = torch.tensor(COUNTS) / SAMPLES
MEAN_WEIGHT = float((WEIGHT * FREQUENCY).sum())
DRW = ltk.rebalance.DeferredReweighting(COUNTS, reweight_epoch=0)
LOSSES: dict[str, tuple[Any, Any, float]] = {  # loss, class_counts, what the sum is divided by beside the labels
    "torch": (nn.CrossEntropyLoss, None, 1.0),
    "torch with weight": (lambda: nn.CrossEntropyLoss(WEIGHT), COUNTS, MEAN_WEIGHT),
    "logit adjusted": (lambda: ltk.losses.LogitAdjustedLoss(COUNTS), None, 1.0),
    "weight": (lambda: ltk.losses.LogitAdjustedLoss(COUNTS, weight=WEIGHT), None, MEAN_WEIGHT),
    "class-balanced": (lambda: ltk.losses.ClassBalancedLoss(COUNTS), None, 1.0),  # divides by the count
    "reweighted": (
        lambda: ltk.losses.CrossEntropyLoss(ltk.rebalance.DeferredReweighting(COUNTS, 0)),
        None,
        float((DRW.weight_at(0) * FREQUENCY).sum()),
    ),
    "sigmoid": (lambda: ltk.losses.SigmoidFocalLoss(), None, float(CLASSES)),  # divides by the elements
    "sigmoid by rows": (lambda: ltk.losses.ClassBalancedSigmoidLoss(COUNTS), None, 1.0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_accumulated_gradient_is_that_of_the_whole_step(name: str, tmp_path: Path) -> None:
    """Four batches of 8 make the step of 32; a mean in each would make it four times as long."""
    make, counts, divisor = LOSSES[name]
    model = Model()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    trainer(tmp_path, hf_loss_func(make(), counts), model, gradient_accumulation_steps=4, max_steps=1).train()
    step = before - torch.cat([p.detach().flatten() for p in model.parameters()])

    drawn = [position for batch in model.trained for position in batch]
    assert drawn == ltk.samplers.LongTailSampler(LABELS, seed=3).indices(0, 4 * BATCH).tolist()
    whole, loss = Model(), make()
    loss.reduction = "sum"
    features, labels = Positions().batch(drawn)
    expected = gradients(loss(whole(features)["logits"], labels), whole) / (4 * BATCH * divisor)
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)


def test_the_last_step_of_an_epoch_has_fewer_batches(tmp_path: Path) -> None:
    """13 batches, the last of 4 samples: three steps of 32, and one of 4."""
    steps: list[torch.Tensor] = []

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            steps.append(torch.cat([p.grad.flatten().clone() for p in model.parameters()]))

    model, loss = Model(), ltk.losses.LogitAdjustedLoss(COUNTS)
    options = {"num_train_epochs": 1, "learning_rate": 0.0, "gradient_accumulation_steps": 4}
    run = trainer(tmp_path, hf_loss_func(loss), model, **options)
    run.add_callback(Gradients)
    run.train()
    sizes = []
    for at, step in enumerate(steps):
        positions = [position for batch in model.trained[4 * at : 4 * at + 4] for position in batch]
        features, labels = Positions().batch(positions)
        expected = gradients(loss(model(features)["logits"], labels), model)
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)
        sizes.append(len(positions))
    assert sizes == [32, 32, 32, 4]


def test_weighted_mean_of_the_training_data() -> None:
    """A step divides by the mean weight of the training data: where the step is all of the data, that is its own."""
    loss = ltk.losses.LogitAdjustedLoss(COUNTS, weight=WEIGHT)
    logits, labels = torch.randn(SAMPLES, CLASSES), torch.from_numpy(LABELS)
    whole = loss(logits, labels)
    function = hf_loss_func(loss)
    parts = [
        function({"logits": logits[rows]}, labels[rows], torch.tensor(SAMPLES))
        for rows in torch.arange(SAMPLES).split(30)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-5, atol=0)


def test_ignored_labels_are_not_counted() -> None:
    logits, labels = torch.randn(12, CLASSES), torch.randint(CLASSES, (12,))
    labels[:5] = -100
    loss = ltk.losses.BalancedSoftmaxLoss(COUNTS)
    torch.testing.assert_close(
        hf_loss_func(loss)({"logits": logits}, labels, (labels != -100).sum()), loss(logits, labels)
    )


@pytest.mark.parametrize("outputs", [lambda x: {"logits": x}, lambda x: (x, "hidden states")])
def test_what_models_return(outputs: Any) -> None:
    logits, labels = torch.randn(6, CLASSES), torch.randint(CLASSES, (6,))
    loss = ltk.losses.CrossEntropyLoss()
    assert hf_loss_func(loss)(outputs(logits), labels) == loss(logits, labels)
    output = transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)
    torch.testing.assert_close(hf_loss_func(loss)(output, labels, 6), loss(logits, labels))


def test_labels_of_tokens_and_probabilities() -> None:
    """Classes are last there; the Trainer counts all entries of targets that are dense."""
    logits, labels = torch.randn(3, 5, CLASSES), torch.randint(CLASSES, (3, 5))
    loss = ltk.losses.LogitAdjustedLoss(COUNTS, weight=WEIGHT)
    plain = ltk.losses.LogitAdjustedLoss(COUNTS)
    flat = plain(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(hf_loss_func(plain)({"logits": logits}, labels, labels.ne(-100).sum()), flat)
    dense = torch.rand(3, 5, CLASSES).softmax(-1)
    expected = loss(logits.flatten(0, 1), dense.flatten(0, 1))
    torch.testing.assert_close(hf_loss_func(loss)({"logits": logits}, dense, dense.ne(-100).sum()), expected)


def test_labels_of_a_causal_language_model() -> None:
    """The loss that the model computes by itself, with the number of labels that the Trainer counts for it."""
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(30, (3, 7))
    labels = tokens.clone()
    labels[:, :2] = -100
    items = labels[..., 1:].ne(-100).sum()
    output = model(input_ids=tokens, labels=labels, num_items_in_batch=items)
    found = hf_loss_func(ltk.losses.CrossEntropyLoss(), shift_labels=True)(output, labels, items)
    torch.testing.assert_close(found, output.loss, rtol=1e-5, atol=1e-6)


def test_several_experts() -> None:
    """A model that returns (E, N, C): its logits stay as they are."""
    logits, labels = torch.randn(3, 10, CLASSES), torch.randint(CLASSES, (10,))
    loss = ltk.losses.SADELoss(COUNTS)
    whole = loss(logits, labels)
    parts = [hf_loss_func(loss)({"logits": logits[:, rows]}, labels[rows], 10) for rows in (slice(0, 4), slice(4, 10))]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-6)


def test_under_data_parallel_the_number_comes_once_for_each_gpu() -> None:
    """There the Trainer multiplies by the number of GPUs when it has averaged tokens; the mean of that is the loss."""
    logits, labels = torch.randn(6, CLASSES), torch.randint(CLASSES, (6,))
    loss = ltk.losses.CrossEntropyLoss()
    found = hf_loss_func(loss)({"logits": logits}, labels, torch.tensor(6).unsqueeze(0).expand(2, -1))
    torch.testing.assert_close(found * 2, loss(logits, labels))


def test_the_loss_is_left_as_it_was() -> None:
    loss = ltk.losses.CrossEntropyLoss()
    function = hf_loss_func(loss)
    function({"logits": torch.zeros(2, 3)}, torch.tensor([0, 1]), 2)
    assert loss.reduction == "mean"
    with pytest.raises(IndexError, match="target: expected labels"):
        function({"logits": torch.zeros(2, 3)}, torch.tensor([0, 7]), 2)
    assert loss.reduction == "mean"


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: hf_loss_func(nn.BCEWithLogitsLoss()), TypeError, "loss: expected a loss of ltkernels .*BCEWithLog"),
        (lambda: hf_loss_func(ltk.losses.LADELoss(COUNTS)), TypeError, "loss: expected .*summed.*found LADELoss"),
        (lambda: hf_loss_func(nn.CrossEntropyLoss(reduction="sum")), ValueError, "expected reduction='mean'.*'sum'"),
        (lambda: hf_loss_func(ltk.losses.CrossEntropyLoss(ignore_index=255)), ValueError, "ignore_index=-100.*255"),
        (lambda: hf_loss_func(ltk.losses.CrossEntropyLoss(denominator=8.0)), ValueError, "found 8.0"),
        (lambda: hf_loss_func(ltk.losses.CrossEntropyLoss(WEIGHT)), ValueError, "class_counts: expected .*found None"),
        (lambda: hf_loss_func(nn.CrossEntropyLoss(WEIGHT), [1, 2]), ValueError, r"class_counts: expected shape \(4,\)"),
        (lambda: hf_loss_func(ltk.losses.RIDELoss(COUNTS, reweight_epoch=1)), ValueError, "two divisors"),
        (lambda: EpochCallback(object()), TypeError, "parts: expected objects with set_epoch, found object"),
    ],
)
def test_wrong_losses(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_weights_that_come_later_are_refused() -> None:
    loss = ltk.losses.CrossEntropyLoss()
    function = hf_loss_func(loss)
    loss.weight = WEIGHT
    with pytest.raises(ValueError, match="loss: expected no class weights, as when it was given"):
        function({"logits": torch.zeros(2, CLASSES)}, torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="labels: expected a tensor, found None"):
        function({"logits": torch.zeros(2, CLASSES)}, None, 2)


def test_wrong_samplers(tmp_path: Path) -> None:
    rank = ltk.samplers.DistributedLongTailSampler(LABELS, num_replicas=2, rank=0)
    for sampler in (rank, torch.utils.data.RandomSampler(LABELS)):
        with pytest.raises(TypeError, match=f"train_sampler: expected a LongTailSampler.*{type(sampler).__name__}"):
            LongTailTrainer(Model(), arguments(tmp_path), train_dataset=Positions(), train_sampler=sampler)
    other = LongTailTrainer(
        Model(),
        arguments(tmp_path, max_steps=1),
        train_dataset=Positions(),
        compute_loss_func=hf_loss_func(nn.CrossEntropyLoss()),
        train_sampler=ltk.samplers.LongTailSampler([0, 1]),
    )
    with pytest.raises(ValueError, match="expected a sampler of the 100 training samples, found one of 2"):
        other.train()
    stream = LongTailTrainer(
        Model(),
        arguments(tmp_path, max_steps=1),
        train_dataset=torch.utils.data.ChainDataset([]),
        train_sampler=ltk.samplers.LongTailSampler(LABELS),
    )
    with pytest.raises(ValueError, match="train_sampler: expected None beside an IterableDataset"):
        stream.train()


def test_without_a_sampler_it_is_the_trainers_own(tmp_path: Path) -> None:
    model = Model()
    LongTailTrainer(
        model,
        arguments(tmp_path, num_train_epochs=1),
        train_dataset=Positions(),
        compute_loss_func=hf_loss_func(nn.CrossEntropyLoss()),
    ).train()
    drawn = [position for batch in model.trained for position in batch]
    assert sorted(drawn) == list(range(SAMPLES)) != drawn


def epochs(count: int) -> list[list[int]]:
    sampler = ltk.samplers.LongTailSampler(LABELS, seed=3)
    return [list(sampler) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_sampler_and_loss(workers: int, tmp_path: Path) -> None:
    """Each epoch draws other samples; the second stage of the loss begins with its epoch."""
    schedule = ltk.rebalance.DeferredReweighting(COUNTS, reweight_epoch=2)
    seen: list[tuple[int, bool]] = []

    class Loss(ltk.losses.CrossEntropyLoss):
        def forward(self, *given: Any) -> torch.Tensor:
            if torch.is_grad_enabled():
                seen.append((int(schedule.epoch), bool((schedule() == 1).all())))
            return super().forward(*given)

    model = Model()
    trainer(tmp_path, hf_loss_func(Loss(schedule)), model, num_train_epochs=3, dataloader_num_workers=workers).train()
    steps = -(-SAMPLES // BATCH)
    assert seen == [(epoch, epoch < 2) for epoch in range(3) for _ in range(steps)]
    drawn = [position for batch in model.trained for position in batch]
    assert drawn == [position for epoch in epochs(3) for position in epoch]


def test_an_epoch_that_a_callback_ends_early(tmp_path: Path) -> None:
    """The state's epoch is then 0.23 when epoch 1 begins."""

    class AfterThree(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            control.should_epoch_stop = state.global_step % 3 == 0

    schedule = ltk.rebalance.DeferredReweighting(COUNTS, reweight_epoch=2)
    seen: list[int] = []

    class Loss(ltk.losses.CrossEntropyLoss):
        def forward(self, *given: Any) -> torch.Tensor:
            seen.append(int(schedule.epoch))
            return super().forward(*given)

    model = Model()
    run = trainer(tmp_path, hf_loss_func(Loss(schedule)), model, num_train_epochs=3)
    run.add_callback(AfterThree)
    for _ in range(2):  # a second training begins with epoch 0
        seen.clear()
        model.trained.clear()
        run.train()
        assert seen == [0] * 3 + [1] * 3 + [2] * 3
        drawn = [position for batch in model.trained for position in batch]
        assert drawn == [position for epoch in epochs(3) for position in epoch[: 3 * BATCH]]


# With workers the loader draws ahead of what is trained; starting them takes seconds.
@pytest.mark.parametrize(("workers", "stop"), [(0, 3), (0, 13), (0, 17), (0, 26), (2, 17)])
def test_resumed_run_is_the_same_run(workers: int, stop: int, tmp_path: Path) -> None:
    """In the first epoch of 13 steps, at its end, in the second and at the end of that."""

    class StopAt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            control.should_training_stop = control.should_save = state.global_step == stop

    options = {"num_train_epochs": 3, "learning_rate": 0.1, "dataloader_num_workers": workers}
    whole, first, second = Model(), Model(), Model()

    def loss() -> Any:
        return hf_loss_func(
            ltk.losses.CrossEntropyLoss(ltk.rebalance.DeferredReweighting(COUNTS, reweight_epoch=1, beta=0.9))
        )

    trainer(tmp_path / "whole", loss(), whole, **options).train()
    stopped = trainer(tmp_path / "run", loss(), first, **options, save_steps=10**6)
    stopped.add_callback(StopAt)
    stopped.train()
    trainer(tmp_path / "run", loss(), second, **options).train(
        resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{stop}")
    )
    assert first.trained == whole.trained[:stop]
    assert second.trained == whole.trained[stop:]
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name)), name


@pytest.mark.parametrize("by_batch", [False, True])
def test_metrics_of_the_trainer(by_batch: bool, tmp_path: Path) -> None:
    """Those of ShotAccuracy over all test samples, whether the logits are kept or counted by batch; twice the same."""
    model = Model()
    made = transformers.Trainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=7, batch_eval_metrics=by_batch),
        eval_dataset=Positions(),
        compute_loss_func=hf_loss_func(nn.CrossEntropyLoss()),
        compute_metrics=hf_compute_metrics(COUNTS, many_shot_thr=30, low_shot_thr=8),
    )
    made.remove_callback(transformers.PrinterCallback)
    metric = ltk.metrics.ShotAccuracy(COUNTS, many_shot_thr=30, low_shot_thr=8)
    logits, labels = model.eval()(Positions().features)["logits"], torch.from_numpy(LABELS)
    metric.update(logits, labels)
    for _ in range(2):
        found = made.evaluate()
        for name, value in metric.compute().items():
            assert found[f"eval_{name}"] == pytest.approx(float(value)), name
        assert found["eval_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_metrics_of_tokens_and_of_wrong_arguments() -> None:
    logits, labels = torch.randn(3, 5, CLASSES).numpy(), torch.randint(CLASSES, (3, 5)).numpy()
    labels[:, 0] = -100
    found = hf_compute_metrics(COUNTS, top_k=2)(transformers.EvalPrediction((logits, logits), labels))
    best, kept = torch.from_numpy(logits).topk(2).indices, labels != -100
    hit = (best == torch.from_numpy(labels)[..., None]).any(-1).numpy()
    assert found["overall"] == pytest.approx(hit[kept].mean())
    with pytest.raises(ValueError, match="low_shot_thr"):
        hf_compute_metrics(COUNTS, many_shot_thr=1)


def test_two_processes(tmp_path: Path) -> None:
    """Together they draw the single stream, take the step of the whole, and resume within the second epoch."""
    torchrun(2, ROOT / "tests/integration_worker_huggingface.py", tmp_path)
    first, second = reports(tmp_path)
    expected = epochs(2)[0]
    steps = [position for pair in zip(first["drawn"], second["drawn"], strict=True) for b in pair for position in b]
    assert steps[: 4 * BATCH] == expected[: 4 * BATCH]
    assert first["step"] == second["step"]

    whole = Model()
    features, labels = Positions().batch(expected[: 4 * BATCH])  # 2 processes of 2 batches
    loss = ltk.losses.LogitAdjustedLoss(COUNTS)
    torch.testing.assert_close(
        torch.tensor(first["step"]), gradients(loss(whole(features)["logits"], labels), whole), rtol=1e-4, atol=1e-6
    )
    rows = ltk.losses.LogitAdjustedLoss(COUNTS, weight=WEIGHT, reduction="sum")
    expected_step = gradients(rows(whole(features)["logits"], labels), whole) / (4 * BATCH * MEAN_WEIGHT)
    for name in ("weighted step", "step by own labels"):
        torch.testing.assert_close(torch.tensor(first[name]), expected_step, rtol=1e-4, atol=1e-6)
    for rank in (first, second):
        assert rank["resumed"] == rank["whole"][rank["stop"] :]
    both = sorted(position for rank in (first, second) for batch in rank["whole"] for position in batch)
    assert len(both) >= 2 * SAMPLES


def test_program() -> None:
    """Logit adjustment gains where classes are rare, under the same Trainer, model and samples."""
    import huggingface_trainer

    figures = huggingface_trainer.main(["--loss", "ce", "la"])
    assert figures["la"]["balanced"] > figures["ce"]["balanced"] > 0.5
    assert figures["la"]["few"] > figures["ce"]["few"] + 0.1


def test_program_in_two_processes() -> None:
    """As users start it: by its path. One of the processes prints."""
    printed = torchrun(2, PROGRAMS / "huggingface_trainer.py", "--loss", "la", "--epochs", "3")
    assert printed.count("la, instance sampling") == 1
