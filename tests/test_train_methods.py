"""The demo's methods, those of several experts among them."""

from __future__ import annotations

import io
from typing import Any

import longtail_data
import longtail_methods
import longtail_plan
import longtail_report
import longtail_run
import numpy as np
import pytest
import torch
from longtail_cases import load, settings
from longtail_model import Batches, Classifier
from rich.console import Console

import ltkernels as ltk


@pytest.mark.parametrize("name", longtail_methods.METHODS)
@pytest.mark.parametrize("epoch", [0, 9])
def test_losses_are_the_plain_ones(name: str, epoch: int) -> None:
    counts = torch.tensor([12438, 900, 101, 20, 4, 1])
    method = longtail_methods.METHODS[name]
    loss = method.build(counts, settings(name, epochs=10))
    loss.set_epoch(epoch)
    loss = method.exact(loss)
    experts = method.num_experts(loss)
    logits = torch.randn(experts, 64, 6) if experts else torch.randn(64, 6)
    logits = torch.tanh(logits) if method.cosine else 5 * logits
    labels = torch.randint(6, (128 if method.paired else 64,))
    longtail_methods.check_agreement(logits, labels, loss, method.plain(counts, loss))


def test_agreement_is_really_checked() -> None:
    counts = torch.tensor([100, 10, 1])
    ce, la = (longtail_methods.METHODS[name].build(counts, settings(name)) for name in ("ce", "la"))
    with pytest.raises(AssertionError):
        longtail_methods.check_agreement(torch.randn(8, 3), torch.arange(8) % 3, ce, la)


def test_equalization_draws_of_the_few_shot_classes_alone() -> None:
    counts = torch.tensor([12438, 900, 101, 20, 19, 1])
    method = longtail_methods.METHODS["equalization"]
    loss = method.build(counts, settings("equalization"))
    assert loss.rare.tolist() == [False] * 4 + [True] * 2
    assert loss.gamma == 0.9 and method.exact(loss).gamma == 1.0 and loss.gamma == 0.9
    logits, labels = torch.randn(512, 6), torch.arange(512) % 6
    for loss_fn in (loss, method.plain(counts, loss)):  # a tenth of what they would get stays: 427 rows, 4 deviations
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_fn(leaf, labels), leaf)
        share = [float((gradient[labels != c, c] != 0).double().mean()) for c in range(6)]
        assert share[:4] == [1.0] * 4 and all(0.04 < part < 0.16 for part in share[4:])


def test_ldam_weights_start_late() -> None:
    loss = longtail_methods.METHODS["ldam-drw"].build(torch.tensor([1000, 10]), settings("ldam-drw", epochs=10))
    loss.set_epoch(7)
    assert loss.weight().tolist() == [1.0, 1.0]
    loss.set_epoch(8)
    assert loss.weight()[1] > 10 * loss.weight()[0]


def test_every_method_has_a_title_and_every_data_set_a_recipe() -> None:
    assert {longtail_plan.trained_method(name) for name in longtail_plan.TITLES} == set(longtail_methods.METHODS)
    assert set(longtail_plan.RECIPES) == set(longtail_data.LOADERS)


@pytest.mark.parametrize("name", ["airports", "tokens", "digits"])
@pytest.mark.parametrize("cosine", [False, True])
def test_models_give_a_logit_a_class(name: str, cosine: bool) -> None:
    data = load(name)
    logits = Classifier(data, cosine=cosine)(*Batches(data).batch(torch.tensor([3, 1, 2])))
    assert logits.shape == (3, data.num_classes) and logits.isfinite().all()
    assert not cosine or logits.abs().max() <= 1 + 1e-6


def test_sigmoids_start_at_one_of_all_classes() -> None:
    data = load("digits")
    of_sigmoids = {name for name in longtail_methods.METHODS if longtail_methods.METHODS[name].sigmoid}
    assert of_sigmoids == {"sigmoid-focal", "cb-sigmoid"}
    for name in ("ce", *of_sigmoids):
        bias = longtail_run.Run(settings(name), data, Batches(data)).model.head.bias
        assert torch.allclose(bias.sigmoid(), torch.tensor(0.1)) == (name in of_sigmoids)


# ------------------------------------------------------------------------------------------------------------- experts


def started(method: str, steps: int, **changes: Any) -> Any:
    data = load("digits")
    run = longtail_run.Run(settings(method, **changes), data, Batches(data))
    for _ in range(steps):
        run.train_step()
    return run


@pytest.mark.parametrize("method", ["ride", "sade", "ace", "lfme"])
def test_experts_are_evaluated_together_and_alone(method: str) -> None:
    run = started(method, 20)
    figures = run.result()["outcomes"][method]
    logits, labels = run.logits(run.test), run.labels[run.test]
    cover = ltk.experts.shot_groups(run.class_counts, nested=method == "ace")
    if method == "lfme":
        together, alone = logits[0], logits[1:].masked_fill(~cover[:, None], -torch.inf)
    elif method == "ace":
        together, alone = (logits * cover[:, None]).sum(0) / cover.sum(0), logits
    else:
        together, alone = logits.mean(0), logits
    assert len(figures["experts"]) == len(alone) == (3 if method in ("ride", "sade") else len(cover))
    for found, expected in zip([figures, *figures["experts"]], [together, *alone], strict=True):
        right = expected.argmax(1) == labels
        recall = [float(right[labels == c].double().mean()) for c in range(10)]
        np.testing.assert_allclose(found["recall"], recall)
        assert found["balanced"] == pytest.approx(np.mean(recall))


def test_experts_have_a_table() -> None:
    results = [started(method, 14, seed=seed).result() for method in ("ce", "sade") for seed in (0, 1)]
    summary = longtail_report.collect(load("digits"), results, ["ce", "sade"])
    assert summary["methods"]["ce"]["experts"] == [] and len(summary["methods"]["sade"]["experts"]) == 3
    few = [run["outcomes"]["sade"]["experts"][2]["few"] for run in results[2:]]
    found = summary["methods"]["sade"]["experts"][2]["few"]
    assert found == {"mean": pytest.approx(np.mean(few)), "sd": pytest.approx(np.std(few, ddof=1))}
    console = Console(file=io.StringIO(), width=120)
    longtail_report.print_tables(console, summary)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    [line] = [line for line in text.splitlines() if line.strip().startswith("SADE, expert 3")]
    assert "Each expert alone" in text and f"{100 * found['mean']:.1f}±{100 * found['sd']:.1f}" in line


def test_the_second_draw_of_bbn_is_reversed() -> None:
    run = started("bbn", 15)
    counts, size = run.class_counts.double(), len(run.train)
    shares = [run.labels[sampler.indices(0, size)].bincount(minlength=10) / size for sampler in run.samplers]
    torch.testing.assert_close(shares[0].double(), counts / size)
    reversed_share = counts.reciprocal() / counts.reciprocal().sum()
    assert (shares[1] - reversed_share).abs().max() < 4 * 0.5 / size**0.5
    assert run.loss.mixing.lam == 0.75  # the second of two epochs

    one, other = (run.batches.batch(run.train[rows])[0] for rows in (slice(8), slice(8, 16)))
    model = run.model
    features = [branch(model.features(half)) for branch, half in zip(model.branches, (one, other), strict=True)]
    mixed = torch.cat([1.5 * features[0], 0.5 * features[1]], 1)
    torch.testing.assert_close(model(torch.cat([one, other])), model.head(mixed))
    assert run.logits(run.test).shape == (len(run.test), 10)


def test_the_first_expert_of_ace_alone_moves_the_features() -> None:
    run = started("ace", 0)
    [weight, _] = run.model.features.parameters()
    logits = run.model(*run.batches.batch(run.train[:8]))
    for expert, moves in zip(logits, (True, False, False), strict=False):
        (gradient,) = torch.autograd.grad(expert.sum(), weight, retain_graph=True, allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) == moves


def test_lfme_trains_the_experts_then_the_student() -> None:
    def parameters(part: torch.nn.Module) -> torch.Tensor:
        return torch.nn.utils.parameters_to_vector(part.parameters()).detach().clone()

    run = started("lfme", 0)
    before = parameters(run.model.student), parameters(run.model.experts)
    for _ in range(28):
        run.train_step()
    between = parameters(run.model.student), parameters(run.model.experts)
    assert torch.equal(between[0], before[0]) and not torch.equal(between[1], before[1])
    assert run.schedule.get_last_lr() == [0.0]

    logits, labels, cover = run.logits(run.train), run.labels[run.train], ltk.experts.shot_groups(run.class_counts)
    expected = []
    for group, expert in zip(cover, logits[1:], strict=True):
        rows = group[labels]
        student = (logits[0, rows].argmax(1) == labels[rows]).double().mean()
        known = (expert[rows].masked_fill(~group, -torch.inf).argmax(1) == labels[rows]).double().mean()
        expected.append(float(((known - student) / known / 0.7).clamp(0, 1)))
    run.train_step()
    assert run.loss.student.weight.tolist() == pytest.approx(expected, abs=1e-6) and max(expected) > min(expected)
    assert run.schedule.get_last_lr()[0] == pytest.approx(0.003 * 27 / 28)
    for _ in range(14):
        run.train_step()
    after = parameters(run.model.student), parameters(run.model.experts)
    assert not torch.equal(after[0], between[0]) and torch.equal(after[1], between[1])
    assert run.loss.student.weight.tolist() != pytest.approx(expected, abs=1e-6)  # seen again before each epoch
