"""The benchmark of sampling: forms that draw something else are refused, and records are of the common kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from ltkernels.bench import main, report, runner, sampling, targets
from ltkernels.bench.device import Cpu
from ltkernels.bench.peers import OURS
from ltkernels.bench.scenarios import Scenario

QUICK = runner.Plan(seconds=0, min_rounds=3, max_rounds=3)
SMALL = Scenario(5_000, 40, "custom")  # enough draws for a chi-square of 80 cells
VARIANTS = {variant.name: variant for variant in sampling.VARIANTS}


def test_data_has_every_class_and_as_many_samples_as_asked_for() -> None:
    data = sampling.make_data(SMALL)
    assert int(data.counts.sum()) == len(data.labels) == 5_000
    assert torch.equal(data.labels.bincount(minlength=40), data.counts)
    assert int(data.counts.min()) >= 1 and 50 < int(data.counts.max()) / int(data.counts.min()) < 110
    assert torch.equal(data.labels[data.order], data.labels.sort().values)
    with pytest.raises(ValueError, match="a sample for each class, found 3x4"):
        sampling.make_data(Scenario(3, 4, "custom"))


def test_deviation_sees_classes_and_members_that_come_too_often() -> None:
    data = sampling.make_data(SMALL)
    alike = torch.ones(40, dtype=torch.float64)
    first = data.counts.cumsum(0) - data.counts
    classes = torch.arange(40).repeat(1_000)
    upper = data.counts // 2 + torch.rand(40, 1_000).mul((data.counts - data.counts // 2).unsqueeze(1)).long().T

    def of(classes: torch.Tensor, member: torch.Tensor) -> float:
        return sampling.deviation(data.order[first[classes] + member], data, alike)

    generator = torch.Generator().manual_seed(0)
    random = torch.randint(40, (40_000,), generator=generator)
    fair = (torch.rand(40_000, generator=generator, dtype=torch.float64) * data.counts[random]).long()
    assert abs(of(random, fair)) < 4
    assert of(random % 39, fair % data.counts[random % 39]) > sampling.MOST_DEVIATION, "a class that never comes"
    assert of(classes, upper.flatten()) > sampling.MOST_DEVIATION, "only the upper halves of classes"
    assert sampling.deviation(torch.arange(5_000), data, alike) > sampling.MOST_DEVIATION, "every sample once"
    never = alike.clone()
    never[7] = 0
    assert sampling.deviation(data.order[first[random] + fair], data, never) == float("inf")


@pytest.mark.parametrize("name", VARIANTS)
def test_all_forms_give_what_was_asked_for(name: str) -> None:
    result = sampling.measure(VARIANTS[name], SMALL, Cpu(), QUICK)
    assert set(result.refused) <= {sampling.M_PER_CLASS}
    assert result.records[0]["peer"] == OURS
    where = runner.environment(Cpu())
    for record in result.records:
        assert (record | where).keys() == report.FIELDS
        assert record["op"] == "sampling" and record["variant"] == name and record["scenario"] == "5000x40"
        assert 0 < record["p25_us"] <= record["p50_us"] <= record["p75_us"]
        assert record["less_work"] == (record["peer"] in sampling.LESS_WORK)


def test_a_form_with_another_distribution_is_refused_and_not_timed() -> None:
    def skewed(data: sampling.Data) -> sampling.Forms:
        forms = VARIANTS["balanced"].forms(data)
        other = sampling._vectorised(data, data.counts.double())
        probs = torch.ones(40, dtype=torch.float64)
        check = sampling._of_distribution({sampling.VECTORISED: other}, data, probs)
        wrong = lambda name: check(name) if name == sampling.VECTORISED else forms.check(name)  # noqa: E731
        return dataclasses.replace(forms, check=wrong)

    result = sampling.measure(dataclasses.replace(VARIANTS["balanced"], forms=skewed), SMALL, Cpu(), QUICK)
    assert result.refused[sampling.VECTORISED].startswith("has another distribution: ")
    assert sampling.VECTORISED not in {record["peer"] for record in result.records}


def test_our_own_wrong_result_stops_the_run() -> None:
    def wrong(data: sampling.Data) -> sampling.Forms:
        return sampling.Forms({OURS: lambda: None}, lambda name: "sorts otherwise", {})

    with pytest.raises(runner.WrongResultError, match="ltkernels, balanced of 5000x40: sorts otherwise"):
        sampling.measure(dataclasses.replace(VARIANTS["balanced"], forms=wrong), SMALL, Cpu(), QUICK)


def test_multinomial_is_left_out_where_it_has_too_many_categories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MOST_MULTINOMIAL", 4_999)
    result = sampling.measure(VARIANTS["balanced"], SMALL, Cpu(), QUICK)
    assert result.refused == {sampling.MULTINOMIAL: "takes at most 2^24 categories, found 5000"}


def test_targets_follow_the_threads() -> None:
    def verdicts(**changes: object) -> dict[str, tuple[float | None, str]]:
        record = {"op": "sampling", "peer": OURS, "variant": "balanced", "scenario": "1280000x1000", "threads": 1}
        record |= {"ratio": {sampling.MULTINOMIAL: 0.05, sampling.TAKE: 2.0}} | changes
        return {line.what: (line.limit, line.verdict) for line in targets.judge([record])}

    multinomial = "balanced: time of torch.multinomial"
    assert verdicts()[multinomial] == (1 / 15, "reached")
    assert verdicts(threads=2)[multinomial] == (1 / 25, "NOT REACHED")
    assert verdicts(threads=3)[multinomial] == (None, "reported")
    assert verdicts(scenario="5000x40")[multinomial] == (None, "reported")
    assert verdicts()["balanced: time of np.take"] == (None, "reported")
    epoch = {"variant": "epoch", "ratio": {sampling.RANDOM: 1.1}}
    assert verdicts(**epoch)["epoch: time of RandomSampler"] == (1.0, "NOT REACHED")


def test_command_line_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run.jsonl"
    options = "--op sampling --scenario 5000x40 --variant balanced,class_index --seconds 0 --targets --threads 1,2"
    assert main([*options.split(), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "class-balanced" in shown.out and "np.take (less work)" in shown.out
    assert "class_index: time of torch.argsort" in shown.out
    records = report.read_records(out)
    assert [record["threads"] for record in records if record["peer"] == OURS] == [1, 1, 2, 2]
    assert main(["--load", str(out), "--targets"]) == 0
    assert "5000 draws" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--op samplings", "invalid choice: 'samplings'"),
        (
            "--op sampling --variant ce",
            "expected one of balanced, square_root, shuffle, class_index, epoch, found 'ce'",
        ),
        ("--variant balanced", "expected one of ce, ce_weight_smoothing"),
        ("--op sampling --device cuda", "--op sampling: measured on the CPU"),
        ("--op sampling --plot x.gif", "expected a name that ends in .png, .svg, .pdf, found 'x.gif'"),
    ],
)
def test_wrong_arguments_are_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_fewer_samples_than_classes_are_an_error_not_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--op sampling --scenario 3x4 --seconds 0".split()) == 1
    assert "a sample for each class, found 3x4" in capsys.readouterr().err
