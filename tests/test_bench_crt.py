"""The benchmark of stage two: every form of a step is checked, draws what it says, and leaves whole records."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ltkernels.bench import figures, main, peers, peers_crt, report, runner
from ltkernels.bench.device import Cpu
from ltkernels.bench.peers_crt import CRT_VARIANTS, Variant, measure
from ltkernels.bench.scenarios import Scenario, scenario
from ltkernels.samplers import DeviceBatches

TINY = Scenario(6, 5, "custom", 7)  # odd sizes, fewer classes than features and than rows
QUICK = runner.Plan(seconds=0, compile=False, min_rounds=3, max_rounds=3)
FORMS = {
    "crt": [
        *(peers.OURS, peers_crt.OUR_AUTOGRAD, peers_crt.OUR_LINEAR, peers.EAGER, peers_crt.AUTOGRAD),
        *(peers_crt.LOADER, peers_crt.TORCH_LINEAR, peers_crt.GATHER, peers_crt.PRODUCTS),
    ],
    "lws": [peers.OURS, peers.EAGER, peers_crt.LOADER, peers_crt.GATHER],
}
each_variant = pytest.mark.parametrize("variant", CRT_VARIANTS, ids=lambda variant: variant.name)


@each_variant
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_form_computes_the_same(variant: Variant, dtype: str) -> None:
    result = measure(variant, TINY, Cpu(), dataclasses.replace(QUICK, dtype=dtype))
    refused = {} if peers_crt.HAS_TORCH_LINEAR or variant.name == "lws" else {peers_crt.TORCH_LINEAR}
    assert set(result.refused) == set(refused)
    assert [record["peer"] for record in result.records] == [
        name for name in FORMS[variant.name] if name not in refused
    ]
    for record in (one | runner.environment(Cpu()) for one in result.records):
        assert report.FIELDS <= record.keys()
        assert record["scenario"] == "6x7x5" and record["samples"] == 500 and record["mode"] == "step"
        assert record["less_work"] == (record["rel_err_grad"] is None) == (record["peer"] in peers_crt.LESS_WORK)
        assert record["samples_per_second"] == pytest.approx(6e6 / record["p50_us"], abs=1)
        assert record["rel_err_grad"] is None or record["rel_err_grad"] < (1e-6 if dtype == "float32" else 1e-14)


def test_compiled_forms_compute_the_same() -> None:
    result = measure(CRT_VARIANTS[1], TINY, Cpu(), dataclasses.replace(QUICK, compile=True))
    assert not result.refused and peers.COMPILE in {record["peer"] for record in result.records}


def test_logits_that_do_not_fit_are_computed_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = peers_crt.make_data(TINY, torch.float32, "cpu", 0)
    kept = peers_crt.lws_forms(TINY, data, False)[peers.OURS]
    monkeypatch.setattr(peers_crt, "MOST_LOGITS", 2499)  # 500 samples of 5 classes
    computed = peers_crt.lws_forms(TINY, data, False)[peers.OURS]
    assert kept.source.shape == (500, 5) and computed.source is data.features
    indices = torch.tensor([3, 1, 4, 1, 5, 9])
    for one, other in zip(
        kept.loss_and_grad(indices, data.labels[indices]),
        computed.loss_and_grad(indices, data.labels[indices]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert not measure(CRT_VARIANTS[1], TINY, Cpu(), QUICK).refused


@pytest.mark.parametrize("draw", [peers_crt.our_draw, peers_crt.vectorised_draw, peers_crt.loader_draw])
def test_draws_give_rows_with_their_labels_every_class_alike(draw: peers_crt.MakeDraw) -> None:
    shape = Scenario(100, 5, "custom", 1)
    data = peers_crt.make_data(shape, torch.float32, "cpu", 0)
    numbers = torch.arange(len(data.labels))
    next_batch = draw(data, numbers)
    batches = [next_batch() for _ in range(40)]  # eight epochs of the loader
    rows, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert all(len(y) == 100 for _, y in batches) and torch.equal(data.labels[rows], labels)
    deviation = (labels.bincount(minlength=5) / 800 - 1).abs().max()
    assert 0 < deviation < 5 * (0.8 / 800) ** 0.5  # drawn, not dealt: a class's share has this standard deviation
    assert len(rows.unique()) > 100


@each_variant
def test_steps_update_as_sgd_does(variant: Variant) -> None:
    """Two steps of each form, on the same batch, against float64: momentum and weight decay, and fused or not."""
    data = peers_crt.make_data(TINY, torch.float32, "cpu", 0)
    indices = torch.arange(6) * 80
    results = {}
    for name, form in variant.forms(TINY, data, False).items():
        fixed = form.source[indices], data.labels[indices]
        step = dataclasses.replace(form, draw=lambda data, rows, fixed=fixed: lambda: fixed).step(data)
        step(), step()
        results[name] = torch.cat([parameter.detach().flatten() for parameter in form.parameters])
    head = peers_crt.make_head(TINY, torch.zeros((), dtype=torch.float64))
    scale = torch.ones(5, dtype=torch.float64, requires_grad=True)
    learnt = list(head.parameters()) if variant.name == "crt" else [scale]
    optimizer = torch.optim.SGD(learnt, 0.2, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(head(data.features[indices].double()) * scale, data.labels[indices]).backward()
        optimizer.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in learnt]).float()
    for name, found in results.items():
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_our_step_draws_and_computes_with_our_ops() -> None:
    data = peers_crt.make_data(TINY, torch.float32, "cpu", 0)
    assert isinstance(peers_crt.our_draw(data, data.features), DeviceBatches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        peers_crt.crt_forms(TINY, data, False)[peers.OURS].step(data)()
    names = {event.key for event in profile.key_averages()}
    assert any("ltkernels" in name and "cross_entropy" in name for name in names)
    assert any("ltkernels" in name and "sample_indices" in name for name in names)
    assert not any("nll_loss" in name for name in names)


def test_a_form_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, y, **_: original(x, y, label_smoothing=0.1))
    monkeypatch.setattr(peers_crt, "true_loss_and_grad", _truth)
    refused = measure(CRT_VARIANTS[0], TINY, Cpu(), QUICK).refused
    assert set(refused) == {peers.EAGER, peers_crt.AUTOGRAD, peers_crt.LOADER}  # all that call it
    assert all(reason.startswith("computes another loss: differs from ltkernels by ") for reason in refused.values())


def _truth(variant: Variant, shape: Scenario, rows: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    head = peers_crt.make_head(shape, rows.double())
    loss = F.nll_loss(head(rows.double()).log_softmax(1), labels)
    gradients = torch.autograd.grad(loss, tuple(head.parameters()))
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@each_variant
def test_a_wrong_result_of_ours_is_an_error(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = {"crt": 40, "lws": 5}[variant.name]
    monkeypatch.setattr(peers_crt, "true_loss_and_grad", lambda *_: (torch.ones(()), torch.ones(learnt)))
    with pytest.raises(runner.WrongResultError):
        measure(variant, TINY, Cpu(), QUICK)


def test_half_types_are_refused() -> None:
    with pytest.raises(ValueError, match="--dtype: expected float32 or float64 for this op, found bfloat16"):
        measure(CRT_VARIANTS[0], TINY, Cpu(), dataclasses.replace(QUICK, dtype="bfloat16"))


def test_names_of_shapes_with_features() -> None:
    assert scenario("6x7x5") == Scenario(6, 5, "custom", 7) and scenario("6x7x5").name == "6x7x5"
    assert scenario("6x5") == Scenario(6, 5, "custom") and scenario("6x5").d == 0
    for wrong in ("6x0x5", "6x7x5x4", "6xx5"):
        with pytest.raises(ValueError, match="expected <rows>x<classes>"):
            scenario(wrong)


@pytest.mark.parametrize(("op", "shape", "like"), [("crt", "6x5", "128x64x100"), ("cross_entropy", "6x7x5", "128x100")])
def test_shapes_belong_to_an_op(op: str, shape: str, like: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--op", op, "--scenario", shape])
    assert ended.value.code == 2
    assert f"argument --scenario: expected a shape like {like}, found {shape}" in capsys.readouterr().err


def test_tables_tell_samples_a_second(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "crt.jsonl"
    assert main(["--op", "crt", "--scenario", "6x7x5", "--seconds", "0", "--no-compile", "--out", str(out)]) == 0
    records = report.read_records(out)
    [ours] = [record for record in records if (record["peer"], record["variant"]) == (peers.OURS, "crt")]
    printed, rate = capsys.readouterr().out, f"{ours['samples_per_second']:,}"
    assert "samples/s" in printed and rate in printed
    text = figures.table(records, "the command", "crt")
    assert f"| cRT, a step, samples a second | {rate} |" in text
    assert "| LWS, a step / DataLoader, the usual form | " in text
